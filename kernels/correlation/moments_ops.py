"""Column statistics as operators of torch, and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastssl.distributed import Group, all_gather_nograd, all_reduce_sum, world_size

from ..common.autograd import FirstOrder, finished, first_order
from ..common.operators import launches
from . import moments_torch
from .moments_torch import inverse


def _floats(like: Tensor, *shape: Any) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _fake_standardize(z: Tensor, eps: float, unbiased: bool) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), _floats(z, z.shape[1])


def _fake_gradient_whole(grad: Tensor, out: Tensor, inv_std: Tensor, divisor: int) -> Tensor:
    return out.new_empty(out.shape)


fused = launches(
    f"{__package__}.moments_triton",
    moments_torch,
    moments=lambda z: _floats(z, 3, z.shape[1]),
    join=lambda parts, rows: parts.new_empty(parts.shape[1:]),
    standardize=_fake_standardize,
    apply=lambda z, *columns: z.new_empty(z.shape),
    sums=lambda grad, out: _floats(out, 2, out.shape[1]),
    gradient=lambda grad, out, *columns: out.new_empty(out.shape),
    gradient_whole=_fake_gradient_whole,
)
fused.column_dot = lambda a, b: fused.sums(a, b)[1]
backends: dict[str, Any] = {"torch": moments_torch, "triton": fused}


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


class Standardize(FirstOrder):
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


class StandardizeAtOnce(FirstOrder):
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


class ColumnMoments(FirstOrder):
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


class CrossDiagonal(FirstOrder):
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
