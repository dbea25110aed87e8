import pytest
import torch

from fastssl.kernels import Normalized, gather_patches
from fastssl.losses import MAELoss
from fastssl.losses.reconstruction import mae_reference
from fastssl.masking import random_masking
from tests.covering import pairwise
from tests.oracle import DEVICE, UPSTREAM, assert_no_worse


@pytest.mark.parametrize(
    **pairwise(
        {"dtype": [torch.float32, torch.bfloat16], "norm_pix": [True, False], "reduce": UPSTREAM}
    )
)
def test_value_and_gradient_of_mae(norm_pix, dtype, reduce):
    torch.manual_seed(0)
    images = torch.randn(5, 3, 12, 20, device=DEVICE)
    masked = random_masking(torch.arange(5, device=DEVICE), 15, 4).masked
    pred = torch.randn(*masked.shape, 48, device=DEVICE).to(dtype)
    assert_no_worse(
        lambda p: MAELoss(4, norm_pix)(p, images, masked),
        lambda p: mae_reference(p, images.to(p.dtype), masked, 4, norm_pix),
        [pred],
        reduce,
    )


def test_known_values():
    """A prediction of 0 scores the target's mean square: (P - 1) / P for unbiased norm_pix."""
    images = torch.randn(4, 3, 8, 8, device=DEVICE)
    ids = torch.tensor([[0, 3]], device=DEVICE).expand(4, 2)
    loss = MAELoss((4, 4))(torch.zeros(4, 2, 48, device=DEVICE), images, ids)
    assert loss.item() == pytest.approx(47 / 48, abs=1e-5)


@pytest.mark.parametrize("kind, want", [("l2", 4.0), ("l1", 2.0), ("smooth_l1", 1.5)])
def test_kinds_over_clips_and_signals(kind, want):
    """Every prediction is 2 off."""
    for size, patch in (((6,), 3), ((4, 6), (2, 3)), ((2, 4, 6), (1, 2, 3))):
        images = torch.randint(256, (2, 3, *size), dtype=torch.uint8, device=DEVICE)
        ids = torch.tensor([[1], [0]], device=DEVICE)
        pred = gather_patches(images, ids, patch).float() + 2
        loss = MAELoss(patch, norm_pix=False, kind=kind)
        assert loss(pred, images, ids).item() == pytest.approx(want)


def test_normalized_images():
    images = torch.randint(256, (5, 3, 8, 12), dtype=torch.uint8, device=DEVICE)
    mean, std = torch.rand(2, 3, device=DEVICE) + 0.5
    masked = random_masking(torch.arange(5, device=DEVICE), 6, 2).masked
    pred = torch.randn(*masked.shape, 48, device=DEVICE)
    copy = (images / 255 - mean[:, None, None]) / std[:, None, None]
    got, want = (MAELoss(4)(pred, x, masked) for x in (Normalized(images, mean, std), copy))
    torch.testing.assert_close(got, want)


def test_repeating_the_batch_changes_nothing():
    images, ids = torch.randn(2, 1, 4, 4), torch.tensor([[0, 2], [1, 3]])
    pred, loss = torch.randn(2, 2, 4), MAELoss(2)
    once, twice = (
        loss(*(x.repeat(n, *[1] * (x.ndim - 1)) for x in (pred, images, ids))) for n in (1, 2)
    )
    torch.testing.assert_close(once, twice)


def test_refuses_no_hidden_patch():
    ids = torch.zeros(2, 0, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"at least one hidden patch, got shape \(2, 0\)"):
        MAELoss(2)(torch.zeros(2, 0, 4), torch.zeros(2, 1, 4, 4), ids)


def test_prints_its_arguments():
    assert repr(MAELoss(4)) == "MAELoss(patch=4, norm_pix=True, kind='l2')"
