import pytest
import torch

from fastssl.kernels import Normalized, gather_patches
from fastssl.losses import MAELoss
from fastssl.masking import random_masking
from tests.oracle import DEVICE, UPSTREAM, as_accurate_as_eager, grads


def mae(pred_BLP, images, mask_BL, patch, norm_pix):
    """He et al. as published in code: a prediction for every patch, the masked ones' mean."""
    B, C, H, W = images.shape
    x = images.reshape(B, C, H // patch, patch, W // patch, patch)
    y = torch.einsum("nchpwq->nhwpqc", x).reshape(pred_BLP.shape)
    if norm_pix:
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True) + 1e-6) ** 0.5
    error = ((pred_BLP - y) ** 2).mean(-1)
    return (error * mask_BL).sum() / mask_BL.sum()


@pytest.mark.parametrize("reduce", UPSTREAM.values(), ids=UPSTREAM)
@pytest.mark.parametrize("norm_pix", [True, False], ids=["norm_pix", "raw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_value_and_gradient_of_mae(norm_pix, dtype, reduce):
    torch.manual_seed(0)
    images = torch.randn(5, 3, 12, 20, device=DEVICE)
    masked = random_masking(torch.arange(5, device=DEVICE), 15, 4).masked
    mask = torch.zeros(5, 15, device=DEVICE).scatter_(1, masked, 1.0)
    every = torch.randn(5, 15, 48, device=DEVICE).to(dtype)
    at = masked[..., None].expand(-1, -1, 48)

    def published(pred, width):
        return mae(pred, images.to(width), mask.to(width), 4, norm_pix)

    truth = grads(lambda p: published(p, torch.float64), [every.double()], reduce)
    eager = grads(lambda p: published(p, dtype).float(), [every], reduce)
    loss = MAELoss(4, norm_pix)
    ours = grads(lambda p: loss(p, images, masked), [every.gather(1, at)], reduce)
    as_accurate_as_eager(ours[0], eager[0], truth[0])
    as_accurate_as_eager(ours[1], eager[1].gather(1, at), truth[1].gather(1, at))


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


def test_normalised_images():
    images = torch.randint(256, (5, 3, 8, 12), dtype=torch.uint8, device=DEVICE)
    mean, std = torch.rand(2, 3, device=DEVICE) + 0.5
    masked = random_masking(torch.arange(5, device=DEVICE), 6, 2).masked
    pred = torch.randn(5, 4, 48, device=DEVICE)
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
