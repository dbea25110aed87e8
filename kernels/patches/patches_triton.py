"""Patches straight from pixels in Triton: kernels, and the launches that patches_ops.py declares.

    patch n = b K + k of image b, at place ids_bk of the grid (gt, gh, gw); its values p in 0..P-1
    x_np   p = ((t PH + y) PW + x) C + c: the pixel (t, y, x) of the patch, channel c
    NORM   (2, C) or none: x_np becomes (x_np - NORM_0c) NORM_1c
    z_np = x_np - x_n0      y_np = (z_np - mean_n) inv_n, mean and inverse deviation those of z_n
    loss_n = mean_p f(pred_np - y_np)      d_np = g_n f'(pred_np - y_np) / P      f: see patches.py

A program takes STEPS blocks of an image's patches, one after another.  Where a value stands in a
patch is the same for all, so it is worked out once a program (the sides are known when a kernel is
compiled), as is what its channel is normalized by; where a patch stands once a patch.  Neighboring
lanes read the channels' planes in turn and each plane in order: from HBM every byte comes once.
Taking a patch's first value off leaves nothing to cancel where the mean is far from zero.
mse        all values of a patch fit in registers: measured and compared in one read
mse_long   three loops over its values, the second and third from L2
`spread`, the gradient of `gather`, has a program for the places of the image, each of which looks
through the ids of its image: every pixel is written once, and repeats add up in the order of k.
Traffic: gather and mse read and write each value once; backward reads pred and pixels once more and
writes d once.  Memory-bound.  No atomics: the same bits each run.  In place: nothing.
In the kernels capitals are pointers, or numbers known when they are compiled; *_b, *_k, s_c and so
on are strides.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import launcher, random
from ..common.tuning import Config, Kernel, config_for, register
from . import patches_configs as configs
from .pixels_triton import (
    affine,
    block,
    corner,
    corners,
    inverse,
    loss_of,
    moments,
    offsets,
    piece,
    rows,
    slope_of,
    values,
)


@triton.jit
def _gather(
    IMAGES, NORM, IDS, OUT, K, gh, gw, s_b, s_c, s_t, s_h, s_w,
    C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    FLAT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    P: tl.constexpr = C * PT * PH * PW
    p = values(BLOCK_N, BLOCK_P)
    if P > BLOCK_P:
        p += tl.program_id(1) * BLOCK_P
    inside = (p < P)[None, :]
    c, within = offsets(p, s_c, s_t, s_h, s_w, C, PT, PH, PW, WIDE)
    off, factor = moments(NORM, c[None, :], inside, C)
    image, start = block(K, BLOCK_N * STEPS)
    IMAGES += image * s_b
    IDS += image * K
    OUT += image * K * P
    for some in range(start, tl.minimum(start + BLOCK_N * STEPS, K), BLOCK_N):
        k = some + tl.arange(0, BLOCK_N)
        ok = rows(k, K, BLOCK_N) & inside
        first = corners(IDS, k, K, gh, gw, s_t, s_h, s_w, PT, PH, PW, FLAT, WIDE)
        x = tl.load(IMAGES + first[:, None] + within[None, :], ok, 0)
        if NORM is not None or IMAGES.dtype.element_ty != OUT.dtype.element_ty:
            x = affine(x, off, factor, NORM).to(OUT.dtype.element_ty)
        tl.store(OUT + k.to(tl.int64)[:, None] * P + p[None, :], x, ok)


@triton.jit
def _spread(
    G, NORM, IDS, OUT, N, L, K, P, gh, gw, g_b, g_k, g_p, s_b, s_c, s_t, s_h, s_w,
    C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """N places of all images, L of each; p in the images' order: ((c PT + t) PH + y) PW + x."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    image = n // L
    place = n - image * L
    r = p // PW
    x = p - r * PW
    r2 = r // PH
    y = r - r2 * PH
    c = r2 // PT
    t = r2 - c * PT
    value = ((t * PH + y) * PW + x) * C + c
    here, there = (n < N)[:, None], (p < P)[None, :]
    G += image[:, None] * g_b + value.to(tl.int64)[None, :] * g_p
    total = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        ids = tl.load(IDS + image[:, None] * K + k, here & (k < K), -1)
        named = tl.where(ids == place[:, None], k, K)
        found = tl.min(named, 1)
        while tl.min(found, 0) < K:
            ok = (found < K)[:, None] & there
            total += tl.load(G + found.to(tl.int64)[:, None] * g_k, ok, 0.0).to(tl.float32)
            named = tl.where(named > found[:, None], named, K)
            found = tl.min(named, 1)
    if NORM is not None:
        total *= tl.load(NORM + C + c[None, :], there, 0.0)
    first = image * s_b + corner(place, gh, gw, s_t, s_h, s_w, PT, PH, PW, FLAT)
    within = c.to(tl.int64) * s_c + t.to(tl.int64) * s_t + y.to(tl.int64) * s_h + x * s_w
    tl.store(OUT + first[:, None] + within[None, :], total.to(OUT.dtype.element_ty), here & there)


