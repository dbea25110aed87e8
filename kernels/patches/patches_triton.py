"""Patches straight from pixels in Triton: kernels, and the launches that patches_ops.py declares.

    patch n = b K + k of image b, at place ids_bk of the grid (gt, gh, gw); its values p in 0..P-1
    x_np   p = ((t PH + y) PW + x) C + c: the pixel (t, y, x) of the patch, channel c
    NORM   (2, C) or none: x_np becomes (x_np - NORM_0c) NORM_1c
    z_np = x_np - x_n0      y_np = (z_np - mean_n) inv_n, mean and inverse deviation those of z_n
    loss_n = mean_p f(pred_np - y_np)      d_np = g_n f'(pred_np - y_np) / P      f: see patches.py

A program has a block of patches and of values.  Where a value stands in a patch is the same for all
patches, so it is worked out once a block (the sides are known when a kernel is compiled), and where
a patch stands once a patch.  Neighboring lanes read the channels' planes in turn and each plane
in order: from HBM every byte comes once.
Taking a patch's first value off leaves nothing to cancel where the mean is far from zero.
held   all values of a patch fit in registers: measured and compared in one read
long   three loops over its values, the second and third from L2
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


@triton.jit
def _within(
    p, s_c, s_t, s_h, s_w,
    C: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The channel of value p, and its offset from the first pixel of its patch."""
    q = p // C
    c = p - q * C
    r = q // PW
    x = q - r * PW
    t = r // PH
    y = r - t * PH
    if WIDE:
        wide = c.to(tl.int64) * s_c + t.to(tl.int64) * s_t
        return c, wide + y.to(tl.int64) * s_h + x.to(tl.int64) * s_w
    return c, c * s_c + t * s_t + y * s_h + x * s_w


@triton.jit
def _first(
    image, place, gh, gw, s_b, s_t, s_h, s_w,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
):  # fmt: skip
    """The offset of the first pixel of a patch; int64, as all its arguments' products."""
    row = place // gw
    time = row // gh
    down, right = row - time * gh, place - row * gw
    return image * s_b + time * PT * s_t + down * PH * s_h + right * PW * s_w


