"""Patches straight from pixels: chosen ones, and the error of predicting them.

    grid: patch i covers rows ph * (i // gw) .. and columns pw * (i % gw) .., gw = W / pw
    gather_patches(images, ids)_bk = the P = ph * pw * C pixels of patch ids_bk, in 'h w c' order
    y = x (raw) or (x - mean(x)) / sqrt(var(x) + eps) over a patch's P pixels, variance unbiased
    patch_mse_bk = mean_p (pred_bkp - y_bkp)^2       dpred_bkp = 2 g_bk (pred_bkp - y_bkp) / P

B images, C channels of H x W pixels, L = (H / ph)(W / pw) patches in row-major order, K chosen.
Why: eager makes a second copy of the images as patches, all L of them, then keeps K; its error
makes the target, its normalised twin and the difference, and keeps them for backward.  Here a
chunk of the batch is read straight from the images, and only a patch's mean and
inverse deviation are kept.
Traffic: K / L of the pixels once (patch_mse: once more in backward) and the patches out.
Memory-bound.  Memory: the result and one chunk.  In place: nothing.
Source: He et al. 2021, MAE, arXiv:2111.06377, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._chunks import row_spans
from ._dispatch import accumulator, declare, first_order, may_look, require_float


def _grid_view(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """The images as (B, gh, gw, ph, pw, C), without a copy whatever their strides."""
    ph, pw = patch
    return images.unflatten(3, (-1, pw)).unflatten(2, (-1, ph)).permute(0, 2, 4, 3, 5, 1)


def gather_patches_reference(images, ids, patch):
    """Every patch of every image, then the chosen ones: the tests' oracle."""
    patches_BLP = _grid_view(images, patch).flatten(3).flatten(1, 2)
    return patches_BLP.gather(1, ids[..., None].expand(-1, -1, patches_BLP.shape[-1]))


def patch_mse_reference(pred, images, ids, patch, norm_pix, eps):
    """The formula, eager, in the dtype of pred."""
    y = gather_patches_reference(images, ids, patch).to(pred.dtype)
    if norm_pix:
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True) + eps).sqrt()
    return (pred - y).square().mean(-1)


