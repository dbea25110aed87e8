"""The cross-entropy of a student's distributions with a teacher's, from features and prototypes.

    s_v = x_v w^T / a      t_t = (y_t u^T - c) / b      p_v = softmax(s_v)      q_t = softmax(t_t)
    loss_v = sum_t m_vt CE(q_t, p_v) = sum_t m_vt (lse(s_v) - q_t . s_v)
    ds_v = g_v / a (m_v p_v - sum_t m_vt q_t)      dx_v = ds_v w      dw = sum_v ds_v^T x_v

V views of R rows of D features by the student, x, and T by the teacher, y, with any number of
features of its own; K prototypes on each side, w and u; m says which views are compared.
Why: eager holds the student's logits, the teacher's and what `soft` says of them, R x K each: of
3,760 masked tokens and 65,536 prototypes a gigabyte a copy.  Here no more logits are there at once
than a part of w, or on a GPU none but the tiles that a program works on.
In units of 2 R K D operations: eager 4 (of one view), and its memory; torch 4 where the gradient is
made with the loss, else 6; the Triton tiles 8, the gradients to x and to w each by themselves.
Traffic: in torch w and dw once for each chunk of rows, in Triton w once for each row of tiles,
mostly from L2.  Compute-bound.  In place: nothing.
A prototype's norm, as of weight normalization, is its w's: give w = g v / |v|.
Source: Caron et al. 2021, DINO, arXiv:2104.14294, algorithm 1; Oquab et al. 2023, DINOv2,
arXiv:2304.07193, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.autograd import FirstOrder, accumulator, ahead, finished, first_order
from ..common.checks import (
    can_read_values,
    check_ids,
    check_index,
    check_pair,
    require_features,
    require_float,
)
from ..common.dispatch import declare
from ..common.operators import launches
from ..tokens import gather_tokens
from . import linear_torch
from .linear_torch import Sides, Slopes, sweep
from .soft import Pairs, check_center, check_temps, soft_cross_entropy_reference


def linear_soft_cross_entropy_reference(x, w, teacher_x, teacher_w, center, pairs, a, b):
    """The formula, eager, in the dtype it is given; a, b: 1 / temperature."""
    return soft_cross_entropy_reference(x @ w.T, teacher_x @ teacher_w.T, center, pairs, a, b)


def _fake_cross_entropies(x, w, teacher_x, teacher_w, center, pairs, sharp_s, sharp_t):
    loss = x.new_empty(x.shape[:2], dtype=torch.float32)
    return loss, loss.new_empty(2, 2, x.shape[1])


def _fake_gradients(grad, stats, need_x, need_w, x, w, *rest):
    made = (x.new_empty(z.shape if n else 0) for z, n in ((x, need_x), (w, need_w)))
    return tuple(z.float() for z in made)


_TRITON = launches(
    f"{__package__}.linear_triton",
    linear_torch,
    cross_entropies=_fake_cross_entropies,
    gradients=_fake_gradients,
)
backends = {"torch": linear_torch, "triton": _TRITON}


class _LinearSoftCrossEntropy(FirstOrder):
    @staticmethod
    def forward(ctx: Any, x, w, teacher_x, teacher_w, center, pairs, sharp_s, sharp_t, impl):
        flat = [float(m) for row in pairs for m in row]
        ctx.rest, ctx.impl = (flat, sharp_s, sharp_t), impl
        sides = x, w, teacher_x, teacher_w, center
        loss, stats = backends[impl].cross_entropies(*sides, *ctx.rest)
        ctx.save_for_backward(stats, *sides)
        return finished(loss)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad):
        (stats, *sides), need = ctx.saved_tensors, ctx.needs_input_grad[:2]
        made = backends[ctx.impl].gradients(grad, stats, *need, *sides, *ctx.rest)
        wanted = zip(made, sides, need, strict=False)
        return *(g.to(z.dtype) if n else None for g, z, n in wanted), *[None] * 7


_LINEAR = declare(
    "linear_soft_cross_entropy",
    _LinearSoftCrossEntropy.call,
    linear_soft_cross_entropy_reference,
)


def linear_soft_cross_entropy(
    x: Tensor,
    w: Tensor,
    teacher_x: Tensor,
    teacher_w: Tensor,
    *,
    assign: Tensor | None = None,
    student_temp: float = 0.1,
    teacher_temp: float = 0.04,
    rows: Tensor | None = None,
    weight: Tensor | None = None,
    pairs: Pairs | None = None,
    reduction: str = "none",
    impl: str = "auto",
) -> Tensor:
    """`soft_cross_entropy` of logits x w^T and teacher_x teacher_w^T, which are never stored:
    (R,), or (V, R) of several views; float32, in nats.

    x (R, D) and w (K, D), teacher_x (R, E) and teacher_w (K, E): rows of features and prototypes,
    any float dtype, one on each side.  Or x (V, R, D) and teacher_x (T, R, E): V and T views, where
    pairs, V rows of T numbers, weighs the cross-entropy of each of the one with each of the other.
    assign: K numbers in any shape, or (T, K), that are taken off the teacher's logits: a center, or
    what `linear_sinkhorn` gives.  rows: (N,) int64, the rows to take, of both sides: the masked
    tokens, R is then N; a row may be there often, e.g. with weight 0 up to a fixed N.  weight:
    (R,), by which each row's is multiplied.  reduction: "none", or "sum" over rows and views.
    Gradient to x and w, summed in float32, in their dtype; none to anything else; first order only.
    On a CPU "sum" makes it with the loss, and backward only multiplies: 4 products rather than 6.
    impl: "auto", "triton", "torch" or "reference" (holds the logits, in the inputs' dtype).  Triton
    takes one view and one of the teacher; more are torch's under auto.
    float64 is summed and returned in float64, by torch and the reference alone.
    Raises ValueError for shapes, dtypes or devices that disagree, a row out of range (looked at on
    a CPU, elsewhere with FASTSSL_CHECK=1), a temperature <= 0, an unknown reduction or impl.

    >>> x, w = torch.zeros(2, 3), torch.zeros(4, 3)  # a student that knows nothing: log 4
    >>> linear_soft_cross_entropy(x, w, torch.eye(3)[:2], torch.eye(3)[[0, 1, 2, 2]])
    tensor([1.3863, 1.3863])
    """
    one = _check_ranks(x, w, teacher_x, teacher_w, pairs)
    if one:
        x, teacher_x, pairs = x[None], teacher_x[None], ((1.0,),)
    if rows is not None:
        named = ("x", x), ("teacher_x", teacher_x)
        x, teacher_x = (_taken(side, rows, name) for name, side in named)
    _check(x, w, teacher_x, teacher_w, assign, student_temp, teacher_temp)
    if pairs is None or len(pairs) != len(x) or any(len(row) != len(teacher_x) for row in pairs):
        want = f"{len(x)} rows of {len(teacher_x)} numbers"
        raise ValueError(f"pairs must be {want}, got {pairs!r}")
    if weight is not None and (weight.shape != x.shape[1:2] or weight.device != x.device):
        got = f"{tuple(weight.shape)} on {weight.device}"
        raise ValueError(f"weight must be ({x.shape[1]},) on {x.device}, got {got}")
    if reduction not in ("none", "sum"):
        raise ValueError(f"reduction must be 'none' or 'sum', got {reduction!r}")
    problem, sides = "", (len(x), len(teacher_x))
    if sides != (1, 1):
        problem = f"impl='triton' is for one view of each side, got {sides[0]} and {sides[1]}"
    center = None if assign is None else assign.detach().reshape(-1, len(w))
    weight = None if weight is None else weight.detach()
    sharp = 1 / student_temp, 1 / teacher_temp
    frozen = teacher_x.detach(), teacher_w.detach(), center
    inputs = {"x": x, "teacher_x": teacher_x}
    chosen = _LINEAR.choose_for(impl, inputs, problem)
    if reduction == "sum" and chosen == "torch" and x.is_cpu and can_read_values(x):
        flat = [float(m) for row in pairs for m in row]
        return _ahead(x, w, (*frozen, flat, *sharp), weight)
    arguments = x, w, *frozen, tuple(map(tuple, pairs)), *sharp
    loss = _LINEAR(impl, *arguments, inputs=inputs, problem=problem)
    loss = loss if weight is None else loss * weight
    return loss.sum() if reduction == "sum" else loss[0] if one else loss


def _ahead(x: Tensor, w: Tensor, rest: tuple[Any, ...], weight: Tensor | None) -> Tensor:
    """The weighted sum over rows and views, its gradients made with it."""

    def run(sides: Sequence[Tensor], need: Sequence[bool]) -> tuple[Tensor, Sequence[Tensor]]:
        of = Sides(sides[0], sides[1], *rest)
        each = of.x.new_ones((), dtype=accumulator(of.x.dtype)) if weight is None else weight
        each = each.to(accumulator(of.x.dtype)).expand(of.x.shape[:2])
        slopes, loss = Slopes(of, each, need) if any(need) else None, torch.empty_like(each)
        sweep(of, loss, slopes)
        return (loss * each).sum(), (loss, loss) if slopes is None else slopes.done()

    return ahead(run, x, w)


def _taken(x: Tensor, rows: Tensor, name: str) -> Tensor:
    """The rows of (V, R, D), by index."""
    check_index("rows", rows, "(N,)", **{name: x})
    check_ids(rows, x.shape[1], "rows", repeats=True)
    return gather_tokens(x, rows.expand(len(x), -1))


def _check_ranks(
    x: Tensor, w: Tensor, teacher_x: Tensor, teacher_w: Tensor, pairs: Pairs | None
) -> bool:
    """Whether x has one view without saying so, after refusing what has no such shape."""
    require_float(x=x, w=w, teacher_x=teacher_x, teacher_w=teacher_w)
    if x.ndim not in (2, 3) or x.ndim != teacher_x.ndim:
        got = f"{tuple(x.shape)} and {tuple(teacher_x.shape)}"
        raise ValueError(
            f"x and teacher_x must be (R, D) and (R, E), or of V and T views, got {got}"
        )
    if x.ndim == 2 and pairs is not None:
        raise ValueError(f"pairs is for x (V, R, D), got {tuple(x.shape)}")
    return x.ndim == 2


def _check(
    x: Tensor,
    w: Tensor,
    teacher_x: Tensor,
    teacher_w: Tensor,
    assign: Tensor | None,
    student_temp: float,
    teacher_temp: float,
) -> None:
    check_prototypes(x, w, ("x", "w"))
    check_prototypes(teacher_x, teacher_w, ("teacher_x", "teacher_w"))
    if len(w) != len(teacher_w):
        raise ValueError(
            f"w and teacher_w must have as many prototypes, got {len(w)} and {len(teacher_w)}"
        )
    if x.device != teacher_x.device or x.shape[1] != teacher_x.shape[1]:
        got = f"{x.shape[1]} on {x.device} and {teacher_x.shape[1]} on {teacher_x.device}"
        raise ValueError(f"x and teacher_x must share rows and device, got {got}")
    check_center("assign", assign, (len(teacher_x), len(w)), x.device)
    check_temps(student_temp=student_temp, teacher_temp=teacher_temp)


def check_prototypes(x: Tensor, w: Tensor, names: tuple[str, str]) -> None:
    """Refuse rows (..., D) and prototypes (K, D) that are not of one dtype, device and D."""
    check_pair(x, w, names)
    if w.ndim != 2 or x.shape[-1] != w.shape[1] or len(w) == 0:
        got = f"{tuple(w.shape)} for {names[0]} {tuple(x.shape)}"
        raise ValueError(f"{names[1]} must be (K, {x.shape[-1]}), got {got}")
    require_features(**{names[0]: x})