@triton.jit
def _chosen(
    n, N, IDS, K, gh, gw, s_b, s_t, s_h, s_w,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
):  # fmt: skip
    """Offsets of the first pixels of patches n, their images and their place among its K."""
    image = (n // K).to(tl.int64)
    place = tl.load(IDS + n, n < N, 0)
    return _first(image, place, gh, gw, s_b, s_t, s_h, s_w, PT, PH, PW), image, n - image * K


@triton.jit
def _affine(x, NORM, c, ok, C: tl.constexpr):
    """x in float32, normalized by its channel."""
    x = x.to(tl.float32)
    if NORM is not None:
        x = (x - tl.load(NORM + c, ok, 0.0)) * tl.load(NORM + C + c, ok, 0.0)
    return x


@triton.jit
def _values(
    IMAGES, NORM, first, p, ok, P, s_c, s_t, s_h, s_w,
    C: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A tile of values x_np in float32."""
    c, within = _within(p, s_c, s_t, s_h, s_w, C, PH, PW, WIDE)
    x = tl.load(IMAGES + first[:, None] + within[None, :], ok, 0.0)
    return _affine(x, NORM, c[None, :], (p < P)[None, :], C)


@triton.jit
def _gather(
    IMAGES, NORM, IDS, OUT, N, K, P, gh, gw, s_b, s_c, s_t, s_h, s_w,
    C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    ok = (n < N)[:, None] & (p < P)[None, :]
    first, image, k = _chosen(n, N, IDS, K, gh, gw, s_b, s_t, s_h, s_w, PT, PH, PW)
    c, within = _within(p, s_c, s_t, s_h, s_w, C, PH, PW, WIDE)
    x = tl.load(IMAGES + first[:, None] + within[None, :], ok, 0)
    if NORM is not None or IMAGES.dtype.element_ty != OUT.dtype.element_ty:
        x = _affine(x, NORM, c[None, :], (p < P)[None, :], C).to(OUT.dtype.element_ty)
    tl.store(OUT + n[:, None] * P + p[None, :], x, ok)


@triton.jit
def _spread(
    G, NORM, IDS, OUT, N, L, K, P, gh, gw, g_b, g_k, g_p, s_b, s_c, s_t, s_h, s_w,
    C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
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
    first = _first(image, place, gh, gw, s_b, s_t, s_h, s_w, PT, PH, PW)
    within = c.to(tl.int64) * s_c + t.to(tl.int64) * s_t + y.to(tl.int64) * s_h + x * s_w
    tl.store(OUT + first[:, None] + within[None, :], total.to(OUT.dtype.element_ty), here & there)


@triton.jit
def _inverse(var, eps):
    return tl.div_rn(1.0, tl.sqrt_rn(var + eps))


@triton.jit
def _loss(e, KIND: tl.constexpr):
    if KIND == 0:
        return e * e
    size = tl.abs(e)
    if KIND == 1:
        return size
    return tl.where(size < 1.0, 0.5 * e * e, size - 0.5)


@triton.jit
def _slope(e, KIND: tl.constexpr):
    if KIND == 0:
        return 2.0 * e
    if KIND == 1:
        return tl.where(e > 0, 1.0, tl.where(e < 0, -1.0, e))  # a NaN stays one
    return tl.where(e > 1.0, 1.0, tl.where(e < -1.0, -1.0, e))


@triton.jit
def _mse(
    PRED, IMAGES, NORM, IDS, LOSS, STATS, N, K, P, gh, gw, eps, p_b, p_k, p_p,
    s_b, s_c, s_t, s_h, s_w,
    C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, WIDE: tl.constexpr,
    KIND: tl.constexpr, NORM_PIX: tl.constexpr, HELD: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    p = tl.arange(0, BLOCK_P)
    here = (n < N)[:, None]
    first, image, k = _chosen(n, N, IDS, K, gh, gw, s_b, s_t, s_h, s_w, PT, PH, PW)
    PRED += (image * p_b + k * p_k)[:, None]
    shift, mean, inv = 0.0, 0.0, 1.0
    if NORM_PIX:
        shift = _affine(tl.load(IMAGES + first, n < N, 0.0), NORM, 0, True, C)[:, None]
    if HELD:
        ok = here & (p < P)[None, :]
        x = _values(IMAGES, NORM, first, p, ok, P, s_c, s_t, s_h, s_w, C, PH, PW, WIDE) - shift
        pred = tl.load(PRED + p.to(tl.int64)[None, :] * p_p, ok, 0.0).to(tl.float32)
        if NORM_PIX:
            mean = tl.sum(tl.where(ok, x, 0.0), 1)[:, None] / P
            x -= mean
            var = tl.sum(tl.where(ok, x * x, 0.0), 1)[:, None] / (P - 1)
            inv = _inverse(var, eps)
            x *= inv
        total = tl.sum(tl.where(ok, _loss(pred - x, KIND), 0.0), 1)
    else:
        sums = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
        if NORM_PIX:
            for start in range(0, P, BLOCK_P):
                ok = here & (start + p < P)[None, :]
                x = _values(
                    IMAGES, NORM, first, start + p, ok, P, s_c, s_t, s_h, s_w, C, PH, PW, WIDE
                )  # fmt: skip
                sums += tl.where(ok, x - shift, 0.0)
            mean = tl.sum(sums, 1)[:, None] / P
            sums = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
            for start in range(0, P, BLOCK_P):
                ok = here & (start + p < P)[None, :]
                x = _values(
                    IMAGES, NORM, first, start + p, ok, P, s_c, s_t, s_h, s_w, C, PH, PW, WIDE
                )  # fmt: skip
                x = x - shift - mean
                sums += tl.where(ok, x * x, 0.0)
            inv = _inverse(tl.sum(sums, 1)[:, None] / (P - 1), eps)
            sums = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
        for start in range(0, P, BLOCK_P):
            ok = here & (start + p < P)[None, :]
            x = _values(
                IMAGES, NORM, first, start + p, ok, P, s_c, s_t, s_h, s_w, C, PH, PW, WIDE
            )  # fmt: skip
            at = (start + p).to(tl.int64)[None, :] * p_p
            pred = tl.load(PRED + at, ok, 0.0).to(tl.float32)
            sums += tl.where(ok, _loss(pred - (x - shift - mean) * inv, KIND), 0.0)
        total = tl.sum(sums, 1)
    tl.store(LOSS + n, total / P, n < N)
    if NORM_PIX:
        tl.store(STATS + 2 * n[:, None], mean, here)
        tl.store(STATS + 2 * n[:, None] + 1, inv, here)


@triton.jit
def _mse_grad(
    G, PRED, IMAGES, NORM, IDS, STATS, D_PRED, N, K, P, gh, gw, g_b, g_k, p_b, p_k, p_p,
    s_b, s_c, s_t, s_h, s_w,
    C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, WIDE: tl.constexpr,
    KIND: tl.constexpr, NORM_PIX: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    ok = (n < N)[:, None] & (p < P)[None, :]
    first, image, k = _chosen(n, N, IDS, K, gh, gw, s_b, s_t, s_h, s_w, PT, PH, PW)
    x = _values(IMAGES, NORM, first, p, ok, P, s_c, s_t, s_h, s_w, C, PH, PW, WIDE)
    if NORM_PIX:
        shift = _affine(tl.load(IMAGES + first, n < N, 0.0), NORM, 0, True, C)[:, None]
        mean = tl.load(STATS + 2 * n, n < N, 0.0)[:, None]
        x = (x - shift - mean) * tl.load(STATS + 2 * n + 1, n < N, 0.0)[:, None]
    at = (image * p_b + k * p_k)[:, None] + p.to(tl.int64)[None, :] * p_p
    e = tl.load(PRED + at, ok, 0.0).to(tl.float32) - x
    g = tl.load(G + image * g_b + k * g_k, n < N, 0.0).to(tl.float32)[:, None] / P
    d = g * _slope(e, KIND)
    tl.store(D_PRED + n[:, None] * P + p[None, :], d.to(D_PRED.dtype.element_ty), ok)


class _Launch:
    """How a kernel's class for images, or what stands in their layout, is launched."""

    def __init__(
        self, kernel: Kernel, images: Tensor, patch: Sequence[int], result: Tensor, part: str
    ) -> None:
        name = configs.shape_class(images.dtype, result.dtype, part)
        self.config = config_for(kernel, name, images.device)
        C, (pt, ph, pw) = images.shape[1], patch
        self.P, self.grid_sides = C * pt * ph * pw, (images.shape[3] // ph, images.shape[4] // pw)
        self.sides = {"C": C, "PT": pt, "PH": ph, "PW": pw}
        _, s_c, s_t, s_h, s_w = images.stride()
        reach = (C - 1) * s_c + (pt - 1) * s_t + (ph - 1) * s_h + (pw - 1) * s_w
        self.wide = reach >= 2**31

    def grid(self, N: int, over_values: bool = True) -> tuple[int, int]:
        """Blocks of N patches and of their values."""
        blocks = self.config.blocks
        values = triton.cdiv(self.P, blocks["BLOCK_P"]) if over_values else 1
        return triton.cdiv(N, blocks["BLOCK_N"]), values


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def gather(
    images: Tensor, norm: Tensor | None, ids: Tensor, patch: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """(B, K, P) in `dtype`; with norm x becomes (x - norm_0c) * norm_1c."""
    P, N = images.shape[1] * math.prod(patch), ids.numel()
    out = torch.empty(*ids.shape, P, dtype=dtype, device=images.device)
    launch = _Launch(GATHER, images, patch, out, configs.moved(P))
    if out.numel():
        with torch.cuda.device_of(images):
            _gather[launch.grid(N)](
                images, _contiguous(norm), ids.contiguous(), out, N, ids.shape[1], P,
                *launch.grid_sides, *images.stride(), **launch.sides, WIDE=launch.wide,
                **launch.config.arguments,
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
            _spread[launch.grid(len(out) * L)](
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
    loss, N = torch.empty(ids.shape, dtype=torch.float32, device=pred.device), ids.numel()
    stats = loss.new_empty((*ids.shape, 2) if eps is not None else (0,))
    launch = _Launch(MSE, images, spec[:3], pred, configs.measured(pred.shape[2]))
    if N:
        with torch.cuda.device_of(images):
            _mse[launch.grid(N, over_values=False)](
                pred, images, _contiguous(norm), ids.contiguous(), loss, stats, N, ids.shape[1],
                launch.P, *launch.grid_sides, eps or 0.0, *pred.stride(), *images.stride(),
                **launch.sides, WIDE=launch.wide, KIND=spec[3], NORM_PIX=eps is not None,
                HELD=launch.P <= launch.config.blocks["BLOCK_P"], **launch.config.arguments,
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
    d_pred, N = torch.empty(pred.shape, dtype=pred.dtype, device=pred.device), ids.numel()
    launch = _Launch(MSE_GRAD, images, spec[:3], pred, configs.moved(pred.shape[2]))
    if d_pred.numel():
        with torch.cuda.device_of(images):
            _mse_grad[launch.grid(N)](
                grad, pred, images, _contiguous(norm), ids.contiguous(), stats, d_pred, N,
                ids.shape[1], launch.P, *launch.grid_sides, *grad.stride(), *pred.stride(),
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
    return launcher(MSE.name, config, mse, pred, images, None, ids, (1, side, side, 0), 1e-6)


def _try_mse_grad(dtypes: str, part: str, config: Config, device: torch.device) -> Any:
    images, ids, side, pred = _trial(dtypes, part, device)
    loss, stats = mse(pred, images, None, ids, (1, side, side, 0), 1e-6)
    arguments = torch.ones_like(loss), pred, images, None, ids, stats, (1, side, side, 0)
    return launcher(MSE_GRAD.name, config, mse_grad, *arguments)


GATHER, SPREAD, MSE, MSE_GRAD = (
    register(Kernel(f"patches{fn.__name__}", fn, configs.variants(fn, parts, trial)))
    for fn, parts, trial in (
        (_gather, configs.MOVES, _try_gather),
        (_spread, configs.SPREAD, _try_spread),
        (_mse, configs.MOMENTS, _try_mse),
        (_mse_grad, configs.MOVES, _try_mse_grad),
    )
)
