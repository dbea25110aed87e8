"""Sinkhorn's assignment of rows to prototypes that are all used alike, in the log domain.

    q_rk = softmax_k(t_rk / temp - f_k),     f_k such that sum_r q_rk is nearly R / K

Alternately every prototype's and every row's numbers are scaled to one sum; the last step is the
rows'.  Kept is f alone, a number a prototype, by which the assignment is a softmax like any
other: temp f is a center (`soft_cross_entropy`).
Why: eager makes exp(t / temp), which overflows above 88, and goes over all of it twice an
iteration; here each iteration is a softmax of some rows at a time, and the sum of its columns.
Of features and prototypes (`linear_sinkhorn`) no more scores are there than of some rows.
Traffic: the scores once an iteration.  In place: nothing.
Ranks: rows are those of all ranks, as many or as few on each: two numbers a prototype are gathered
once, and one is summed in every iteration but the first.
Source: Caron et al. 2020, SwAV, arXiv:2006.09882, section 3.1; Oquab et al. 2023, DINOv2,
arXiv:2304.07193, section 4: three iterations.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.distributed import LOCAL, Group, all_gather_nograd, all_reduce_sum, world_size

from ..common.autograd import accumulator, full_precision
from ..common.checks import check_ids, check_index, require_features, require_float
from ..common.chunks import rows_in_budget, spans
from ..common.matmul import product
from .linear import check_prototypes
from .linear_torch import is_narrow, rows_at_once

CHUNK = 1 << 20  # scores that columns are summed of at once


def sinkhorn_reference(scores: Tensor, temp: float, iterations: int = 3) -> Tensor:
    """The assignment (R, K) of one process by the authors' steps: scale columns, scale rows."""
    q = (scores / temp).exp()
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(0) / q.shape[1]
        q = q / q.sum(1, keepdim=True) / q.shape[0]
    return q * q.shape[0]


