"""Sinkhorn's assignment of rows to prototypes that are all used alike, in the log domain.

    q_rk = softmax_k(t_rk / temp - f_k),     f_k such that sum_r q_rk is nearly R / K

Alternately every prototype's and every row's numbers are scaled to one sum; the last step is the
rows'.  Kept is f alone, a number a prototype, by which the assignment is a softmax like any
other: temp f is a center (`soft_cross_entropy`).
Why: eager makes exp(t / temp), which overflows above 88, and goes over all of it twice an
iteration; here each iteration is a softmax of some rows at a time, and the sum of its columns.
Traffic: the scores once an iteration.  In place: nothing.
Ranks: rows are those of all ranks, as many or as few on each: two numbers a prototype are gathered
once, and one is summed in every iteration but the first.
Source: Caron et al. 2020, SwAV, arXiv:2006.09882, section 3.1; Oquab et al. 2023, DINOv2,
arXiv:2304.07193, section 4: three iterations.
"""

import torch
from torch import Tensor

from fastssl.distributed import LOCAL, Group, all_gather_nograd, all_reduce_sum, world_size

from ..common.autograd import accumulator, full_precision
from ..common.checks import require_features, require_float
from ..common.chunks import row_spans, spans

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
) -> Tensor:
    """The center c (K,) with which softmax((scores - c) / temp) uses all prototypes alike.

    scores (R, K) of R rows with K prototypes, any float dtype; or (G, R, K): G of them, each by
    itself, and centers (G, K).  The rows of all ranks of process_group count, LOCAL: each rank's
    own.  iterations >= 1: how often the prototypes, and then the rows, are scaled to one sum.
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
    if scores.shape[-2] == 0 and world_size(process_group) == 1:
        raise ValueError(f"scores must have at least 1 row, got {tuple(scores.shape)}")
    if not temp > 0:
        raise ValueError(f"temp must be > 0, got {temp!r}")
    if iterations < 1:
        raise ValueError(f"iterations must be >= 1, got {iterations!r}")
    one = scores.ndim == 2
    scores, acc = scores.detach(), accumulator(scores.dtype)
    scores = scores.unsqueeze(0) if one else scores
    (G, R, K), least = scores.shape, torch.finfo(acc).tiny
    with full_precision(scores.device):
        if normalized:
            f = scores.new_zeros(G, K, dtype=acc)
        else:
            f = _column_lse(scores, 1 / temp, acc, process_group)
        for _ in range(iterations if normalized else iterations - 1):
            used = torch.zeros_like(f)
            for g in row_spans(scores, 2 * R * K):
                for i in row_spans(scores.transpose(0, 1), 2 * K):
                    x = scores[g, i].to(acc, copy=True).mul_(1 / temp).sub_(f[g].unsqueeze(1))
                    used[g] += x.softmax(2).sum(1)
            f = f + all_reduce_sum(used, process_group).clamp_min_(least).log_()
        return (f[0] if one else f) * temp


def _column_lse(scores: Tensor, sharp: float, acc: torch.dtype, group: Group) -> Tensor:
    """log sum_r exp(scores_grk sharp) over the rows of all ranks."""
    G, R, K = scores.shape
    parts = scores.new_zeros(1, 2, G, K, dtype=acc)
    parts[0, 0] = -torch.inf
    if R:
        for g in spans(G, max(1, CHUNK // (R * K))):
            for j in spans(K, max(1, CHUNK // R)):
                x = scores[g, :, j].to(acc, copy=True).mul_(sharp)
                parts[0, 0, g, j] = top = x.amax(1)
                parts[0, 1, g, j] = x.sub_(top.unsqueeze(1)).exp_().sum(1)
    if world_size(group) > 1:
        parts = all_gather_nograd(parts, group, check=False)
    top = parts[:, 0].amax(0)
    return ((parts[:, 0] - top).exp_() * parts[:, 1]).sum(0).log_().add_(top)
