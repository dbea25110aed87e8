"""The Triton kernels of patches as operators of torch: what `patches.py` builds on.

They are the functions of `patches_torch`, by the same names; torch.compile keeps each whole in its
graph.  They know no gradient: `patches.py` has it.  Images (B, C, T, H, W) are in float32,
bfloat16, float16 or uint8, predictions and results in the same, in any layout; norm is (2, C)
float32, ids are (B, K) int64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ..common.tuning import Config, Kernel, config_for, forced, register
from . import patches_configs as configs
from . import patches_triton as fused
from .patches_torch import KINDS, Spec

operator = torch.library.custom_op


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


@operator("fastssl::patches_gathered", mutates_args=())
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


@operator("fastssl::patches_spread", mutates_args=())
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


@operator("fastssl::patches_mse", mutates_args=())
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


@operator("fastssl::patches_mse_grad", mutates_args=())
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


def error(
    pred: Tensor, images: Tensor, norm: Tensor | None, ids: Tensor, spec: Spec, keep: bool
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The loss of each patch, (B, K), and what `gradient` needs."""
    loss, stats = mse(pred, images, norm, ids, _numbers(spec), spec.eps)
    return loss, (pred, images, norm, ids, stats)


def gradient(grad: Tensor, saved: tuple[Tensor, ...], spec: Spec) -> Tensor:
    """The gradient to pred, given that of each patch's loss."""
    return mse_grad(grad, *saved, _numbers(spec))


def _numbers(spec: Spec) -> list[int]:
    return [*spec.patch, KINDS.index(spec.kind)]


@gather.register_fake
def _(images, norm, ids, patch, dtype):
    return images.new_empty(*ids.shape, images.shape[1] * math.prod(patch), dtype=dtype)


@spread.register_fake
def _(grad, norm, ids, patch, shape, dtype):
    return grad.new_empty(shape, dtype=dtype)


@mse.register_fake
def _(pred, images, norm, ids, spec, eps):
    loss = pred.new_empty(ids.shape, dtype=torch.float32)
    return loss, loss.new_empty((*ids.shape, 2) if eps is not None else (0,))


@mse_grad.register_fake
def _(grad, pred, images, norm, ids, stats, spec):
    return pred.new_empty(pred.shape)


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


GATHER = _registered("patches_gather", fused.gather, configs.MOVES, _try_gather)
SPREAD = _registered("patches_spread", fused.spread, configs.SPREAD, _try_spread)
MSE = _registered("patches_mse", fused.mse, configs.MOMENTS, _try_mse)
MSE_GRAD = _registered("patches_mse_grad", fused.mse_grad, configs.MOVES, _try_mse_grad)
