"""The scaled cosine error in Triton, by the functions that cosine.py has in torch.

A program has whole rows and goes over them once; backward has a block of features too:

    dp = -g gamma (1 - cos)^(gamma - 1) (t / |t| - cos p / |p|) / |p|,  without cos where |p| <= EPS

No atomics.  In the kernels capitals are pointers; r is a row of R, k a sequence.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import (
    ROWS,
    Part,
    config_by_dtype,
    configs,
    kernel_by_part,
    launcher,
    named,
    random,
)
from ..common.tuning import Config

EPS = tl.constexpr(1e-12)


@triton.jit
def _places(IDS, r, R, n):
    """The sequence and the place of each row; n rows a sequence."""
    if IDS is None:
        return r // n, r % n
    else:
        return r // n, tl.load(IDS + r, r < R, 0)


@triton.jit
def _power(e, gamma, SQUARE: tl.constexpr):
    """e^gamma, and its derivative, for e >= 0; at 0 that is 1 for gamma = 1, else 0."""
    if SQUARE:
        return e * e, 2.0 * e
    else:
        at_zero = tl.where(gamma == 1.0, 1.0, 0.0)
        slope = tl.exp2((gamma - 1.0) * tl.log2(tl.where(e > 0.0, e, 1.0)))
        slope = tl.where(e == 0.0, at_zero, slope)
        return e * slope, gamma * slope


@triton.jit
def _forward(
    P, T, IDS, LOSS, STATS, R, n, D, gamma, p_k, p_r, p_d, t_k, t_r, t_d,
    SQUARE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    k, place = _places(IDS, r, R, n)
    P += (k * p_k + place * p_r)[:, None]
    T += (k * t_k + place * t_r)[:, None]
    pp = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    tt, pt = pp, pp
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        here = (r < R)[:, None] & (d < D)[None, :]
        p = tl.load(P + d.to(tl.int64)[None, :] * p_d, here, 0.0).to(tl.float32)
        t = tl.load(T + d.to(tl.int64)[None, :] * t_d, here, 0.0).to(tl.float32)
        pp += p * p
        tt += t * t
        pt += p * t
    p_norm = tl.sqrt_rn(tl.sum(pp, 1))
    t_norm = tl.sqrt_rn(tl.sum(tt, 1))
    cos = tl.div_rn(tl.sum(pt, 1), tl.maximum(p_norm, EPS))
    cos = tl.div_rn(cos, tl.maximum(t_norm, EPS))
    e = tl.where(cos > 1.0, 0.0, 1.0 - cos)
    loss, _ = _power(e, gamma, SQUARE)
    tl.store(LOSS + r, loss, r < R)
    tl.store(STATS + r, cos, r < R)
    tl.store(STATS + R + r, p_norm, r < R)
    tl.store(STATS + 2 * R + r, t_norm, r < R)


@triton.jit
def _backward(
    G, P, T, IDS, STATS, DP, DT, R, n, L, D, gamma, g_k, g_r, p_k, p_r, p_d, t_k, t_r, t_d,
    SQUARE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """DP and DT (sequences, L, D): rows at their places."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row, here = r < R, (r < R)[:, None] & (d < D)[None, :]
    k, place = _places(IDS, r, R, n)
    cos = tl.load(STATS + r, row, 0.0)
    p_norm, t_norm = tl.load(STATS + R + r, row, 1.0), tl.load(STATS + 2 * R + r, row, 1.0)
    _, slope = _power(tl.where(cos > 1.0, 0.0, 1.0 - cos), gamma, SQUARE)
    w = -slope * tl.load(G + k * g_k + (r % n) * g_r, row, 0.0)
    in_p = tl.div_rn(1.0, tl.maximum(p_norm, EPS))
    in_t = tl.div_rn(1.0, tl.maximum(t_norm, EPS))
    feature = d.to(tl.int64)[None, :]
    p = tl.load(P + (k * p_k + place * p_r)[:, None] + feature * p_d, here, 0.0).to(tl.float32)
    t = tl.load(T + (k * t_k + place * t_r)[:, None] + feature * t_d, here, 0.0).to(tl.float32)
    p, t = p * in_p[:, None], t * in_t[:, None]
    out = ((k * L + place) * D)[:, None] + d[None, :]
    if DP is not None:
        along = tl.where(p_norm > EPS, cos, 0.0)[:, None]
        dp = (t - along * p) * (w * in_p)[:, None]
        tl.store(DP + out, dp.to(DP.dtype.element_ty), here)
    if DT is not None:
        along = tl.where(t_norm > EPS, cos, 0.0)[:, None]
        dt = (p - along * t) * (w * in_t)[:, None]
        tl.store(DT + out, dt.to(DT.dtype.element_ty), here)


