"""The scaled cosine error of predicted latents.

    cos_r = p_r . t_r / (max(|p_r|, 1e-12) max(|t_r|, 1e-12))       loss_r = (1 - cos_r)^gamma

R rows of D features, or the chosen K rows of each of B sequences of L places.
Why: eager makes a normalized copy of both sides, their product, and keeps them all for backward;
of chosen rows it makes a gathered copy first.  Here each row is read where it stands, once each
way, and three numbers a row are kept.  1 - cos is never negative, whatever cos rounds to: at a
perfect prediction the gradient is 0 for gamma > 1, and that of -cos for gamma = 1.
Traffic: pred and target once; backward once more, and their gradients.  Memory-bound.  In
place: nothing.
Source: Hou et al. 2022, GraphMAE, arXiv:2205.10803, eq. 2.
"""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.autograd import FirstOrder, accumulator, finished, first_order
from ..common.checks import check_ids, require_at_least, require_float, require_tensors
from ..common.chunks import row_spans
from ..common.dispatch import declare
from ..common.operators import launches
from ..common.rows import gather, rows_of

EPS = 1e-12


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
    return x / norm.clamp_min(EPS)[..., None]


def _errors(
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


def _gradients(
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
            along = torch.where(norm > EPS, cos, 0.0)[..., None]
            d = torch.addcmul(y, x, along, value=-1).mul_((w / norm.clamp_min(EPS))[..., None])
            if ids is None:
                made[side][i] = d
            else:
                rows = made[side][i].flatten(0, 1)
                rows.index_copy_(0, rows_of(ids[i], pred.shape[1]), d.flatten(0, 1).to(rows.dtype))
    return made[0], made[1]


def _fake_errors(pred, target, ids, gamma):
    loss = pred.new_empty(pred.shape[:2] if ids is None else ids.shape, dtype=torch.float32)
    return loss, loss.new_empty(3, *loss.shape)


def _fake_gradients(grad, pred, target, ids, stats, gamma, needs):
    dp, dt = (x.new_empty(x.shape if n else 0) for x, n in zip((pred, target), needs, strict=True))
    return dp, dt


_TORCH = SimpleNamespace(errors=_errors, gradients=_gradients)
_TRITON = launches(
    f"{__package__}.cosine_triton", _TORCH, errors=_fake_errors, gradients=_fake_gradients
)
backends = {"torch": _TORCH, "triton": _TRITON}


class _ScaledCosine(FirstOrder):
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


_ERROR = declare("scaled_cosine_error", _ScaledCosine.call, scaled_cosine_error_reference)


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
