"""The teacher follows the formula, also where one step is too small for 16 bits."""

import pytest
import torch
from torch import nn

from fastssl.models import EMA, ema, freeze


def student(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    return model.to(dtype)


def move(model):
    """A step of training: every parameter and running statistic changes."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    model(torch.randn(7, 3, dtype=next(model.parameters()).dtype))


def test_a_teacher_begins_as_the_student_and_asks_for_no_gradient():
    model = student()
    teacher, x = EMA(model), torch.randn(7, 3, requires_grad=True)
    out = teacher(x)
    assert torch.equal(out, model(x)) and not out.requires_grad
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_the_mean_is_the_formula_and_buffers_are_the_students(momentum):
    model = student()
    teacher = EMA(model)
    want = {n: p.detach().double() for n, p in model.named_parameters()}
    for _ in range(3):
        move(model)
        teacher.update(model, momentum)
        want = {
            n: momentum * want[n] + (1 - momentum) * p.detach().double()
            for n, p in model.named_parameters()
        }
    for name, p in teacher.model.named_parameters():
        torch.testing.assert_close(p.double(), want[name], rtol=1e-6, atol=1e-6)
    buffers = zip(teacher.model.buffers(), model.buffers(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in buffers)
    assert teacher.model[1].num_batches_tracked == 3


def weights(value, dtype):
    layer = nn.Linear(4, 4, bias=False).to(dtype)
    nn.init.constant_(layer.weight, value)
    return layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_500_small_steps_move_the_teacher(dtype):
    model = weights(1.0, dtype)
    teacher = EMA(model)
    nn.init.constant_(model.weight, 1.1)
    end = model.weight.double()
    for _ in range(500):
        teacher.update(model, 0.996)
    want = end + 0.996**500 * (1.0 - end)  # 1.0865; 16 bits alone stay at 1
    slack = torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-5
    torch.testing.assert_close(teacher.model.weight.double(), want, rtol=0, atol=slack)


def test_the_float32_means_are_saved_and_restored():
    model = weights(1.0, torch.bfloat16)
    whole, parted = EMA(model), EMA(model)
    nn.init.constant_(model.weight, 1.1)
    for step in range(200):
        whole.update(model, 0.996)
        if step == 99:
            parted.load_state_dict(whole.state_dict())
        if step > 99:
            parted.update(model, 0.996)
    assert torch.equal(parted.model.weight, whole.model.weight)
    means = zip(parted.get_extra_state(), whole.get_extra_state(), strict=True)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in means)


def test_a_loaded_teacher_shares_nothing_with_what_it_was_loaded_from():
    model = weights(1.0, torch.bfloat16)
    one = EMA(model)
    one.update(weights(1.1, torch.bfloat16), 0.9)
    state = one.state_dict()
    two = EMA(model)
    two.load_state_dict(state)
    before = [mean.clone() for mean in one.get_extra_state()]
    two.update(weights(3.0, torch.bfloat16), 0.5)
    assert all(torch.equal(*pair) for pair in zip(one.get_extra_state(), before, strict=True))


@pytest.mark.parametrize("momentum", [-0.1, 1.01, float("nan")])
def test_other_momenta_are_refused(momentum):
    model = student()
    with pytest.raises(ValueError, match="momentum must lie in"):
        EMA(model).update(model, momentum)


def test_another_structure_is_refused():
    with pytest.raises(ValueError):
        EMA(student()).update(nn.Linear(3, 5), 0.9)


def test_means_of_16_bits_are_moved_some_at_a_time(monkeypatch):
    monkeypatch.setattr(ema, "_AT_ONCE", 4)
    model = student(torch.bfloat16)
    teacher, before = EMA(model), [p.detach().float() for p in model.parameters()]
    move(model)
    teacher.update(model, 0.9)
    pairs = zip(before, model.parameters(), strict=True)
    wanted = [b.lerp(p.detach().float(), 0.1) for b, p in pairs]
    torch.testing.assert_close(teacher.get_extra_state(), wanted)
    moved = zip(teacher.model.parameters(), wanted, strict=True)
    assert all(torch.equal(mine, mean.bfloat16()) for mine, mean in moved)


def test_the_float32_means_are_told_by_parameter():
    model = student(torch.bfloat16)
    freeze(model[0])
    teacher = EMA(model)
    assert teacher.float32_masters() == {}
    begun = teacher.float32_masters(begin=True)
    own = [*teacher.model[1].parameters(), *teacher.model[2].parameters()]
    assert [*map(id, begun)] == [*map(id, own)]
    assert all(torch.equal(mean, p.float()) for p, mean in begun.items())
    next(iter(begun.values())).fill_(3.0)
    teacher.update(model, 1.0)  # by these, as a run that was taken up
    assert (own[0] == 3).all() and teacher.float32_masters().keys() == begun.keys()
    assert EMA(student()).float32_masters(begin=True) == {}
