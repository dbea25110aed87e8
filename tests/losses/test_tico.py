import copy

import lightly.loss
import pytest
import torch

from fastssl.losses.tico import TiCoLoss
from tests.covering import pairwise
from tests.losses.views import views
from tests.oracle import UPSTREAM, assert_no_worse, grads, largest_tensor


def after(loss, steps, B, D):
    """The loss with the state that `steps` batches left in it."""
    for step in range(steps):
        torch.manual_seed(step)
        loss(*torch.randn(2, B, D))
    return lambda a, b: copy.deepcopy(loss)(a, b)  # each call from the same state


@pytest.mark.parametrize(
    **pairwise({"B, D": [(5, 3), (33, 100), (100, 31)], "steps": [0, 3], "reduce": UPSTREAM})
)
def test_value_and_gradient_of_lightly(B, D, steps, reduce):
    ours = after(TiCoLoss(0.7, 3.0), steps, B, D)
    theirs = after(lightly.loss.TiCoLoss(0.7, 3.0), steps, B, D)
    assert_no_worse(ours, theirs, views(B, D), reduce)


@pytest.mark.parametrize("B, D", [(7, 20), (20, 7)], ids=str)
def test_state_of_lightly(B, D):
    """Kept when asked, read only when not, and the same value either way."""
    ours, theirs = TiCoLoss(), lightly.loss.TiCoLoss()
    for keep in (True, True, False, True, False):
        inputs = [z.double() for z in torch.randn(2, B, D)]
        got = grads(lambda a, b, keep=keep: ours(a, b, keep), inputs)
        want = grads(lambda a, b, keep=keep: theirs(a, b, keep), inputs)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(ours.C, theirs.C)


def test_first_batch_without_keeping():
    a, b = views(6, 4)
    loss = TiCoLoss()
    kept_not = loss(a, b, update_covariance_matrix=False)
    assert loss.C is None and not loss.state_dict()
    torch.testing.assert_close(kept_not, loss(a, b))


def test_known_values():
    """One direction for ever: the second term goes to rho; every direction alike: rho / D."""
    one, all_ways = torch.ones(4, 3), torch.eye(3)
    for z, want in ((one, 8.0), (all_ways, 8.0 / 3)):
        loss = TiCoLoss(beta=0.5, rho=8.0)
        values = [loss(z, z).item() for _ in range(30)]
        assert values[0] == pytest.approx(want / 2, rel=1e-5)
        assert values[-1] == pytest.approx(want, rel=1e-5)
    assert TiCoLoss(rho=0.0)(one, -one).item() == pytest.approx(2)


def test_laws():
    a, b = views(20, 30)
    value, order = TiCoLoss()(a, b), torch.randperm(20, device=a.device)
    torch.testing.assert_close(TiCoLoss()(a[order], b[order]), value)
    torch.testing.assert_close(TiCoLoss()(7 * a, 0.1 * b), value)
    rotation = torch.linalg.qr(torch.randn(30, 30, device=a.device)).Q
    torch.testing.assert_close(TiCoLoss()(a @ rotation, b @ rotation), value)
    assert TiCoLoss()(a, b[order]) > value


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_in_float32_out(dtype):
    inputs = views(33, 20, dtype)
    ours = grads(lambda a, b: TiCoLoss()(a, b), inputs)
    truth = grads(lambda a, b: TiCoLoss()(a, b), [z.double() for z in inputs])
    assert [x.dtype for x in ours] == [torch.float32, dtype, dtype]
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=1e-5, atol=0)
    for got, want in zip(ours[1:], truth[1:], strict=True):
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), want, rtol=2 * eps, atol=1e-6)


def test_the_state_is_saved_and_restored():
    a, b = views(6, 4)
    whole = TiCoLoss()
    whole(a, b)
    parted = TiCoLoss()
    parted.load_state_dict(whole.state_dict())
    whole(b, a)
    parted(b, a)
    assert torch.equal(whole.C, parted.C) and whole.C.dtype == torch.float32
    assert not whole.C.requires_grad
    parted.load_state_dict(TiCoLoss().state_dict())  # from before the first batch
    assert parted.C is None


def test_a_graph_outlives_the_next_batch():
    """The second forward must not write over what the first one's backward needs."""
    a, b = (z.requires_grad_() for z in views(6, 4))
    loss = TiCoLoss()
    first = loss(a, b)
    want = torch.autograd.grad(first, [a, b], retain_graph=True)
    loss(b, a)
    assert all(torch.equal(*g) for g in zip(torch.autograd.grad(first, [a, b]), want, strict=True))


def test_reading_makes_no_matrix_of_features_when_the_batch_is_smaller():
    a, b = (z.requires_grad_() for z in views(8, 64))
    loss = TiCoLoss()
    loss(a, b)
    size = largest_tensor(lambda: loss(a, b, update_covariance_matrix=False).backward())
    assert size == 8 * 64


def test_zero_rows_are_finite_and_nan_is_handed_on():
    a, b = views(6, 4)
    a[0], b[1] = 0.0, 0.0
    call = lambda *zs: TiCoLoss()(*zs)  # noqa: E731
    assert all(x.isfinite().all() for x in grads(call, [a, b]))
    a[2, 1] = torch.nan
    assert grads(call, [a, b])[0].isnan()


@pytest.mark.parametrize(
    "shapes, words",
    [
        (((4, 3), (4, 2)), r"both be \(B, D\), none of them empty, got \(4, 3\) and \(4, 2\)"),
        (((4,), (4,)), r"got \(4,\) and \(4,\)"),
        (((1, 3), (1, 3)), "the joined batch must have at least 2 images, got 1"),
        (((4, 5), (4, 5)), "z_a must have the 3 features of C, got 5"),
    ],
)
def test_refuses_shapes(shapes, words):
    loss = TiCoLoss()
    loss(*torch.ones(2, 4, 3))
    with pytest.raises(ValueError, match=words):
        loss(*(torch.zeros(s) for s in shapes))


def test_prints_its_arguments():
    assert repr(TiCoLoss()) == "TiCoLoss(beta=0.9, rho=8.0, gather_distributed=True)"
