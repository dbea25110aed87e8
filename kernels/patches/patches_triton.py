"""Patches straight from pixels in Triton: kernels, and the launches that patches_ops.py declares.

    patch n = b K + k of image b, at place ids_bk of the grid (gt, gh, gw); its values p in 0..P-1
    x_np   p = ((t PH + y) PW + x) C + c: the pixel (t, y, x) of the patch, channel c
    NORM   (2, C) or none: x_np becomes (x_np - NORM_0c) NORM_1c
    z_np = x_np - x_n0      y_np = (z_np - mean_n) inv_n, mean and inverse deviation those of z_n
    loss_n = mean_p f(pred_np - y_np)      d_np = g_n f'(pred_np - y_np) / P      f: see patches.py

A program has a block of patches and of values.  Where a value stands in a patch is the same for all
patches, so it is worked out once a block (the sides are known when a kernel is compiled), and where
a patch stands once a patch.  Neighbouring lanes read the channels' planes in turn and each plane
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

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportOptionalOperand=false
# Triton states the types of its functions for its own compiler: tl.sum "may return a tuple".

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.triton import tl, triton
from ..common.tuning import Config, Kernel, config_for, forced, register
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
    """x in float32, normalised by its channel."""
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
    """A launch of a kernel's class for images, or what stands in their layout, over N patches."""

    def __init__(
        self, kernel: Kernel, images: Tensor, patch: Sequence[int], result: Tensor, part: str
    ) -> None:
        name = configs.shape_class(images.dtype, result.dtype, part)
        self.fn, self.images, (pt, ph, pw) = kernel.fn, images, patch
        config = config_for(kernel, name, images.device)
        self.blocks, C = config.blocks, images.shape[1]
        self.P = C * pt * ph * pw
        s_b, s_c, s_t, s_h, s_w = images.stride()
        reach = (C - 1) * s_c + (pt - 1) * s_t + (ph - 1) * s_h + (pw - 1) * s_w
        given = {"P": self.P, "gh": images.shape[3] // ph, "gw": images.shape[4] // pw}
        given |= {"s_b": s_b, "s_c": s_c, "s_t": s_t, "s_h": s_h, "s_w": s_w}
        given |= {"C": C, "PT": pt, "PH": ph, "PW": pw, "WIDE": reach >= 2**31}
        known = {n: value for n, value in given.items() if n in self.fn.arg_names}
        self.given = {**known, **config.blocks, **config.options}

    def __call__(self, N: int, over_values: bool = True, **given: Any) -> None:
        values = triton.cdiv(self.P, self.blocks["BLOCK_P"]) if over_values else 1
        grid = triton.cdiv(N, self.blocks["BLOCK_N"]), values
        if N:
            with torch.cuda.device_of(self.images):
                self.fn[grid](N=N, **given, **self.given)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def gather(
    images: Tensor, norm: Tensor | None, ids: Tensor, patch: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """(B, K, P) in `dtype`; with norm x becomes (x - norm_0c) * norm_1c."""
    P = images.shape[1] * math.prod(patch)
    out = torch.empty(*ids.shape, P, dtype=dtype, device=images.device)
    launch = _Launch(GATHER, images, patch, out, configs.moved(P))
    launch(
        ids.numel(), IMAGES=images, NORM=_contiguous(norm), IDS=ids.contiguous(), OUT=out,
        K=ids.shape[1],
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
    g_b, g_k, g_p = grad.stride()
    launch(
        len(out) * L, G=grad, NORM=_contiguous(norm), IDS=ids.contiguous(), OUT=out, L=L,
        K=ids.shape[1], g_b=g_b, g_k=g_k, g_p=g_p,
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
    launch = _Launch(MSE, images, spec[:3], pred, configs.measured(pred.shape[2]))
    p_b, p_k, p_p = pred.stride()
    launch(
        ids.numel(), False, PRED=pred, IMAGES=images, NORM=_contiguous(norm), IDS=ids.contiguous(),
        LOSS=loss, STATS=stats, K=ids.shape[1], eps=eps or 0.0, p_b=p_b, p_k=p_k, p_p=p_p,
        KIND=spec[3], NORM_PIX=eps is not None, HELD=launch.P <= launch.blocks["BLOCK_P"],
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
    (g_b, g_k), (p_b, p_k, p_p) = grad.stride(), pred.stride()
    launch(
        ids.numel(), G=grad, PRED=pred, IMAGES=images, NORM=_contiguous(norm),
        IDS=ids.contiguous(), STATS=stats, D_PRED=d_pred, K=ids.shape[1], g_b=g_b, g_k=g_k,
        p_b=p_b, p_k=p_k, p_p=p_p, KIND=spec[3], NORM_PIX=stats.ndim == 3,
    )  # fmt: skip
    return d_pred


Launch = Callable[[], Any]


def _result(dtypes: str) -> torch.dtype:
    return getattr(torch, dtypes.rpartition("-")[2])


def _try_gather(dtypes: str, part: str, config: Config, device: torch.device) -> Launch:
    images, ids, side = configs.trial_images(dtypes, part, device)

    def run() -> Tensor:
        with forced(GATHER.name, config):
            return gather(images[:, :, None], None, ids, (1, side, side), _result(dtypes))

    return run


def _try_spread(dtypes: str, part: str, config: Config, device: torch.device) -> Launch:
    images, ids, side = configs.trial_images(dtypes, part, device)
    images, patch = images[:, :, None], (1, side, side)
    grad = gather(images, None, ids, patch, images.dtype)

    def run() -> Tensor:
        with forced(SPREAD.name, config):
            return spread(grad, None, ids, patch, images.shape, images.dtype)

    return run


def _trial_pred(dtypes: str, ids: Tensor, P: int) -> Tensor:
    generator = torch.Generator(ids.device).manual_seed(1)
    pred = torch.randn(*ids.shape, P, generator=generator, device=ids.device)
    return pred.to(_result(dtypes))


def _try_mse(dtypes: str, part: str, config: Config, device: torch.device) -> Launch:
    images, ids, side = configs.trial_images(dtypes, part, device)
    pred = _trial_pred(dtypes, ids, 3 * side * side)

    def run() -> tuple[Tensor, Tensor]:
        with forced(MSE.name, config):
            return mse(pred, images[:, :, None], None, ids, (1, side, side, 0), 1e-6)

    return run


def _try_mse_grad(dtypes: str, part: str, config: Config, device: torch.device) -> Launch:
    images, ids, side = configs.trial_images(dtypes, part, device)
    pred, images, spec = (
        _trial_pred(dtypes, ids, 3 * side * side),
        images[:, :, None],
        (1, side, side, 0),
    )
    loss, stats = mse(pred, images, None, ids, spec, 1e-6)

    def run() -> Tensor:
        with forced(MSE_GRAD.name, config):
            return mse_grad(torch.ones_like(loss), pred, images, None, ids, stats, spec)

    return run


def _registered(name: str, fn: Any, parts: Any, trial: Any) -> Kernel:
    return register(Kernel(name, fn, configs.variants(fn, parts, trial)))


GATHER = _registered("patches_gather", _gather, configs.MOVES, _try_gather)
SPREAD = _registered("patches_spread", _spread, configs.SPREAD, _try_spread)
MSE = _registered("patches_mse", _mse, configs.MOMENTS, _try_mse)
MSE_GRAD = _registered("patches_mse_grad", _mse_grad, configs.MOVES, _try_mse_grad)