def _places(ids: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Index of image, grid row and grid column of each chosen patch."""
    image = torch.arange(len(ids), device=ids.device)[:, None]
    return image, ids.div(columns, rounding_mode="floor"), ids % columns


def _read(images: Tensor, ids: Tensor, patch: tuple[int, int]) -> Tensor:
    """The chosen patches of one chunk of the batch: (b, K, P), in the images' dtype.

    In contiguous images a patch is C * ph runs of pw neighbours, and a run is copied whole; an
    index for each pixel costs three times as much.
    """
    image, row, column = _places(ids, images.shape[3] // patch[1])
    if not images.is_contiguous():
        return _grid_view(images, patch)[image, row, column].flatten(2)
    (C, H), (ph, pw) = images.shape[1:3], patch
    planes = image[..., None] * C + torch.arange(C, device=ids.device)  # (b, 1, C)
    lines = (row * ph)[..., None] + torch.arange(ph, device=ids.device)  # (b, K, ph)
    runs = planes[..., None] * H + lines[:, :, None]  # (b, K, C, ph) rows of pixels
    runs = runs * (images.shape[3] // pw) + column[..., None, None]
    y = images.view(-1, pw).index_select(0, runs.flatten()).view(*runs.shape, pw)
    return y.permute(0, 1, 3, 4, 2).flatten(2)


class _GatherPatches(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images, ids, patch):
        pixels = images.shape[1] * patch[0] * patch[1]
        out = images.new_empty(*ids.shape, pixels)
        for i in row_spans(out, ids.shape[1] * pixels):
            out[i] = _read(images[i], ids[i], patch)
        ctx.save_for_backward(ids)
        ctx.shape, ctx.patch = images.shape, patch
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad):
        (ids,) = ctx.saved_tensors
        d_images = torch.zeros(ctx.shape, dtype=accumulator(grad.dtype), device=grad.device)
        grid = _grid_view(d_images, ctx.patch)
        pixels = grad.unflatten(2, (*ctx.patch, -1)).to(d_images.dtype)
        grid.index_put_(_places(ids, grid.shape[2]), pixels, accumulate=True)
        return d_images.to(grad.dtype), None, None


class _PatchMSE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pred, images, ids, patch, norm_pix, eps):
        acc = accumulator(pred.dtype)
        stats = pred.new_zeros(*ids.shape, 2, dtype=acc)  # mean, inverse deviation
        stats[..., 1] = 1
        loss = pred.new_empty(ids.shape, dtype=acc)
        for i in row_spans(loss, pred.shape[1] * pred.shape[2]):
            y = _read(images[i], ids[i], patch).to(acc)
            if norm_pix:
                var, mean = torch.var_mean(y, dim=-1)
                stats[i] = torch.stack([mean, (var + eps).rsqrt()], dim=-1)
            loss[i] = _error(pred[i], y, stats[i]).square_().mean(-1)
        ctx.save_for_backward(pred, images, ids, stats)
        ctx.patch = patch
        return loss

    @staticmethod
    @first_order
    def backward(ctx: Any, grad):
        pred, images, ids, stats = ctx.saved_tensors
        acc, pixels = stats.dtype, pred.shape[2]
        d_pred = torch.empty_like(pred, memory_format=torch.contiguous_format)
        for i in row_spans(stats, pred.shape[1] * pixels):
            error = _error(pred[i], _read(images[i], ids[i], ctx.patch).to(acc), stats[i])
            d_pred[i] = error.mul_(grad[i, :, None] * (2 / pixels))
        return d_pred, None, None, None, None, None


def _error(pred: Tensor, y: Tensor, stats: Tensor) -> Tensor:
    """Prediction minus target, in y, which is this chunk's own."""
    return y.sub_(stats[..., :1]).mul_(stats[..., 1:]).neg_().add_(pred)


_GATHER = declare("gather_patches", torch=_GatherPatches.apply, reference=gather_patches_reference)
_MSE = declare("patch_mse", torch=_PatchMSE.apply, reference=patch_mse_reference)


def _check(images: Tensor, ids: Tensor, patch: int | tuple[int, int]) -> tuple[int, int]:
    """The patch as (ph, pw), after refusing images and ids that do not fit it."""
    ph, pw = (patch, patch) if isinstance(patch, int) else patch
    if images.ndim != 4:
        raise ValueError(f"images must be (B, C, H, W), got {tuple(images.shape)}")
    H, W = images.shape[2:]
    if ph < 1 or pw < 1 or H % ph or W % pw:
        raise ValueError(f"patch must divide the image's {H} x {W} pixels, got {ph} x {pw}")
    if ids.ndim != 2 or len(ids) != len(images) or ids.dtype != torch.int64:
        got = f"{tuple(ids.shape)} {ids.dtype}"
        raise ValueError(f"ids must be ({len(images)}, K) int64, got {got}")
    if ids.device != images.device:
        raise ValueError(f"ids must be on {images.device} with the images, got {ids.device}")
    patches = (H // ph) * (W // pw)
    if may_look(ids) and ids.numel():
        low, high = ids.aminmax()
        if low < 0 or high >= patches:
            raise ValueError(f"ids must lie in 0..{patches - 1}, got {int(low)}..{int(high)}")
    return ph, pw


def gather_patches(
    images: Tensor, ids: Tensor, patch: int | tuple[int, int], *, impl: str = "auto"
) -> Tensor:
    """The chosen patches' pixels: (B, K, ph * pw * C), 'h w c' order, in the images' dtype.

    images (B, C, H, W): float or integer, any strides.  ids (B, K) int64 in 0..L-1, row-major over
    the patch grid; repeats allowed.  patch: a side or (ph, pw), in pixels.
    The gradient to float images adds up over repeats, in float32; first order only.
    impl: "auto", "torch" or "reference" (makes all L patches first).
    Raises ValueError for shapes and a patch that do not fit, an id out of range (checked on a CPU
    only: elsewhere it is undefined) and an unknown impl.

    >>> gather_patches(torch.arange(16).view(1, 1, 4, 4), torch.tensor([[3]]), 2).tolist()
    [[[10, 11, 14, 15]]]
    """
    sides = _check(images, ids, patch)
    return _GATHER(impl, images.device, images, ids, sides)


def patch_mse(
    pred: Tensor,
    images: Tensor,
    ids: Tensor,
    patch: int | tuple[int, int],
    *,
    norm_pix: bool = True,
    eps: float = 1e-6,
    impl: str = "auto",
) -> Tensor:
    """Mean squared error of each predicted patch against its pixels: (B, K) float32.

    pred (B, K, ph * pw * C): any float dtype, 'h w c' order.  images, ids, patch: as in
    `gather_patches`; uint8 images are read as 0..255.  norm_pix: each patch's pixels are brought to
    mean 0 and deviation 1 first (unbiased variance plus eps, in the images' units squared).
    Gradient to pred only: the target is data.  First order only.
    impl: "auto", "torch" or "reference" (in pred's dtype).
    Raises ValueError for a pred of another shape or device, norm_pix with one pixel a patch,
    eps < 0, and what `gather_patches` refuses.

    >>> images = torch.arange(4.0).view(1, 1, 2, 2)
    >>> patch_mse(torch.zeros(1, 1, 4), images, torch.tensor([[0]]), 2, norm_pix=False)
    tensor([[3.5000]])
    """
    ph, pw = _check(images, ids, patch)
    pixels = ph * pw * images.shape[1]
    require_float(pred=pred)
    if pred.shape != (*ids.shape, pixels) or pred.device != images.device:
        got = f"{tuple(pred.shape)} on {pred.device}"
        raise ValueError(f"pred must be {(*ids.shape, pixels)} on {images.device}, got {got}")
    if norm_pix and pixels < 2:
        raise ValueError(f"norm_pix needs at least 2 pixels a patch, got {pixels}")
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    args = (pred, images.detach(), ids, (ph, pw), norm_pix, eps)
    return _MSE(impl, pred.device, *args).to(accumulator(pred.dtype))
