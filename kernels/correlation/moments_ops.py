"""Column statistics as operators of torch, and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastssl.distributed import Group, all_gather_nograd, all_reduce_sum, world_size

from ..common.autograd import finished, first_order
from ..common.operators import operator
from . import moments_torch
from . import moments_triton as launches
from .moments_torch import inverse


class Fused:
    """`moments_torch`'s functions by Triton: (N, D) rows in any layout, columns (D,) float32."""

    moments = operator(
        "moments", launches.moments, lambda z: z.new_empty(3, z.shape[1], dtype=torch.float32)
    )
    join = operator(
        "moments_joined", launches.join, lambda parts, rows: parts.new_empty(parts.shape[1:])
    )
    standardize = operator(
        "standardized",
        launches.standardize,
        lambda z, eps, unbiased: (
            z.new_empty(z.shape),
            z.new_empty(z.shape[1], dtype=torch.float32),
        ),
    )
    apply = operator("moments_applied", launches.apply, lambda z, *columns: z.new_empty(z.shape))
    sums = operator(
        "moments_sums",
        launches.sums,
        lambda grad, out: out.new_empty(2, out.shape[1], dtype=torch.float32),
    )
    gradient = operator(
        "moments_gradient", launches.gradient, lambda grad, out, *columns: out.new_empty(out.shape)
    )
    gradient_whole = operator(
        "moments_gradient_whole",
        launches.gradient_whole,
        lambda grad, out, inv_std, divisor: out.new_empty(out.shape),
    )

    @staticmethod
    def column_dot(a: Tensor, b: Tensor) -> Tensor:
        """sum_n a_nd b_nd: (D,)."""
        return Fused.sums(a, b)[1]


backends: dict[str, Any] = {"torch": moments_torch, "triton": Fused}


def _join_ranks(z: Tensor, group: Group, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """shift and rest, together the joined batch's mean, and its sum of squares about that.

    The same bits on every rank: each joins the same gathered parts.
    """
    backend = backends[impl]
    parts = backend.moments(z)
    if world_size(group) > 1:
        parts = backend.join(all_gather_nograd(parts[None], group, check=False), len(z))
    shift, rest, m2 = parts
    return shift, rest, m2


class Standardize(torch.autograd.Function):
    """By statistics that ranks join."""

    @staticmethod
    def forward(ctx: Any, z, eps, unbiased, group, impl):
        shift, rest, m2 = _join_ranks(z, group, impl)
        ctx.divisor = len(z) * world_size(group) - int(unbiased)
        inv_std = inverse(m2 / ctx.divisor, eps)
        out = backends[impl].apply(z, shift, rest, inv_std)
        ctx.save_for_backward(out, inv_std)
        ctx.group, ctx.impl = group, impl
        return finished(out)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad):
        out, inv_std = ctx.saved_tensors
        backend = backends[ctx.impl]
        g_sum, g_out = all_reduce_sum(backend.sums(grad, out), ctx.group)
        n = len(out) * world_size(ctx.group)
        dz = backend.gradient(grad, out, inv_std, g_sum / n, g_out / ctx.divisor)
        return dz, None, None, None, None


class StandardizeAtOnce(torch.autograd.Function):
    """One process: statistics and rows in one pass of a kernel."""

    @staticmethod
    def forward(ctx: Any, z, eps, unbiased, impl):
        out, inv_std = backends[impl].standardize(z, eps, unbiased)
        ctx.save_for_backward(out, inv_std)
        ctx.divisor, ctx.impl = len(z) - int(unbiased), impl
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad):
        out, inv_std = ctx.saved_tensors
        dz = backends[ctx.impl].gradient_whole(grad, out, inv_std, ctx.divisor)
        return dz, None, None, None


class ColumnMoments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z, unbiased, group, impl):
        shift, rest, m2 = _join_ranks(z, group, impl)
        ctx.divisor = len(z) * world_size(group) - int(unbiased)
        ctx.save_for_backward(z, shift, rest)
        ctx.group, ctx.impl = group, impl
        return shift + rest, m2 / ctx.divisor

    @staticmethod
    @first_order
    def backward(ctx: Any, g_mean, g_var):
        z, shift, rest = ctx.saved_tensors
        g_mean, g_var = all_reduce_sum(torch.stack([g_mean, g_var]), ctx.group)
        n, factor = len(z) * world_size(ctx.group), g_var * (2 / ctx.divisor)
        return backends[ctx.impl].apply(z, shift, rest, factor, g_mean / n), None, None, None


class CrossDiagonal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a, b, impl):
        ctx.save_for_backward(a, b)
        return finished(backends[impl].column_dot(a, a if b is None else b))

    @staticmethod
    @first_order
    def backward(ctx: Any, grad):
        a, b = ctx.saved_tensors
        if b is None:
            return (2 * grad * a).to(a.dtype), None, None
        return (grad * b).to(a.dtype), (grad * a).to(b.dtype), None