def errors(pred: Tensor, target: Tensor, ids: Tensor | None, gamma: float) -> tuple[Tensor, Tensor]:
    (B, n, D) = pred.shape if ids is None else (*ids.shape, pred.shape[2])
    loss = pred.new_empty(B, n, dtype=torch.float32)
    stats, config = loss.new_empty(3, B, n), config_by_dtype(FORWARD, pred)
    if loss.numel():
        with torch.cuda.device_of(pred):
            _forward[(triton.cdiv(B * n, config.blocks["BLOCK_R"]),)](
                pred, target, None if ids is None else ids.contiguous(), loss, stats, B * n, n, D,
                float(gamma), *pred.stride(), *target.stride(), SQUARE=gamma == 2,
                **config.arguments,
            )  # fmt: skip
    return loss, stats


def gradients(
    grad: Tensor,
    pred: Tensor,
    target: Tensor,
    ids: Tensor | None,
    stats: Tensor,
    gamma: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    (B, L, D), n, config = pred.shape, stats.shape[2], config_by_dtype(BACKWARD, pred)
    fresh = torch.empty_like if ids is None else torch.zeros_like
    dp, dt = (
        fresh(x, memory_format=torch.contiguous_format) if need else None
        for x, need in zip((pred, target), needs, strict=True)
    )
    grid = triton.cdiv(B * n, config.blocks["BLOCK_R"]), triton.cdiv(D, config.blocks["BLOCK_D"])
    if 0 not in grid:
        with torch.cuda.device_of(pred):
            _backward[grid](
                grad, pred, target, None if ids is None else ids.contiguous(), stats, dp, dt, B * n,
                n, L, D, float(gamma), *grad.stride(), *pred.stride(), *target.stride(),
                SQUARE=gamma == 2, **config.arguments,
            )  # fmt: skip
    return pred.new_empty(0) if dp is None else dp, target.new_empty(0) if dt is None else dt


TRIAL = (256, 196, 768)  # sequences, places, features


def _try_forward(dtype: str, part: str, config: Config, device: torch.device) -> Any:
    return launcher(FORWARD.name, config, errors, *random(dtype, device, 2, *TRIAL), None, 2.0)


def _try_backward(dtype: str, part: str, config: Config, device: torch.device) -> Any:
    pred, target = random(dtype, device, 2, *TRIAL)
    loss, stats = errors(pred, target, None, 2.0)
    arguments = torch.ones_like(loss), pred, target, None, stats, 2.0, [True, True]
    return launcher(BACKWARD.name, config, gradients, *arguments)


# Sizes and strides are taken to be divisible by 16, features adjacent, ids to be given.
TYPES = named("i32:16", "R D p_k p_r t_k t_r") | named("i32", "n L g_k g_r")
TYPES |= named("*fp32:16", "STATS LOSS G") | named(ROWS, "P T DP DT")
TYPES |= {"IDS": "*i64:16", "gamma": "fp32"}
CONSTANTS = {"SQUARE": True, "p_d": 1, "t_d": 1}
READS = Part(CONSTANTS, configs("BLOCK_R BLOCK_D", [(4, 256, 4, 2), (4, 512, 8, 2)]))
WRITES = Part(CONSTANTS, configs("BLOCK_R BLOCK_D", [(8, 256, 4, 2), (4, 512, 4, 2)]))
FORWARD = kernel_by_part("scaled_cosine_forward", _forward, TYPES, {"": READS}, _try_forward)
BACKWARD = kernel_by_part("scaled_cosine_backward", _backward, TYPES, {"": WRITES}, _try_backward)
