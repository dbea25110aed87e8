"""The scaled cosine error of predicted latents.

    cos_r = p_r . t_r / (max(|p_r|, 1e-12) max(|t_r|, 1e-12))       loss_r = (1 - cos_r)^gamma

R rows of D features, or the chosen K rows of each of B sequences of L places.
Why: eager makes a normalized copy of both sides, their product, and keeps them all for backward;
of chosen rows it makes a gathered copy first.  Here each row is read where it stands, once each
way, and three numbers a row are kept.  1 - cos is never negative, whatever cos rounds to: at a
perfect prediction the gradient is 0 for gamma > 1, and that of -cos for gamma = 1.
In Triton a program has whole rows and goes over them once; backward has a block of features too:

    dp = -g gamma (1 - cos)^(gamma - 1) (t / |t| - cos p / |p|) / |p|,  without cos where |p| <= EPS

Traffic: pred and target once; backward once more, and their gradients.  Memory-bound.  No atomics.
In place: nothing.  In the kernels capitals are pointers; r is a row of R, k a sequence.
Source: Hou et al. 2022, GraphMAE, arXiv:2205.10803, eq. 2.
"""


# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportOptionalOperand=false
# pyright: reportGeneralTypeIssues=false
# Triton states the types of its functions for its own compiler.

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.autograd import accumulator, finished, first_order
from ..common.checks import check_ids, require_at_least, require_float, require_tensors
from ..common.chunks import row_spans
from ..common.dispatch import declare
from ..common.launch import ROWS, config_by_dtype, kernel_by_dtype, launcher
from ..common.operators import operator
from ..common.rows import gather, rows_of
from ..common.triton import tl, triton
from ..common.tuning import Config

EPS = tl.constexpr(1e-12)
_EPS = 1e-12  # the same in torch


def scaled_cosine_error_reference(pred, target, ids, gamma):
    """The formula, eager, in the dtype it is given: gather, normalize, multiply."""
    if ids is not None:
        places = ids[..., None].expand(*ids.shape, pred.shape[-1])
        pred, target = pred.gather(1, places), target.gather(1, places)
    cos = (F.normalize(pred, dim=-1) * F.normalize(target, dim=-1)).sum(-1)
    return (1 - cos).clamp_min(0).pow(gamma)


def _chunk(x: Tensor, ids: Tensor | None, i: slice, acc: torch.dtype) -> Tensor:
    return (x[i] if ids is None else gather(x[i], ids[i])).to(acc)


def _unit(x: Tensor, norm: Tensor) -> Tensor:
    """Divided, not multiplied by an inverse: a row of one feature becomes exactly 1 or -1."""
    return x / norm.clamp_min(_EPS)[..., None]


def _errors_torch(
    pred: Tensor, target: Tensor, ids: Tensor | None, gamma: float
) -> tuple[Tensor, Tensor]:
    """(1 - cos)^gamma (B, K) and, for the gradients, (3, B, K): cos and both norms; float32."""
    shape = pred.shape[:2] if ids is None else ids.shape
    stats = pred.new_empty(3, *shape, dtype=accumulator(pred.dtype))
    for i in row_spans(pred, shape[1] * pred.shape[2]):
        p, t = (_chunk(x, ids, i, stats.dtype) for x in (pred, target))
        stats[1, i], stats[2, i] = (torch.linalg.vector_norm(x, dim=-1) for x in (p, t))
        cos = torch.linalg.vecdot(_unit(p, stats[1, i]), _unit(t, stats[2, i]))
        stats[0, i] = cos + 0 * stats[1, i] + 0 * stats[2, i]  # NaN of a norm past all numbers
    return (1 - stats[0]).clamp_min_(0).pow_(gamma), stats


def _gradients_torch(
    grad: Tensor,
    pred: Tensor,
    target: Tensor,
    ids: Tensor | None,
    stats: Tensor,
    gamma: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """The gradients to pred and target, each as its own; empty where `needs` says so."""
    made = [
        torch.zeros_like(x, memory_format=torch.contiguous_format) if need else x.new_empty(0)
        for x, need in zip((pred, target), needs, strict=True)
    ]
    for i in row_spans(pred, stats.shape[2] * pred.shape[2]):
        cos = stats[0, i]
        w = grad[i] * -gamma * (1 - cos).clamp_min(0).pow(gamma - 1)
        sides = [
            _unit(_chunk(x, ids, i, stats.dtype), stats[1 + side, i])
            for side, x in enumerate((pred, target))
        ]
        for side, (x, y) in enumerate((sides, sides[::-1])):
            if not needs[side]:
                continue
            norm = stats[1 + side, i]
            along = torch.where(norm > _EPS, cos, 0.0)[..., None]
            d = torch.addcmul(y, x, along, value=-1).mul_((w / norm.clamp_min(_EPS))[..., None])
            if ids is None:
                made[side][i] = d
            else:
                rows = made[side][i].flatten(0, 1)
                rows.index_copy_(0, rows_of(ids[i], pred.shape[1]), d.flatten(0, 1).to(rows.dtype))
    return made[0], made[1]


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


def _forward_triton(
    pred: Tensor, target: Tensor, ids: Tensor | None, gamma: float
) -> tuple[Tensor, Tensor]:
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


def _backward_triton(
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


def _fake_forward(pred, target, ids, gamma):
    shape = pred.shape[:2] if ids is None else ids.shape
    return pred.new_empty(shape, dtype=torch.float32), pred.new_empty(
        3, *shape, dtype=torch.float32
    )


def _fake_backward(grad, pred, target, ids, stats, gamma, needs):
    dp, dt = (x.new_empty(x.shape if n else 0) for x, n in zip((pred, target), needs, strict=True))
    return dp, dt


backends: dict[str, Any] = {
    "torch": SimpleNamespace(errors=_errors_torch, gradients=_gradients_torch),
    "triton": SimpleNamespace(
        errors=operator("scaled_cosine", _forward_triton, _fake_forward),
        gradients=operator("scaled_cosine_gradients", _backward_triton, _fake_backward),
    ),
}


class _ScaledCosine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pred, target, ids, gamma, impl):
        loss, stats = backends[impl].errors(pred, target, ids, gamma)
        ctx.save_for_backward(pred, target, ids, stats)
        ctx.gamma, ctx.impl = gamma, impl
        return finished(loss)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad):
        needs = list(ctx.needs_input_grad[:2])
        made = backends[ctx.impl].gradients(grad, *ctx.saved_tensors, ctx.gamma, needs)
        return *(d if need else None for d, need in zip(made, needs, strict=True)), None, None, None


