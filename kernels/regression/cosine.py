"""The scaled cosine error of predicted latents.

    cos_r = p_r . t_r / (max(|p_r|, 1e-12) max(|t_r|, 1e-12))       loss_r = (1 - cos_r)^gamma

R rows of D features, or the chosen K rows of each of B sequences of L places.
Why: eager makes a normalised copy of both sides, their product, and keeps them all for backward;
of chosen rows it makes a gathered copy first.  Here each row is read where it stands, once each
way, and three numbers a row are kept.  1 - cos is never negative, whatever cos rounds to: at a
perfect prediction the gradient is 0 for gamma > 1, and that of -cos for gamma = 1.
Traffic: pred and target once; backward once more, and their gradients.  Memory-bound.
In place: nothing.
Source: Hou et al. 2022, GraphMAE, arXiv:2205.10803, eq. 2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.checks import check_ids
from ..common.dispatch import accumulator, declare, finished, first_order, require_float
from ..correlation.moments import by_engine, implementation
from ..pairwise.masks import twins
from . import cosine_torch

engines: dict[str, Any] = {"torch": cosine_torch}
if twins is not None:
    from . import cosine_ops

    engines["triton"] = cosine_ops


def scaled_cosine_error_reference(pred, target, ids, gamma):
    """The formula, eager, in the dtype it is given: gather, normalise, multiply."""
    if ids is not None:
        places = ids[..., None].expand(*ids.shape, pred.shape[-1])
        pred, target = pred.gather(1, places), target.gather(1, places)
    cos = (F.normalize(pred, dim=-1) * F.normalize(target, dim=-1)).sum(-1)
    return (1 - cos).clamp_min(0).pow(gamma)


class _ScaledCosine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pred, target, ids, gamma, impl):
        loss, stats = engines[impl].errors(pred, target, ids, gamma)
        ctx.save_for_backward(pred, target, ids, stats)
        ctx.gamma, ctx.impl = gamma, impl
        return finished(loss)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad):
        needs = list(ctx.needs_input_grad[:2])
        made = engines[ctx.impl].gradients(grad, *ctx.saved_tensors, ctx.gamma, needs)
        return *(d if need else None for d, need in zip(made, needs, strict=True)), None, None, None


_ERROR = declare(
    "scaled_cosine_error", **by_engine(_ScaledCosine.apply, scaled_cosine_error_reference)
)


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
    impl: "auto", "triton", "torch" or "reference" (makes normalised copies, in the inputs' dtype).
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
    if not gamma >= 1:
        raise ValueError(f"gamma must be >= 1, got {gamma}")
    if ids is not None:
        if pred.ndim != 3 or ids.ndim != 2 or len(ids) != len(pred) or ids.dtype != torch.int64:
            got = f"{tuple(ids.shape)} {ids.dtype} for {tuple(pred.shape)}"
            raise ValueError(f"ids must be (B, K) int64 for (B, L, D), got {got}")
        check_ids(ids, pred.shape[1])
    for name, x in (("pred", pred), ("target", target)):
        impl = implementation(impl, name, x)
    whole = (pred, target) if pred.ndim == 3 else (pred[None], target[None])
    loss = _ERROR(impl, pred.device, *whole, ids, gamma).to(accumulator(pred.dtype))
    return loss if pred.ndim == 3 else loss[0]