def sinkhorn(
    scores: Tensor,
    temp: float,
    *,
    iterations: int = 3,
    process_group: Group = LOCAL,
    normalized: bool = False,
    weight: Tensor | None = None,
) -> Tensor:
    """The center c (K,) with which softmax((scores - c) / temp) uses all prototypes alike.

    scores (R, K) of R rows with K prototypes, any float dtype; or (G, R, K): G of them, each by
    itself, and centers (G, K).  The rows of all ranks of process_group count, LOCAL: each rank's
    own.  iterations >= 1: how often the prototypes, and then the rows, are scaled to one sum.
    weight: (R,), to which a row's numbers are scaled rather than to 1: 0 leaves the row out.
    float32, or float64 for that.  No gradient.
    Raises ValueError for another shape or dtype, no rows at all, temp <= 0 and iterations < 1.

    >>> center = sinkhorn(torch.tensor([[5.0, 0.0], [4.0, 0.0]]), 1.0, iterations=50)
    >>> q = ((torch.tensor([[5.0, 0.0], [4.0, 0.0]]) - center) / 1.0).softmax(1)
    >>> q.sum(0)  # both are used as much
    tensor([1., 1.])
    """
    require_float(scores=scores)
    if scores.ndim not in (2, 3):
        raise ValueError(f"scores must be (R, K) or (G, R, K), got {tuple(scores.shape)}")
    require_features(scores=scores)
    scores, acc = scores.detach(), accumulator(scores.dtype)
    given = _Scores(
        lambda i, j, sharp: scores[..., i, j].to(acc, copy=True).mul_(sharp),
        scores.select(-1, 0),
        scores.shape[-1],
        rows_in_budget(scores, 2 * scores.numel() // max(scores.shape[-2], 1)),
    )
    return _centers(given, temp, iterations, process_group, normalized, weight)


def linear_sinkhorn(
    x: Tensor,
    w: Tensor,
    temp: float,
    *,
    iterations: int = 3,
    process_group: Group = LOCAL,
    rows: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """`sinkhorn` of scores x w^T, which are never stored: the center c (K,).

    x (R, D) rows and w (K, D) prototypes of one float dtype; products and sums in float32, or in
    float64 for that.  rows: (N,) int64, the rows to take, weight then (N,).  The scores are made
    anew in every iteration, for some rows at a time.
    Raises ValueError as `sinkhorn` does, and for a row out of range, looked at on a CPU, elsewhere
    with FASTSSL_CHECK=1.

    >>> x, w = torch.tensor([[5.0], [4.0]]), torch.tensor([[1.0], [0.0]])
    >>> center = linear_sinkhorn(x, w, 1.0, iterations=50)
    >>> (x @ w.T - center).softmax(1).sum(0)
    tensor([1., 1.])
    """
    require_float(x=x, w=w)
    if x.ndim != 2:
        raise ValueError(f"x must be (R, D), got {tuple(x.shape)}")
    check_prototypes(x, w, ("x", "w"))
    if rows is not None:
        check_index("rows", rows, "(N,)", x=x)
        check_ids(rows, len(x), "rows", repeats=True)
        x = x.index_select(0, rows)
    x, w, acc = x.detach(), w.detach(), accumulator(x.dtype)
    if not is_narrow(x, acc):
        x, w = x.to(acc), w.to(acc)
    step = rows_at_once(x, w, 2)
    given = _Scores(lambda i, j, sharp: product(x[i], w[j].T).mul_(sharp), x[:, 0], len(w), step)
    return _centers(given, temp, iterations, process_group, False, weight)


class _Scores(NamedTuple):
    """at(i, j, sharp): rows i of columns j, times sharp, in new memory and the dtype of sums."""

    at: Callable[[slice, slice, float], Tensor]
    like: Tensor  # (R,) or (G, R), of their dtype
    K: int
    step: int  # rows of all columns at once


def _centers(
    scores: _Scores,
    temp: float,
    iterations: int,
    group: Group,
    normalized: bool,
    weight: Tensor | None,
) -> Tensor:
    like, R = scores.like, scores.like.shape[-1]
    acc, every = accumulator(like.dtype), slice(None)
    if R == 0 and world_size(group) == 1:
        raise ValueError(f"there must be at least 1 row, got {R}")
    if not temp > 0:
        raise ValueError(f"temp must be > 0, got {temp!r}")
    if iterations < 1:
        raise ValueError(f"iterations must be >= 1, got {iterations!r}")
    if weight is not None and (weight.shape != (R,) or weight.device != like.device):
        got = f"{tuple(weight.shape)} on {weight.device}"
        raise ValueError(f"weight must be ({R},) on {like.device}, got {got}")
    weight = None if weight is None else weight.detach().to(acc)
    with full_precision(like.device):
        if normalized:
            f = like.new_zeros(*like.shape[:-1], scores.K, dtype=acc)
        else:
            f = _column_lse(scores, 1 / temp, weight, group)
        for _ in range(iterations if normalized else iterations - 1):
            used = torch.zeros_like(f)
            for i in spans(R, scores.step):
                q = scores.at(i, every, 1 / temp).sub_(f.unsqueeze(-2)).softmax(-1)
                used += q.sum(-2) if weight is None else weight[i] @ q
            f = f + all_reduce_sum(used, group).clamp_min_(torch.finfo(acc).tiny).log_()
        return f * temp


def _column_lse(scores: _Scores, sharp: float, weight: Tensor | None, group: Group) -> Tensor:
    """log sum_r w_r exp(x_rk sharp) over the rows of all ranks."""
    K, like = scores.K, scores.like
    parts = like.new_zeros(1, 2, *like.shape[:-1], K, dtype=accumulator(like.dtype))
    parts[0, 0] = -torch.inf
    if like.shape[-1]:
        for j in spans(K, max(1, CHUNK // like.numel())):
            x = scores.at(slice(None), j, sharp)
            if weight is not None:
                x += weight.log().unsqueeze(1)
            # The least finite number: of no row with a weight -inf would meet itself.
            parts[0, 0, ..., j] = top = x.amax(-2).clamp_min_(torch.finfo(x.dtype).min)
            parts[0, 1, ..., j] = x.sub_(top.unsqueeze(-2)).exp_().sum(-2)
    if world_size(group) > 1:
        parts = all_gather_nograd(parts, group, check=False)
    top = parts[:, 0].amax(0)
    lse = ((parts[:, 0] - top).exp_() * parts[:, 1]).sum(0).log_().add_(top)
    return lse if weight is None else lse.nan_to_num_(neginf=0.0)  # where no row counts
