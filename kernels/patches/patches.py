"""Patches straight from pixels: chosen ones, and the error of predicting them.

    grid: an image's sides S, each over the patch's; patch i is the i-th of it in row-major order
    gather_patches(images, ids)_bk = the P = prod(patch) * C values of patch ids_bk, channels last:
        'w c' of a signal, 'h w c' of an image, 't h w c' of a clip
    y = x (raw) or (x - mean(x)) / sqrt(var(x) + eps) over a patch's P values, variance unbiased
    patch_mse_bk = mean_p f(pred_bkp - y_bkp)        dpred_bkp = g_bk f'(pred_bkp - y_bkp) / P
    f(e) = e^2 (l2), |e| (l1), or e^2 / 2 where |e| < 1 and |e| - 1/2 elsewhere (smooth_l1)

B images, C channels of S pixels (1, 2 or 3 sides), L patches, K of them chosen.
Why: eager makes a second copy of the images as patches, all L of them, then keeps K; its error
makes the target, its normalized twin and the difference, and keeps them for backward.  Here patches
are read straight from the images, normalized by channel on the way (`Normalized`), and there is no
target: the Triton kernels (patches_triton.py) keep two numbers a patch for backward, and torch
(patches_torch.py) keeps the error, in pred's place.
Traffic: K / L of the pixels once (patch_mse: once more in backward) and the patches out.
Memory-bound.  Memory: the result, and for torch one chunk.  In place: nothing.
Source: He et al. 2021, MAE, arXiv:2111.06377, section 3; Feichtenhofer et al. 2022, MAE for video,
arXiv:2205.09113; smooth_l1: Girshick 2015, arXiv:1504.08083, eq. 3.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.autograd import accumulator
from ..common.checks import check_ids, check_index, require_at_least, require_float, require_tensors
from ..common.dispatch import FUSED, declare
from .patches_ops import GatherPatches, PatchMSE, backends
from .patches_torch import KINDS, Patch, Spec, grid_view


class Normalized(NamedTuple):
    """Images to be read as (x - mean_c) / std_c, uint8 ones as (x / 255 - mean_c) / std_c.

    images (B, C, *S): float or uint8.  mean, std (C,): float, on the images' device, no gradient.
    The primitives that take one never make such a copy of the images.

    >>> white = torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)
    >>> images = Normalized(white, torch.tensor([0.5]), torch.tensor([0.25]))
    >>> gather_patches(images, torch.tensor([[0]]), 2).tolist()
    [[[2.0, 2.0, 2.0, 2.0]]]
    """

    images: Tensor
    mean: Tensor
    std: Tensor


Source = Tensor | Normalized


def gather_patches_reference(source: Source, ids: Tensor, patch: Patch, dtype: torch.dtype):
    """Every patch of every image, normalized, then the chosen ones: the tests' oracle."""
    images = source
    if isinstance(source, Normalized):
        unit = 1 if source.images.is_floating_point() else 255
        mean, std = (v.to(dtype)[:, None, None, None] for v in source[1:])
        images = (source.images.to(dtype) / unit - mean) / std
    assert isinstance(images, Tensor)
    every_BLP = grid_view(images, patch).flatten(4).flatten(1, 3)
    return every_BLP.gather(1, ids[..., None].expand(-1, -1, every_BLP.shape[-1])).to(dtype)


def patch_mse_reference(pred: Tensor, source: Source, ids: Tensor, spec: Spec):
    """The formula, eager, in the dtype of pred."""
    y = gather_patches_reference(source, ids, spec.patch, pred.dtype)
    if spec.eps is not None:
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True) + spec.eps).sqrt()
    e = pred - y
    if spec.kind == "l2":
        return e.square().mean(-1)
    if spec.kind == "l1":
        return e.abs().mean(-1)
    return torch.where(e.abs() < 1, e.square() / 2, e.abs() - 0.5).mean(-1)