@triton.jit
def _mse(
    PRED, IMAGES, NORM, IDS, LOSS, STATS, K, gh, gw, eps, p_b, p_k, p_p,
    s_b, s_c, s_t, s_h, s_w,
    C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    FLAT: tl.constexpr, WIDE: tl.constexpr, KIND: tl.constexpr, NORM_PIX: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """For patches of at most BLOCK_P values."""
    P: tl.constexpr = C * PT * PH * PW
    p = values(BLOCK_N, BLOCK_P)
    inside = (p < P)[None, :]
    c, within = offsets(p, s_c, s_t, s_h, s_w, C, PT, PH, PW, WIDE)
    off, factor = moments(NORM, c[None, :], inside, C)
    off_0, factor_0 = moments(NORM, 0, True, C)
    image, start = block(K, BLOCK_N * STEPS)
    PRED += image * p_b
    IMAGES += image * s_b
    IDS += image * K
    LOSS += image * K
    STATS += image * K * 2
    for some in range(start, tl.minimum(start + BLOCK_N * STEPS, K), BLOCK_N):
        k = some + tl.arange(0, BLOCK_N)
        here = rows(k, K, BLOCK_N)
        ok = here & inside
        row = k.to(tl.int64)[:, None]
        pred = tl.load(PRED + row * p_k + p.to(tl.int64)[None, :] * p_p, ok, 0.0)
        first = corners(IDS, k, K, gh, gw, s_t, s_h, s_w, PT, PH, PW, FLAT, WIDE)[:, None]
        x = affine(tl.load(IMAGES + first + within[None, :], ok, 0.0), off, factor, NORM)
        if NORM_PIX:
            x -= affine(tl.load(IMAGES + first, here, 0.0), off_0, factor_0, NORM)
            mean = tl.sum(tl.where(ok, x, 0.0), 1)[:, None] / P
            x -= mean
            var = tl.sum(tl.where(ok, x * x, 0.0), 1)[:, None] / (P - 1)
            inv = inverse(var, eps)
            x *= inv
            tl.store(STATS + 2 * row, mean, here)
            tl.store(STATS + 2 * row + 1, inv, here)
        total = tl.sum(tl.where(ok, loss_of(pred.to(tl.float32) - x, KIND), 0.0), 1)
        tl.store(LOSS + row, total[:, None] / P, here)


@triton.jit
def _mse_long(
    PRED, IMAGES, NORM, IDS, LOSS, STATS, K, gh, gw, eps, p_b, p_k, p_p,
    s_b, s_c, s_t, s_h, s_w,
    C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    FLAT: tl.constexpr, WIDE: tl.constexpr, KIND: tl.constexpr, NORM_PIX: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """For patches of any number of values: a program for each."""
    P: tl.constexpr = C * PT * PH * PW
    p = values(1, BLOCK_P)
    image, k = block(K, 1)
    first = corners(IDS + image * K, k, K, gh, gw, s_t, s_h, s_w, PT, PH, PW, FLAT, WIDE)
    IMAGES += image * s_b + first
    PRED += image * p_b + k.to(tl.int64) * p_k
    shift, mean, inv = 0.0, 0.0, 1.0
    sums = tl.zeros((BLOCK_P,), tl.float32)
    if NORM_PIX:
        off, factor = moments(NORM, 0, True, C)
        shift = affine(tl.load(IMAGES), off, factor, NORM)
        for at in range(0, P, BLOCK_P):
            x, ok = piece(IMAGES, NORM, at + p, s_c, s_t, s_h, s_w, C, PT, PH, PW, WIDE)
            sums += tl.where(ok, x - shift, 0.0)
        mean = tl.sum(sums, 0) / P
        sums = tl.zeros((BLOCK_P,), tl.float32)
        for at in range(0, P, BLOCK_P):
            x, ok = piece(IMAGES, NORM, at + p, s_c, s_t, s_h, s_w, C, PT, PH, PW, WIDE)
            x = x - shift - mean
            sums += tl.where(ok, x * x, 0.0)
        inv = inverse(tl.sum(sums, 0) / (P - 1), eps)
        sums = tl.zeros((BLOCK_P,), tl.float32)
    for at in range(0, P, BLOCK_P):
        x, ok = piece(IMAGES, NORM, at + p, s_c, s_t, s_h, s_w, C, PT, PH, PW, WIDE)
        pred = tl.load(PRED + (at + p).to(tl.int64) * p_p, ok, 0.0).to(tl.float32)
        sums += tl.where(ok, loss_of(pred - (x - shift - mean) * inv, KIND), 0.0)
    n = image * K + k
    tl.store(LOSS + n, tl.sum(sums, 0) / P)
    if NORM_PIX:
        tl.store(STATS + 2 * n, mean)
        tl.store(STATS + 2 * n + 1, inv)


@triton.jit
def _mse_grad(
    G, PRED, IMAGES, NORM, IDS, STATS, D_PRED, K, gh, gw, g_b, g_k, p_b, p_k, p_p,
    s_b, s_c, s_t, s_h, s_w,
    C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    FLAT: tl.constexpr, WIDE: tl.constexpr, KIND: tl.constexpr, NORM_PIX: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    P: tl.constexpr = C * PT * PH * PW
    p = values(BLOCK_N, BLOCK_P)
    if P > BLOCK_P:
        p += tl.program_id(1) * BLOCK_P
    inside = (p < P)[None, :]
    c, within = offsets(p, s_c, s_t, s_h, s_w, C, PT, PH, PW, WIDE)
    off, factor = moments(NORM, c[None, :], inside, C)
    off_0, factor_0 = moments(NORM, 0, True, C)
    image, start = block(K, BLOCK_N * STEPS)
    G += image * g_b
    PRED += image * p_b
    IMAGES += image * s_b
    IDS += image * K
    STATS += image * K * 2
    D_PRED += image * K * P
    for some in range(start, tl.minimum(start + BLOCK_N * STEPS, K), BLOCK_N):
        k = some + tl.arange(0, BLOCK_N)
        here = rows(k, K, BLOCK_N)
        ok = here & inside
        row = k.to(tl.int64)[:, None]
        pred = tl.load(PRED + row * p_k + p.to(tl.int64)[None, :] * p_p, ok, 0.0)
        first = corners(IDS, k, K, gh, gw, s_t, s_h, s_w, PT, PH, PW, FLAT, WIDE)[:, None]
        x = affine(tl.load(IMAGES + first + within[None, :], ok, 0.0), off, factor, NORM)
        if NORM_PIX:
            shift = affine(tl.load(IMAGES + first, here, 0.0), off_0, factor_0, NORM)
            mean = tl.load(STATS + 2 * row, here, 0.0)
            x = (x - shift - mean) * tl.load(STATS + 2 * row + 1, here, 0.0)
        g = tl.load(G + row * g_k, here, 0.0).to(tl.float32) / P
        d = g * slope_of(pred.to(tl.float32) - x, KIND)
        tl.store(D_PRED + row * P + p[None, :], d.to(D_PRED.dtype.element_ty), ok)


class _Launch:
    """How a kernel's class for images, or what stands in their layout, is launched."""

    def __init__(
        self, kernel: Kernel, images: Tensor, patch: Sequence[int], result: Tensor, part: str
    ) -> None:
        name = configs.shape_class(images.dtype, result.dtype, part)
        self.config = config_for(kernel, name, images.device)
        C, (pt, ph, pw) = images.shape[1], patch
        self.P, self.grid_sides = C * pt * ph * pw, (images.shape[3] // ph, images.shape[4] // pw)
        depth = images.shape[2] // pt
        self.sides = {"C": C, "PT": pt, "PH": ph, "PW": pw, "FLAT": depth == 1}
        _, s_c, s_t, s_h, s_w = images.stride()
        reach = (C - 1) * s_c + (pt - 1) * s_t + (ph - 1) * s_h + (pw - 1) * s_w
        self.wide = reach >= 2**31 or depth * math.prod(self.grid_sides) >= 2**31

    def grid(self, B: int, K: int) -> tuple[int, int]:
        """Blocks of B times K patches, each image's for itself, and of their values."""
        blocks = self.config.blocks
        some = blocks.get("BLOCK_N", 1) * blocks.get("STEPS", 1)
        return B * triton.cdiv(K, some), triton.cdiv(self.P, blocks["BLOCK_P"])


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def gather(
    images: Tensor, norm: Tensor | None, ids: Tensor, patch: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """(B, K, P) in `dtype`; with norm x becomes (x - norm_0c) * norm_1c."""
    P, (B, K) = images.shape[1] * math.prod(patch), ids.shape
    out = torch.empty(B, K, P, dtype=dtype, device=images.device)
    launch = _Launch(GATHER, images, patch, out, configs.moved(P))
    if out.numel():
        with torch.cuda.device_of(images):
            _gather[launch.grid(B, K)](
                images, _contiguous(norm), ids.contiguous(), out, K, *launch.grid_sides,
                *images.stride(), **launch.sides, WIDE=launch.wide, **launch.config.arguments,
            )  # fmt: skip
    return out


def spread(
    grad: Tensor,
    norm: Tensor | None,
    ids: Tensor,
    patch: Sequence[int],
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of `gather` to images of that shape and dtype: repeats add up in float32."""
    out = torch.empty(shape, dtype=dtype, device=grad.device)
    launch = _Launch(SPREAD, out, patch, out, configs.moved(grad.shape[2]))
    L = math.prod([side // p for side, p in zip(shape[2:], patch, strict=True)])
    if out.numel():
        with torch.cuda.device_of(grad):
            _spread[launch.grid(1, len(out) * L)](
                grad, _contiguous(norm), ids.contiguous(), out, len(out) * L, L, ids.shape[1],
                launch.P, *launch.grid_sides, *grad.stride(), *out.stride(), **launch.sides,
                **launch.config.arguments,
            )  # fmt: skip
    return out


def mse(
    pred: Tensor,
    images: Tensor,
    norm: Tensor | None,
    ids: Tensor,
    spec: Sequence[int],
    eps: float | None,
) -> tuple[Tensor, Tensor]:
    """The loss (B, K) and each patch's mean and inverse deviation (B, K, 2), empty without eps.

    spec: the patch's three sides, and the place of the kind in KINDS.
    """
    loss = torch.empty(ids.shape, dtype=torch.float32, device=pred.device)
    stats = loss.new_empty((*ids.shape, 2) if eps is not None else (0,))
    part = configs.measured(pred.shape[2])
    kernel = MSE_LONG if part == "long" else MSE
    launch = _Launch(kernel, images, spec[:3], pred, part)
    if loss.numel():
        with torch.cuda.device_of(images):
            kernel.fn[launch.grid(*ids.shape)[0],](
                pred, images, _contiguous(norm), ids.contiguous(), loss, stats, ids.shape[1],
                *launch.grid_sides, eps or 0.0, *pred.stride(), *images.stride(), **launch.sides,
                WIDE=launch.wide, KIND=spec[3], NORM_PIX=eps is not None,
                **launch.config.arguments,
            )  # fmt: skip
    return loss, stats


def mse_grad(
    grad: Tensor,
    pred: Tensor,
    images: Tensor,
    norm: Tensor | None,
    ids: Tensor,
    stats: Tensor,
    spec: Sequence[int],
) -> Tensor:
    """The gradient of the loss to pred, given that of each patch's, (B, K)."""
    d_pred = torch.empty(pred.shape, dtype=pred.dtype, device=pred.device)
    launch = _Launch(MSE_GRAD, images, spec[:3], pred, configs.moved(pred.shape[2]))
    if d_pred.numel():
        with torch.cuda.device_of(images):
            _mse_grad[launch.grid(*ids.shape)](
                grad, pred, images, _contiguous(norm), ids.contiguous(), stats, d_pred,
                ids.shape[1], *launch.grid_sides, *grad.stride(), *pred.stride(),
                *images.stride(), **launch.sides, WIDE=launch.wide, KIND=spec[3],
                NORM_PIX=stats.ndim == 3, **launch.config.arguments,
            )  # fmt: skip
    return d_pred


def _trial(dtypes: str, part: str, device: torch.device) -> tuple[Tensor, Tensor, int, Tensor]:
    """Images (B, 3, 1, S, S), ids, a patch's side, and predictions of the patches."""
    images, ids, side = configs.trial_images(dtypes, part, device)
    pred = random(dtypes.rpartition("-")[2], device, *ids.shape, 3 * side * side, seed=1)
    return images[:, :, None], ids, side, pred


def _try_gather(dtypes: str, part: str, config: Config, device: torch.device) -> Any:
    images, ids, side, pred = _trial(dtypes, part, device)
    arguments = images, None, ids, (1, side, side), pred.dtype
    return launcher(GATHER.name, config, gather, *arguments)


def _try_spread(dtypes: str, part: str, config: Config, device: torch.device) -> Any:
    images, ids, side, _ = _trial(dtypes, part, device)
    grad = gather(images, None, ids, (1, side, side), images.dtype)
    arguments = grad, None, ids, (1, side, side), images.shape, images.dtype
    return launcher(SPREAD.name, config, spread, *arguments)


def _try_mse(dtypes: str, part: str, config: Config, device: torch.device) -> Any:
    images, ids, side, pred = _trial(dtypes, part, device)
    name = (MSE_LONG if part == "long" else MSE).name
    return launcher(name, config, mse, pred, images, None, ids, (1, side, side, 0), 1e-6)


def _try_mse_grad(dtypes: str, part: str, config: Config, device: torch.device) -> Any:
    images, ids, side, pred = _trial(dtypes, part, device)
    loss, stats = mse(pred, images, None, ids, (1, side, side, 0), 1e-6)
    arguments = torch.ones_like(loss), pred, images, None, ids, stats, (1, side, side, 0)
    return launcher(MSE_GRAD.name, config, mse_grad, *arguments)


GATHER, SPREAD, MSE, MSE_LONG, MSE_GRAD = (
    register(Kernel(f"patches{fn.__name__}", fn, configs.variants(fn, parts, trial)))
    for fn, parts, trial in (
        (_gather, configs.MOVES, _try_gather),
        (_spread, configs.SPREAD, _try_spread),
        (_mse, configs.HELD, _try_mse),
        (_mse_long, configs.LONG, _try_mse),
        (_mse_grad, configs.MOVES, _try_mse_grad),
    )
)
