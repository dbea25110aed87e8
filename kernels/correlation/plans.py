"""The ways to |a^T b|^2 over the joined batch of W ranks, each with its gradient.

    plan          each rank holds               it computes         and sends
    "gram"        n rows of the N x N Grams     2 n N D, twice      its rows of a and b, n (D + E)
    "covariance"  C = a^T b, D x E              2 n D E             C once round, about 2 D E
    "sharded"     D / W rows of C               2 n D E             C once round, about 2 D E

(n = N / W rows a rank; operations of the forward, where symmetry halves those of one process; the
backward has twice those of a general matrix.)  "gram" gathers rows once and needs nothing in the
backward but the upstream gradient.  The squares of a covariance need its sum over ranks first, so
across ranks torch and cuBLAS compute it, whatever `impl`.  "sharded" never holds C whole: in the
forward a strip at a time is summed on its owner, in the backward the owner hands it round.

Every rank's value is the same, so the upstream gradients of all ranks add.
Of one tensor the gradient is that of two equal ones, twice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastssl.distributed import Group, all_gather_nograd, all_reduce_sum, rank, world_size

from ..common.autograd import FirstOrder, accumulator, first_order
from ..common.chunks import spans
from ..common.matmul import weighted
from . import correlation_ops, gram_torch, moments_ops

backends: dict[str, Any] = {"torch": gram_torch, "triton": correlation_ops}

# floating-point operations in the time a byte takes between ranks: an H200 at half its bf16 rate
# (400 Tflop/s) on NVLink at 400 GB/s; slower links only move the border towards fewer bytes.
BALANCE = 1000
# Fewer rows than this share of the columns go by Grams in one process (measured on a CPU, float32,
# 512 to 2048 columns: equal at 0.8 for two tensors and 0.95 for one), by tensors and matrices.
GRAM_BELOW = {(1, 1): 0.9, (2, 1): 0.75, (3, 3): 1.6}


def choose(
    rows: int, D: int, E: int, world: int, itemsize: int, sides: int, matrices: int = 1
) -> str:
    """The plan of less time, by products and by bytes.

    rows: a rank's.  itemsize: bytes of a number.  sides: tensors correlated, 1 for one with itself.
    matrices: covariances that are needed.  C is sharded where a rank would hold more of it than of
    its rows.

    >>> choose(256, 8192, 8192, 1, 4, 2), choose(8192, 2048, 2048, 1, 4, 2)
    ('gram', 'covariance')
    """
    N, mean = rows * world, (D + E) / 2
    if world == 1:
        return "gram" if rows < GRAM_BELOW[sides, matrices] * min(D, E) else "covariance"
    gram = 4 * sides * rows * N * mean + BALANCE * sides * N * mean * itemsize
    across = matrices * (6 * rows * D * E + BALANCE * 2 * D * E * 4)
    if gram <= across:
        return "gram"
    return "sharded" if D * E > 2 * rows * mean else "covariance"


def added(group: Group, *parts: Tensor) -> tuple[Tensor, ...]:
    """The sum over ranks of each part, in one collective."""
    if world_size(group) == 1:
        return parts
    joined = all_reduce_sum(torch.cat([x.flatten() for x in parts]), group)
    sizes = [x.numel() for x in parts]
    return tuple(
        x.view(part.shape).clone() for x, part in zip(joined.split(sizes), parts, strict=True)
    )


def _upstream(g_diagonal: Tensor, g_total: Tensor, same: bool, group: Group):
    """All ranks' gradients to the diagonal and to the total; for one tensor on both sides twice."""
    g_diagonal, g_total = added(group, g_diagonal, g_total)
    return (2 * g_diagonal, 2 * g_total) if same else (g_diagonal, g_total)


class ByGram(FirstOrder):
    """Keeps this rank's rows of a a^T and b b^T; d/da = 2 (b b^T) a on those rows, d/db alike.

    A row's Gram meets every rank's rows, so its gradient is whole without a second collective.
    """

    @staticmethod
    def forward(ctx: Any, a, b, split, group, impl):
        backend, W = backends[impl], world_size(group)
        all_a, all_b = (
            x if x is None or W == 1 else all_gather_nograd(x, group, check=False) for x in (a, b)
        )
        total, gram_a, gram_b = backend.grams(a, b, all_a, all_b, rank(group) * len(a))
        diagonal = total.new_empty(0)
        if split:
            diagonal = moments_ops.backends[impl].column_dot(a, a if b is None else b)
        diagonal, total = added(group, diagonal, total)
        alone = None if W == 1 else a, None if W == 1 else b
        ctx.save_for_backward(all_a, all_b, *alone, diagonal, *gram_a, *(gram_b or ()))
        ctx.split, ctx.group, ctx.impl = split, group, impl
        return diagonal, total - diagonal.square().sum() if split else total

    @staticmethod
    @first_order
    def backward(ctx: Any, g_diagonal, g_total):
        backend, Matrix = backends[ctx.impl], gram_torch.Matrix
        all_a, all_b, a, b, diagonal, *parts = ctx.saved_tensors
        a, b = all_a if a is None else a, all_b if b is None else b
        gram_a = Matrix(*parts[:3])
        gram_b = gram_a if b is None else Matrix(*parts[3:])
        g_diagonal, g = _upstream(g_diagonal, g_total, b is None, ctx.group)
        coef = g_diagonal - 2 * g * diagonal if ctx.split else None
        da = db = None
        if ctx.needs_input_grad[0]:
            terms = gram_torch.Terms(a, a if b is None else b, coef, 2 * g)
            da = backend.gradient(gram_b, all_a, terms)
        if b is not None and ctx.needs_input_grad[1]:
            db = backend.gradient(gram_a, all_b, gram_torch.Terms(b, a, coef, 2 * g))
        return da, db, None, None, None