_ERROR = declare("scaled_cosine_error", _ScaledCosine.apply, scaled_cosine_error_reference)


def scaled_cosine_error(
    pred: Tensor,
    target: Tensor,
    ids: Tensor | None = None,
    *,
    gamma: float = 2.0,
    impl: str = "auto",
) -> Tensor:
    """(1 - cos)^gamma of each row of pred with target's, float32: (N,), (B, L), or (B, K) of ids.

    pred, target: (N, D) or (B, L, D), any float dtype each, the same shape.  ids (B, K) int64 in
    0..L-1, or None for all places: the rows of both that count; a place at most once.  gamma >= 1.
    Gradients to pred and target, zero at places that are not in ids; first order only.  A zero row
    has cos = 0, and the gradient of torch's normalize, which divides by 1e-12.
    impl: "auto", "triton", "torch" or "reference" (makes normalized copies, in the inputs' dtype).
    Raises ValueError for shapes that disagree, gamma < 1, ids out of range or repeated (looked at
    on a CPU, elsewhere with FASTSSL_CHECK=1) and an unknown impl.

    >>> pred, target = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[3.0, 0.0], [4.0, 0]])
    >>> scaled_cosine_error(pred, target)
    tensor([0., 1.])
    """
    require_float(pred=pred, target=target)
    if pred.ndim not in (2, 3) or target.shape != pred.shape:
        got = f"{tuple(pred.shape)} and {tuple(target.shape)}"
        raise ValueError(f"pred and target must both be (N, D) or (B, L, D), got {got}")
    require_at_least(1, gamma=gamma)
    if ids is not None:
        require_tensors(ids=ids)
        if pred.ndim != 3 or ids.ndim != 2 or len(ids) != len(pred) or ids.dtype != torch.int64:
            got = f"{tuple(ids.shape)} {ids.dtype} for {tuple(pred.shape)}"
            raise ValueError(f"ids must be (B, K) int64 for (B, L, D), got {got}")
        check_ids(ids, pred.shape[1])
    whole = (pred, target) if pred.ndim == 3 else (pred[None], target[None])
    loss = _ERROR(impl, *whole, ids, gamma, inputs={"pred": pred, "target": target}).to(
        accumulator(pred.dtype)
    )
    return loss if pred.ndim == 3 else loss[0]


TRIAL = (256, 196, 768)  # sequences, places, features


def _trial(dtype: str, device: torch.device) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(2, *TRIAL, generator=generator, device=device)
    return list(x.to(getattr(torch, dtype)))


def _try_forward(dtype: str, config: Config, device: torch.device) -> Any:
    return launcher(FORWARD.name, config, _forward_triton, *_trial(dtype, device), None, 2.0)


def _try_backward(dtype: str, config: Config, device: torch.device) -> Any:
    pred, target = _trial(dtype, device)
    loss, stats = _forward_triton(pred, target, None, 2.0)
    arguments = torch.ones_like(loss), pred, target, None, stats, 2.0, [True, True]
    return launcher(BACKWARD.name, config, _backward_triton, *arguments)


def _config(rows: int, columns: int, warps: int) -> Config:
    return Config({"BLOCK_R": rows, "BLOCK_D": columns}, warps, 2)


# Sizes and strides are taken to be divisible by 16, features adjacent, ids to be given.
_TYPES = {"P": ROWS, "T": ROWS, "IDS": "*i64:16", "STATS": "*fp32:16", "n": "i32", "D": "i32:16"}
_TYPES |= {name: "i32:16" for name in ("R", "p_k", "p_r", "t_k", "t_r")} | {"gamma": "fp32"}
_CONSTANTS = {"SQUARE": True, "p_d": 1, "t_d": 1}
_GRADS = {"G": "*fp32:16", "DP": ROWS, "DT": ROWS, "L": "i32", "g_k": "i32", "g_r": "i32"}
FORWARD = kernel_by_dtype(
    "scaled_cosine_forward",
    _forward,
    {**_TYPES, "LOSS": "*fp32:16"},
    _CONSTANTS,
    [_config(4, 256, 4), _config(4, 512, 8)],
    _try_forward,
)
BACKWARD = kernel_by_dtype(
    "scaled_cosine_backward",
    _backward,
    {**_TYPES, **_GRADS},
    _CONSTANTS,
    [_config(8, 256, 4), _config(4, 512, 4)],
    _try_backward,
)
