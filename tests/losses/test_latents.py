import pytest
import torch

from fastssl.losses import ChamferLoss, ScaledCosineLoss
from fastssl.losses.latents import chamfer_reference, scaled_cosine_reference
from tests.covering import pairwise
from tests.oracle import DEVICE, UPSTREAM, assert_no_worse

DTYPES = [torch.float32, torch.bfloat16]


def rows(*shape, dtype=torch.float32):
    torch.manual_seed(sum(shape))
    p = torch.randn(shape, device=DEVICE)
    return [x.to(dtype) for x in (p, 0.5 * p + torch.randn(shape, device=DEVICE))]


def wide(call):
    return lambda *x: call(*x).to(torch.promote_types(x[0].dtype, torch.float32))


@pytest.mark.parametrize(**pairwise({"gamma": [1.0, 2.0], "dtype": DTYPES, "reduce": UPSTREAM}))
def test_scaled_cosine_of_masked_rows(gamma, dtype, reduce):
    pred, target = rows(3, 9, 13, dtype=dtype)
    ids = torch.rand(3, 9, device=DEVICE).argsort(1)[:, :4]
    mask = torch.zeros(3, 9, dtype=torch.bool, device=DEVICE).scatter_(1, ids, True)
    loss = ScaledCosineLoss(gamma)
    eager = wide(lambda p, t: scaled_cosine_reference(p[mask], t[mask], gamma))
    assert_no_worse(lambda p, t: loss(p, t, ids), eager, [pred, target], reduce)


def test_known_values_of_scaled_cosine():
    pred = torch.eye(4, device=DEVICE)
    assert ScaledCosineLoss()(pred, pred).item() == 0
    assert ScaledCosineLoss(3.0)(pred, -2 * pred).item() == 8
    assert ScaledCosineLoss(1.5)(pred, pred.roll(1, 0)).item() == 1


@pytest.mark.parametrize("reduce", UPSTREAM.values(), ids=UPSTREAM)
@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_chamfer_of_groups(kind, reduce):
    pred, target = rows(6, 8, 3)[0], rows(6, 11, 3)[0]
    eager = wide(lambda p, t: chamfer_reference(p, t, kind))
    assert_no_worse(ChamferLoss(kind), eager, [pred, target], reduce)
    fourfold = ChamferLoss(kind)(pred.unflatten(0, (2, 3)), target.unflatten(0, (2, 3)))
    assert torch.equal(fourfold, ChamferLoss(kind)(pred, target))


def test_known_values_of_chamfer():
    pred = torch.tensor([[[0.0, 0.0], [3.0, 4.0]]], device=DEVICE)
    target = torch.zeros(1, 1, 2, device=DEVICE)
    assert ChamferLoss("l2")(pred, target).item() == 12.5
    assert ChamferLoss("l1")(pred, target).item() == 1.25


def test_repeating_the_batch_changes_nothing():
    for loss, x in ((ScaledCosineLoss(), rows(5, 7)), (ChamferLoss(), rows(3, 5, 3))):
        twice = [y.repeat(2, *[1] * (y.ndim - 1)) for y in x]
        torch.testing.assert_close(loss(*x), loss(*twice))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: ChamferLoss("l3"), "kind must be 'l2' or 'l1', got 'l3'"),
        (lambda: ScaledCosineLoss()(*rows(0, 4)), r"at least one chosen row, got \(0,\)"),
        (lambda: ScaledCosineLoss(0.5), "gamma must be >= 1, got 0.5"),
        (lambda: ChamferLoss()(*rows(0, 4, 3)), r"at least one group, got \(0, 4, 3\)"),
    ],
)
def test_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_print_their_arguments():
    assert repr(ScaledCosineLoss()) == "ScaledCosineLoss(gamma=2.0)"
    assert repr(ChamferLoss("l1")) == "ChamferLoss(kind='l1')"