class ByCovariance(FirstOrder):
    """Keeps C = a^T b, summed over ranks; d/da = 2 b C^T, d/db = 2 a C."""

    @staticmethod
    def forward(ctx: Any, a, b, split, group, impl):
        backend = backends[impl]
        if world_size(group) == 1:
            diagonal, total, matrix = backend.covariance(a, b, split)
        else:
            c = all_reduce_sum(gram_torch.cross(a, b), group)
            diagonal, total = gram_torch.squared(c, split)
            matrix = gram_torch.Matrix(c)
        ctx.save_for_backward(a, b, *matrix)
        ctx.split, ctx.group = split, group
        ctx.impl = impl if world_size(group) == 1 else "torch"
        return diagonal, total

    @staticmethod
    @first_order
    def backward(ctx: Any, g_diagonal, g_total):
        a, b, *parts = ctx.saved_tensors
        backend, matrix = backends[ctx.impl], gram_torch.Matrix(*parts)
        g_diagonal, g = _upstream(g_diagonal, g_total, b is None, ctx.group)
        coef = g_diagonal if ctx.split else None
        da = db = None
        if ctx.needs_input_grad[0]:
            other = a if b is None else b
            da = backend.gradient_across(matrix, other, coef, 2 * g, True)
        if b is not None and ctx.needs_input_grad[1]:
            db = backend.gradient_across(matrix, a, coef, 2 * g, False)
        return da, db, None, None, None


class Sharded(FirstOrder):
    """Keeps its share of the rows of C = a^T b: no rank holds C, in the backward neither."""

    @staticmethod
    def forward(ctx: Any, a, b, split, group, impl):
        W, here = world_size(group), rank(group)
        other = a if b is None else b
        shares = list(spans(a.shape[1], -(-a.shape[1] // W)))
        mine = a.new_empty(0, other.shape[1], dtype=accumulator(a.dtype))
        for owner, d in enumerate(shares):
            c = gram_torch.cross(a[:, d], other)
            if W > 1:
                dist.reduce(c, _global(owner, group), group=group)
            mine = c if owner == here else mine
        diagonal = mine.new_empty(0)
        if split:
            diagonal = mine.new_zeros(a.shape[1])
            if here < len(shares):
                own = _own_diagonal(mine, shares[here])
                diagonal[shares[here]] = own
                own.zero_()
        total = gram_torch.dot(mine, mine) if len(mine) else mine.new_zeros(())
        ctx.save_for_backward(a, b, mine)
        ctx.split, ctx.group, ctx.shares = split, group, shares
        return added(group, diagonal, total)

    @staticmethod
    @first_order
    def backward(ctx: Any, g_diagonal, g_total):
        a, b, mine = ctx.saved_tensors
        other, here = a if b is None else b, rank(ctx.group)
        g_diagonal, g = _upstream(g_diagonal, g_total, b is None, ctx.group)
        da = torch.empty_like(a, dtype=mine.dtype)
        db = None if b is None else torch.zeros_like(b, dtype=mine.dtype)
        for owner, d in enumerate(ctx.shares):
            c = mine if owner == here else mine.new_empty(d.stop - d.start, other.shape[1])
            if world_size(ctx.group) > 1:
                dist.broadcast(c, _global(owner, ctx.group), group=ctx.group)
            weights = c * (2 * g)
            if ctx.split:
                _own_diagonal(weights, d).copy_(g_diagonal[d])
            da[:, d] = weighted(other, weights.T)
            if db is not None:
                db += weighted(a[:, d], weights)
        return da.to(a.dtype), None if db is None else db.to(a.dtype), None, None, None


def _own_diagonal(strip: Tensor, d: slice) -> Tensor:
    """The view of C's diagonal in its rows d."""
    return strip.diagonal(d.start)


def _global(owner: int, group: Group) -> int:
    """The rank in the world of the group's rank `owner`."""
    return owner if group is None else dist.get_global_rank(group, owner)


PLANS = {"gram": ByGram, "covariance": ByCovariance, "sharded": Sharded}
