import math

import lightly.loss
import pytest
import torch

from fastssl.losses import NTXentLoss
from fastssl.losses.ntxent import ntxent_reference
from tests.covering import pairwise
from tests.losses.views import views
from tests.oracle import DEVICE, UPSTREAM, as_accurate_as_eager, grads, saved_elements


@pytest.mark.parametrize("temperature", [0.5, 0.07])
@pytest.mark.parametrize("B, D", [(1, 3), (7, 5), (33, 16)])
def test_the_papers_formula(B, D, temperature):
    inputs = [z.double() for z in views(B, D)]
    ours = grads(NTXentLoss(temperature), inputs)
    want = grads(lambda a, b: ntxent_reference(a, b, temperature), inputs)
    torch.testing.assert_close(ours, want)


@pytest.mark.parametrize(
    **pairwise(
        {"B, D": [(2, 3), (65, 16), (400, 32)], "temperature": [0.5, 0.1, 0.02], "reduce": UPSTREAM}
    )
)
def test_value_and_gradient_of_lightly(B, D, temperature, reduce):
    rival = lightly.loss.NTXentLoss(temperature)
    truth = grads(rival, [z.double() for z in views(B, D)], reduce)
    eager = grads(rival, views(B, D), reduce)
    ours = grads(NTXentLoss(temperature), views(B, D), reduce)
    logit = 1 / temperature  # the value is a difference of numbers as large, and rounded as they
    for a, e, t in zip(ours, eager, truth, strict=True):
        offset = 0 if t.ndim else logit
        as_accurate_as_eager(a + offset, e + offset, t + offset)


def test_a_near_perfect_match_keeps_its_digits():
    z = torch.eye(6, device=DEVICE) + 1e-3
    ours = NTXentLoss(0.05)(z, z)
    truth = NTXentLoss(0.05)(z.double(), z.double())
    assert 0 < truth < 1e-6
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=0)


def test_a_negative_temperature_is_lightlys_too():
    ours = grads(NTXentLoss(-0.5), [z.double() for z in views(9, 4)])
    theirs = grads(lightly.loss.NTXentLoss(-0.5), [z.double() for z in views(9, 4)])
    torch.testing.assert_close(ours, theirs)


def test_known_values():
    same = torch.ones(50, 4, device=DEVICE)
    assert math.isclose(NTXentLoss()(same, same).item(), math.log(99), rel_tol=1e-6)
    one = torch.randn(1, 4, device=DEVICE)
    assert NTXentLoss()(one, one + 1).item() == pytest.approx(0.0, abs=1e-6)


def test_laws():
    a, b = views(40, 8)
    loss, value = NTXentLoss(0.2), NTXentLoss(0.2)(a, b)
    order = torch.randperm(40, device=DEVICE)
    torch.testing.assert_close(loss(b, a), value)
    torch.testing.assert_close(loss(3 * a, 0.1 * b), value)
    assert loss(a, b[order]) > value > 0


def test_prints_its_arguments():
    assert repr(NTXentLoss(0.1)) == "NTXentLoss(temperature=0.1, gather_distributed=True)"


def banks(temperature, size, gather=False):
    """Ours and lightly's, with one content."""
    torch.manual_seed(0)
    ours = NTXentLoss(temperature, size, gather).to(DEVICE)
    theirs = lightly.loss.NTXentLoss(temperature, size, gather).to(DEVICE)
    assert ours.memory_bank is not None
    ours.memory_bank.bank.copy_(theirs.memory_bank.bank)
    return ours, theirs


@pytest.mark.parametrize("temperature", [0.5, 0.02, -0.1])
def test_a_bank_is_lightlys_over_many_steps(temperature):
    ours, theirs = banks(temperature, (30, 8))
    torch.manual_seed(1)
    for _ in range(8):  # batches of 6 come round after the fifth
        inputs = list(torch.randn(2, 6, 8, device=DEVICE))
        got, want = grads(ours, inputs), grads(theirs, inputs)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.memory_bank.bank, theirs.memory_bank.bank)
    assert int(ours.memory_bank.next) == int(theirs.memory_bank.bank_ptr) == 18


def test_a_bank_is_no_less_accurate_than_lightlys():
    ours, theirs = banks(0.05, (300, 16))
    inputs = views(40, 16)
    bank = theirs.memory_bank.bank.clone()
    eager = grads(theirs, inputs)
    theirs.double().memory_bank.bank.copy_(bank)
    truth = grads(theirs, [z.double() for z in inputs])
    for a, e, t in zip(grads(ours, inputs), eager, truth, strict=True):
        as_accurate_as_eager(a, e, t)


def test_the_bank_moves_only_if_z0_requires_a_gradient():
    loss, _ = banks(0.5, (30, 4))
    z0, z1 = views(5, 4)
    before = loss.memory_bank.bank.clone()
    loss(z0, z1.requires_grad_())
    with torch.no_grad():
        loss(z0.clone().requires_grad_(), z1)
    assert torch.equal(loss.memory_bank.bank, before)
    loss(z0.requires_grad_(), z1)
    assert not torch.equal(loss.memory_bank.bank, before)
    torch.testing.assert_close(loss.memory_bank.bank[:5], torch.nn.functional.normalize(z1))


def test_backward_sees_the_bank_of_its_forward():
    loss, _ = banks(0.5, (20, 4))
    first, second = views(20, 4), views(20, 4)
    want = grads(loss, first)
    loss, _ = banks(0.5, (20, 4))
    leaves = [z.requires_grad_() for z in first]
    value = loss(*leaves)
    loss(*(z.requires_grad_() for z in second))  # every key of the bank has changed
    got = torch.autograd.grad(0 * value + value * torch.sin(torch.tensor(0.7)), leaves)
    torch.testing.assert_close(list(got), want[1:])


def test_a_bank_without_its_scores_in_memory():
    loss, _ = banks(0.5, (4096, 4))
    z0, z1 = (z.requires_grad_() for z in views(256, 4))
    assert saved_elements(lambda: loss(z0, z1)) < 256 * 4096 // 16


@pytest.mark.parametrize("size", [(), (5, 4, 3), (5, 0), -1])
def test_refuses_a_bank(size):
    with pytest.raises(ValueError, match="memory_bank_size must be|size must be|dim must be"):
        NTXentLoss(0.5, size)


@pytest.mark.parametrize("shape", [(3, 5), (3,), (0, 4)])
def test_refuses_what_the_bank_does_not_fit(shape):
    loss, z = NTXentLoss(0.5, (8, 4)), torch.ones(shape)
    with pytest.raises(ValueError, match="must (both )?be .B, (4|D).[ ,]"):
        loss(z, z)
