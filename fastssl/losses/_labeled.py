"""NT-Xent of labeled rows: each pair of one label by itself, against the rows of other labels.

    s_ij = z_i . z_j / t        n_i = log sum_{j of another label} exp(s_ij)
    loss = the mean over all pairs (i, j) of one label, i != j, of log(1 + exp(n_i - s_ij))

Every n_i is a log-sum-exp.  The pairs of one label, of which there may be a quarter of N^2, are
visited a block of rows at a time, in torch on every device; no N x N scores are held.  Their sum is
one number: the gradient is known in the forward but for a factor, and is made there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.distributed import (
    Group,
    all_gather_nograd,
    all_gather_rows,
    all_reduce_sum,
    rank,
    world_size,
)
from fastssl.kernels import different_group, pairwise_lse
from fastssl.kernels.common import FirstOrder, accumulator, first_order, full_precision
from fastssl.kernels.common.chunks import row_spans


def labeled_nt_xent(rows: Tensor, labels: Tensor, temperature: float, group: Group) -> Tensor:
    """The loss of this rank's rows (b, D) of length one and their labels (b,); 0 without a pair.

    Its mean over ranks is the joined batch's: a rank's sum is divided by the mean number of pairs.
    """
    W, scale = world_size(group), 1 / temperature
    keys = all_gather_rows(rows, group, check=False) if W > 1 else rows
    ids = all_gather_nograd(labels, group, check=False)
    others = different_group(labels, ids) if W > 1 else different_group(labels)
    negative = pairwise_lse(rows, keys, scale, mask=others)
    learned = torch.is_grad_enabled() and negative.requires_grad
    about = scale, labels, ids, len(rows) * rank(group), learned
    with full_precision(rows.device):
        total, pairs = _Positives.call(rows, keys, negative, *about)  # pyright: ignore
    return total / all_reduce_sum(pairs, group).clamp(min=1) * W


class _Positives(FirstOrder):
    """The sum of log(1 + exp(n_i - s_ij)) over pairs of one label, and how many there are.

    start: the place of the first row among the keys, which itself it does not meet.
    """

    @staticmethod
    def forward(ctx: Any, q, k, negative, scale, labels, ids, start, learned):
        x, y = (z.to(accumulator(z.dtype)) for z in (q, k))
        total, pairs = x.new_zeros(()), torch.zeros((), dtype=torch.int64, device=x.device)
        dx, dy, dn = (torch.zeros_like(z) if learned else None for z in (x, y, negative))
        for i in row_spans(x, len(y)):
            gap = torch.addmm(negative[i, None], x[i], y.T, alpha=-scale)
            same = labels[i, None] == ids
            same.diagonal(start + i.start).fill_(False)
            pairs += same.sum()
            total += (-F.logsigmoid(-gap)).masked_fill_(~same, 0).sum()
            if dx is not None and dy is not None and dn is not None:
                w = gap.sigmoid_().masked_fill_(~same, 0)
                dn[i] = w.sum(1)
                torch.mm(w, y, out=dx[i]).mul_(-scale)
                dy.addmm_(w.T, x[i], alpha=-scale)
        ctx.mark_non_differentiable(pairs)
        ctx.save_for_backward(dx, dy, dn)
        ctx.dtype = q.dtype
        return total, pairs

    @staticmethod
    @first_order
    def backward(ctx: Any, grad, _):
        dx, dy, dn = ctx.saved_tensors
        return (grad * dx).to(ctx.dtype), (grad * dy).to(ctx.dtype), grad * dn, *(None,) * 5


def labeled_ntxent_reference(z: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The formula, all (N, N) scores at once, in one process; z: rows of length one."""
    scores = z @ z.T / temperature
    same = labels[:, None] == labels
    negative = scores.masked_fill(same, -torch.inf).logsumexp(1, keepdim=True)
    pairs = same & ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    losses = F.softplus(negative - scores).masked_fill(~pairs, 0)
    return losses.sum() / pairs.sum().clamp(min=1)