def _table(source: Source, acc: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The images, and what (2, C) makes them normalized: (x - table_0c) * table_1c."""
    if isinstance(source, Tensor):
        return source, None
    images, mean, std = source
    unit = 1 if images.is_floating_point() else 255
    return images, torch.stack([mean.to(acc) * unit, 1 / (std.to(acc) * unit)])


def _gather(source, ids, patch, dtype, impl):
    images, norm = _table(source, accumulator(dtype))
    return GatherPatches.call(images, norm, ids, patch, dtype, impl)


def _mse(pred, source, ids, spec, impl):
    images, norm = _table(source, accumulator(pred.dtype))
    if pred.requires_grad and torch.is_grad_enabled():
        return PatchMSE.call(pred, images, norm, ids, spec, impl)
    return backends[impl].error(pred, images, norm, ids, spec, False)[0]


_FUSED = (*FUSED, torch.uint8)  # images that kernels read
_GATHER = declare("gather_patches", _gather, gather_patches_reference, _FUSED)
_MSE = declare("patch_mse", _mse, patch_mse_reference, _FUSED)


def _check(source: Source, ids: Tensor, patch: int | tuple[int, ...]) -> tuple[Source, Patch]:
    """Source and patch with three sides, after refusing images, ids and patches that do not fit."""
    images = _pixels(source)
    require_tensors(images=images, ids=ids)
    if not 3 <= images.ndim <= 5:
        got = tuple(images.shape)
        raise ValueError(f"images must be (B, C, *S) with 1, 2 or 3 sides S, got {got}")
    if images.shape[1] == 0:
        raise ValueError(f"images must have at least 1 channel, got {tuple(images.shape)}")
    size = images.shape[2:]
    sides = (patch,) * len(size) if isinstance(patch, int) else tuple(patch)
    fits = len(sides) == len(size) and all(
        p > 0 and s % p == 0 for s, p in zip(size, sides, strict=True)
    )
    if not fits:
        want, got = (" x ".join(map(str, x)) for x in (size, sides))
        raise ValueError(f"patch must divide the image's {want} pixels, got {got}")
    check_index("ids", ids, f"({len(images)}, K)", images=images)
    if len(ids) != len(images):
        raise ValueError(f"ids must be ({len(images)}, K) int64, got {tuple(ids.shape)}")
    for _ in range(3 - len(size)):
        images, sides = images[:, :, None], (1, *sides)
    if isinstance(source, Tensor):
        return images, (sides[0], sides[1], sides[2])
    _check_normalized(source)
    return source._replace(images=images), (sides[0], sides[1], sides[2])


def _check_normalized(source: Normalized) -> None:
    """Refuse statistics that are not the images' channels', and images that are no pixels."""
    images, channels = source.images, source.images.shape[1]
    require_tensors(mean=source.mean, std=source.std)
    if not (images.is_floating_point() or images.dtype == torch.uint8):
        raise ValueError(f"normalized images must be float or uint8, got {images.dtype}")
    for name, x in (("mean", source.mean), ("std", source.std)):
        if x.shape != (channels,) or not x.is_floating_point() or x.device != images.device:
            got = f"{tuple(x.shape)} {x.dtype} on {x.device}"
            raise ValueError(f"{name} must be ({channels},) float on {images.device}, got {got}")


def _count(source: Source, patch: Patch) -> int:
    """How many patches an image has."""
    size = _pixels(source).shape[2:]
    return math.prod([side // p for side, p in zip(size, patch, strict=True)])


def _pixels(source: Source) -> Tensor:
    return source.images if isinstance(source, Normalized) else source


def gather_patches(
    images: Source,
    ids: Tensor,
    patch: int | tuple[int, ...],
    *,
    dtype: torch.dtype | None = None,
    repeats: bool = False,
    impl: str = "auto",
) -> Tensor:
    """The chosen patches' pixels: (B, K, prod(patch) * C), channels last within a patch.

    images (B, C, *S), S of 1, 2 or 3 sides: any dtype and strides, or `Normalized`.  ids (B, K)
    int64 in 0..L-1, row-major over the patch grid.  patch: one side, or one for each of S, in
    pixels.  dtype: that of the result; by default the images' own, float32 for normalized uint8.
    repeats: whether an image's ids may name a patch twice.
    The gradient to float images adds up over repeats, in float32; first order only.
    impl: "auto", "triton", "torch" or "reference" (makes all L patches first).  auto is triton on
    CUDA, for images and results in float32, bfloat16, float16 or uint8, and torch elsewhere.
    Raises ValueError for shapes and a patch that do not fit, mean and std that are not one number
    a channel, an unknown impl, and ids out of range or, without repeats, named twice.  Ids are
    looked at on a CPU; elsewhere wrong ones are undefined, but with FASTSSL_CHECK=1 in the
    environment they are looked at anywhere, which waits for the device.

    >>> gather_patches(torch.arange(16).view(1, 1, 4, 4), torch.tensor([[3]]), 2).tolist()
    [[[10, 11, 14, 15]]]
    >>> stereo = torch.tensor([[[0, 1, 2, 3], [10, 11, 12, 13]]])
    >>> gather_patches(stereo, torch.tensor([[1]]), 2).tolist()
    [[[2, 12, 3, 13]]]
    """
    source, sides = _check(images, ids, patch)
    check_ids(ids, _count(source, sides), repeats=repeats)
    normalized, own = isinstance(source, Normalized), _pixels(source).dtype
    if dtype is None:
        dtype = torch.float32 if normalized and not own.is_floating_point else own
    if normalized and not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point one for normalized images, got {dtype}")
    pixels = _pixels(source)
    inputs = {"images": pixels, "dtype": pixels.new_empty(0, dtype=dtype)}
    return _GATHER(impl, source, ids, sides, dtype, inputs=inputs)


def patch_mse(
    pred: Tensor,
    images: Source,
    ids: Tensor,
    patch: int | tuple[int, ...],
    *,
    norm_pix: bool = True,
    eps: float = 1e-6,
    kind: str = "l2",
    impl: str = "auto",
) -> Tensor:
    """Mean error of each predicted patch against its pixels: (B, K) float32.

    pred (B, K, prod(patch) * C): any float dtype, channels last within a patch.  images, ids,
    patch: as in `gather_patches`, without repeats; uint8 images are read as 0..255 unless
    `Normalized`.  norm_pix: each patch's values are brought to mean 0 and deviation 1 first
    (unbiased variance plus eps, in the units that they are read in, squared).
    kind: "l2" (squared), "l1" (absolute) or "smooth_l1" (squared up to 1, as torch's).
    Gradient to pred only: the target is data.  First order only.
    impl: "auto", "triton", "torch" or "reference" (in pred's dtype).  torch keeps the error for
    backward, in pred's dtype; triton computes it again.
    Raises ValueError for a pred of another shape or device, complex images, norm_pix with one
    value a patch, eps < 0, an unknown kind, and what `gather_patches` refuses.

    >>> images = torch.arange(4.0).view(1, 1, 2, 2)
    >>> patch_mse(torch.zeros(1, 1, 4), images, torch.tensor([[0]]), 2, norm_pix=False)
    tensor([[3.5000]])
    """
    source, sides = _check(images, ids, patch)
    pixels = _pixels(source).detach()
    values = math.prod(sides) * pixels.shape[1]
    require_float(pred=pred)
    if pixels.is_complex():
        raise ValueError(f"images must be real, got {pixels.dtype}")
    if pred.shape != (*ids.shape, values) or pred.device != pixels.device:
        got = f"{tuple(pred.shape)} on {pred.device}"
        raise ValueError(f"pred must be {(*ids.shape, values)} on {pixels.device}, got {got}")
    if norm_pix and values < 2:
        raise ValueError(f"norm_pix needs at least 2 values a patch, got {values}")
    require_at_least(0, eps=eps)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    check_ids(ids, _count(source, sides))
    source = pixels if isinstance(source, Tensor) else source._replace(images=pixels)
    spec = Spec(sides, eps if norm_pix else None, kind)
    inputs = {"images": pixels, "pred": pred}
    return _MSE(impl, pred, source, ids, spec, inputs=inputs).to(accumulator(pred.dtype))
