"""Three cross-correlations of one batch, for Mixed Barlow Twins.

    |r^T a|^2 + |r^T b|^2  beside  cross_correlation(a, b)                 a, b, r (N, D)

Why: with Grams Ga, Gb, Gr the three numbers are <Ga, Gb>, <Gr, Ga> and <Gr, Gb>: three Grams, not
six, and backward one product a tensor, since their gradients are (x Gb + y Gr) a, (x Ga + y Gr) b
and y (Ga + Gb) r: 1.5 times the products of the first pair alone.  By covariances it is r^T [a b]
beside a^T b: 3 times.
Source: Bandara et al. 2023, Mixed Barlow Twins, arXiv:2312.02151, where these are seven products.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastssl.distributed import Group, all_gather_nograd, rank, world_size

from ..common.autograd import FirstOrder, first_order
from ..common.checks import check_pair, check_rows
from ..common.dispatch import declare
from . import moments_ops
from .correlation import correlation_reference, cross_correlation, frobenius_sq, plan_for
from .gram_torch import Matrix, Terms, blend, overlap
from .plans import added, backends


class Mixed(NamedTuple):
    """a^T b as `Correlation` has it, and |r^T a|^2 + |r^T b|^2."""

    diagonal: Tensor
    off_diagonal_sq: Tensor
    residual_sq: Tensor


class _ByGrams(FirstOrder):
    """Keeps this rank's rows of three Grams."""

    @staticmethod
    def forward(ctx: Any, a, b, r, group, impl):
        backend, alone = backends[impl], world_size(group) == 1
        gathered = [x if alone else all_gather_nograd(x, group, check=False) for x in (a, b, r)]
        start = rank(group) * len(a)
        pair, gram_a, gram_b = backend.grams(a, b, gathered[0], gathered[1], start)
        _, gram_r, _ = backend.grams(r, None, gathered[2], None, start)
        one = torch.ones_like(pair)
        residual = overlap(gram_r, blend(gram_a, gram_b, one, one))
        diagonal = moments_ops.backends[impl].column_dot(a, b)
        diagonal, pair, residual = added(group, diagonal, pair, residual)
        own = (None,) * 3 if alone else (a, b, r)
        ctx.save_for_backward(*gathered, *own, diagonal, *gram_a, *gram_b, *gram_r)
        ctx.group, ctx.impl = group, impl
        return diagonal, pair - diagonal.square().sum(), residual

    @staticmethod
    @first_order
    def backward(ctx: Any, g_diagonal, g_pair, g_residual):
        backend = backends[ctx.impl]
        all_a, all_b, all_r, *rest = ctx.saved_tensors
        own, diagonal, parts = rest[:3], rest[3], rest[4:]
        a, b, r = (all_a, all_b, all_r) if own[0] is None else own
        gram_a, gram_b, gram_r = (Matrix(*parts[i : i + 3]) for i in (0, 3, 6))
        g_diagonal, g, g_r = added(ctx.group, g_diagonal, g_pair, g_residual)
        coef, two = g_diagonal - 2 * g * diagonal, torch.full_like(g, 2.0)
        need = ctx.needs_input_grad
        da = db = dr = None
        if need[0]:
            da = backend.gradient(blend(gram_b, gram_r, g, g_r), all_a, Terms(a, b, coef, two))
        if need[1]:
            db = backend.gradient(blend(gram_a, gram_r, g, g_r), all_b, Terms(b, a, coef, two))
        if need[2]:
            terms = Terms(r, None, None, two)
            dr = backend.gradient(blend(gram_a, gram_b, g_r, g_r), all_r, terms)
        return da, db, dr, None, None


def mixed_reference(a, b, r, plan, group):
    """By the D x D matrices of the gathered batch, in the dtype it is given."""
    pair = correlation_reference(a, b, True, plan, group)
    residual = [correlation_reference(r, x, False, plan, group)[1] for x in (a, b)]
    return *pair, residual[0] + residual[1]


def _run(a, b, r, plan, group, impl):
    if plan == "gram":
        return _ByGrams.call(a, b, r, group, impl)
    pair = cross_correlation(a, b, plan=plan, process_group=group, impl=impl)
    sides = (frobenius_sq(r, x, plan=plan, process_group=group, impl=impl) for x in (a, b))
    return *pair, sum(sides)


_MIXED = declare("mixed_correlation", _run, mixed_reference)


def mixed_correlation(
    a: Tensor,
    b: Tensor,
    r: Tensor,
    *,
    plan: str = "auto",
    process_group: Group = None,
    impl: str = "auto",
) -> Mixed:
    """`cross_correlation(a, b)` and |r^T a|^2 + |r^T b|^2, over the joined batch; float32.

    a, b, r (N, D): this rank's rows, any float dtype, as many on every rank.  First order only.
    plan, impl, Raises: as `cross_correlation`.

    >>> one = torch.ones(1, 2)
    >>> mixed_correlation(one, 2 * one, one).residual_sq
    tensor(20.)
    """
    check_rows(1, process_group, a=a, b=b, r=r)
    check_pair(a, b)
    check_pair(a, r)
    if not a.shape == b.shape == r.shape:
        got = ", ".join(str(tuple(x.shape)) for x in (a, b, r))
        raise ValueError(f"a, b and r must have the same shape, got {got}")
    plan = plan_for(plan, a, b, process_group, (3, 3))
    return Mixed(*_MIXED(impl, a, b, r, plan, process_group, inputs={"a": a}))
