"""Statistics of columns over the joined batch of all ranks.

    mu, var = mean and variance of each column over N rows         z (N, D)
    standardise(z) = (z - mu) / sqrt(var + eps)
    cross_diagonal(a, b)_d = sum_n a_nd b_nd

    d standardise: dz = (g - sum g / N - out * sum(g out) / M) / sqrt(var + eps),  var = sum / M

Why: batch norm without affine, over all ranks on any back end, and each column's numbers alone.
Ranks are joined by their differences from rank 0's mean, so a column at 1e6 loses nothing to
cancellation.  Traffic: z once, the result once; backward its gradient and itself once, dz once.
In place: nothing.
Source: Ioffe & Szegedy 2015, arXiv:1502.03167 (gradient through the statistics); Chan, Golub &
LeVeque 1983, "Algorithms for computing the sample variance" (correction, joining of parts).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastssl.distributed import (
    Group,
    all_gather_nograd,
    all_gather_rows,
    all_reduce_sum,
    require_all_even,
    world_size,
)

from . import moments_torch
from ._dispatch import (
    accumulator,
    check_fused_input,
    declare,
    finished,
    first_order,
    for_dtype,
    require_float,
)
from .masks import twins
from .moments_torch import inverse

engines: dict[str, Any] = {"torch": moments_torch}
if twins is not None:
    from . import moments_ops
    from .scores_fused import INTERPRETED

    engines["triton"] = moments_ops


class Moments(NamedTuple):
    """Column statistics of the joined batch: mean (D,) and variance (D,)."""

    mean: Tensor
    var: Tensor


def _joined(z: Tensor, group: Group, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """shift and rest, together the joined batch's mean, and its sum of squares about that.

    The same bits on every rank: each joins the same gathered parts.
    """
    engine = engines[impl]
    parts = engine.moments(z)
    if world_size(group) > 1:
        parts = engine.joined(all_gather_nograd(parts[None], group, check=False), len(z))
    shift, rest, m2 = parts
    return shift, rest, m2


class _Standardise(torch.autograd.Function):
    """By statistics that ranks join."""

    @staticmethod
    def forward(ctx: Any, z, eps, unbiased, group, impl):
        shift, rest, m2 = _joined(z, group, impl)
        ctx.divisor = len(z) * world_size(group) - int(unbiased)
        inv_std = inverse(m2 / ctx.divisor, eps)
        out = engines[impl].applied(z, shift, rest, inv_std)
        ctx.save_for_backward(out, inv_std)
        ctx.group, ctx.impl = group, impl
        return finished(out)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad):
        out, inv_std = ctx.saved_tensors
        engine = engines[ctx.impl]
        g_sum, g_out = all_reduce_sum(engine.sums(grad, out), ctx.group)
        n = len(out) * world_size(ctx.group)
        dz = engine.gradient(grad, out, inv_std, g_sum / n, g_out / ctx.divisor)
        return dz, None, None, None, None


class _StandardiseAtOnce(torch.autograd.Function):
    """One process: statistics and rows in one pass of a kernel."""

    @staticmethod
    def forward(ctx: Any, z, eps, unbiased, impl):
        out, inv_std = engines[impl].standardised(z, eps, unbiased)
        ctx.save_for_backward(out, inv_std)
        ctx.divisor, ctx.impl = len(z) - int(unbiased), impl
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad):
        out, inv_std = ctx.saved_tensors
        dz = engines[ctx.impl].gradient_whole(grad, out, inv_std, ctx.divisor)
        return dz, None, None, None


class _ColumnMoments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z, unbiased, group, impl):
        shift, rest, m2 = _joined(z, group, impl)
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
        return engines[ctx.impl].applied(z, shift, rest, factor, g_mean / n), None, None, None


class _CrossDiagonal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a, b, impl):
        ctx.save_for_backward(a, b)
        return finished(engines[impl].column_dot(a, a if b is None else b))

    @staticmethod
    @first_order
    def backward(ctx: Any, grad):
        a, b = ctx.saved_tensors
        if b is None:
            return (2 * grad * a).to(a.dtype), None, None
        return (grad * b).to(a.dtype), (grad * a).to(b.dtype), None


def column_moments_reference(z: Tensor, unbiased: bool = False, process_group: Group = None):
    """Mean and variance of the gathered batch, in the dtype it is given."""
    rows = all_gather_rows(z, process_group)
    return Moments(rows.mean(0), rows.var(0, correction=int(unbiased)))


def standardise_reference(z, eps, unbiased, process_group):
    """The formula on the gathered batch, in the dtype it is given; this rank's rows of it."""
    mean, var = column_moments_reference(z, unbiased, process_group)
    return (z - mean) / (var + eps).sqrt()


def cross_diagonal_reference(a, b):
    """The formula, in the dtype it is given."""
    return (a * (a if b is None else b)).sum(0)


def _standardise(z, eps, unbiased, group, impl):
    if world_size(group) > 1:
        return _Standardise.apply(z, eps, unbiased, group, impl)
    if impl == "torch":
        return moments_torch.standardised(z, eps, unbiased)
    return _StandardiseAtOnce.apply(z, eps, unbiased, impl)


def by_engine(function: Any, reference: Any) -> dict[str, Any]:
    """`function` with each engine's name as its last argument, and the reference."""
    return {name: _with(function, name) for name in engines} | {"reference": reference}


def _with(function: Any, impl: str) -> Any:
    return lambda *args: function(*args, impl)


_MOMENTS = declare("column_moments", **by_engine(_ColumnMoments.apply, column_moments_reference))
_STANDARDISE = declare("standardise", **by_engine(_standardise, standardise_reference))
_DIAGONAL = declare("cross_diagonal", **by_engine(_CrossDiagonal.apply, cross_diagonal_reference))


def implementation(impl: str, name: str, x: Tensor) -> str:
    """What `impl` says, but that auto is torch for float64.

    Raises ValueError where impl="triton" and x is not for it.
    """
    if impl == "triton" and "triton" in engines:
        check_fused_input(name, x, INTERPRETED)
    return for_dtype(impl, x)


def check_rows(least: int, group: Group, **tensors: Tensor) -> None:
    """Refuse what is not (N, D) float rows, as many on every rank and at least `least` in all.

    What all ranks refuse together comes first: one that left alone would leave the others waiting.
    """
    W = world_size(group)
    if W > 1:
        require_all_even(group, **tensors)
    require_float(**tensors)
    for name, x in tensors.items():
        if x.ndim != 2 or x.shape[1] == 0:
            raise ValueError(f"{name} must be (N, D), D > 0, got {tuple(x.shape)}")
        if x.shape[0] * W < least:
            got = x.shape[0] * W
            raise ValueError(f"{name} must have at least {least} rows in all, got {got}")


def column_moments(
    z: Tensor, *, unbiased: bool = False, process_group: Group = None, impl: str = "auto"
) -> Moments:
    """Mean and variance of each column over the joined batch: (D,) float32 both, on every rank.

    z (N, D): this rank's rows, any float dtype, as many on every rank; one read of them, and a
    second from cache.  The variance loses nothing to a mean far from zero.  Gradients are exact
    through the global statistics; first order only.
    impl: "auto", "triton", "torch" or "reference" (gathers, and computes in z's dtype).
    Raises ValueError for other shapes, fewer than 2 rows in all, uneven ranks, an unknown impl.

    >>> column_moments(torch.tensor([[1.0], [3.0]]))
    Moments(mean=tensor([2.]), var=tensor([1.]))
    """
    check_rows(2, process_group, z=z)
    acc = accumulator(z.dtype)
    mean, var = _MOMENTS(implementation(impl, "z", z), z.device, z, unbiased, process_group)
    return Moments(mean.to(acc), var.to(acc))


def standardise(
    z: Tensor,
    *,
    eps: float,
    unbiased: bool = False,
    process_group: Group = None,
    impl: str = "auto",
) -> Tensor:
    """This rank's rows, each column of the joined batch at mean 0 and variance 1: as z, (N, D).

    z (N, D): any float dtype, as many rows on every rank.  eps is added to the variance, inside the
    root; biased variance by default, as batch normalisation has it.  A constant column becomes
    zeros, for eps = 0 too, where its gradient is zero as well.  The gradient is exact through
    the global mean and variance (one (2, D) all-reduce); first order only.
    impl: "auto", "triton", "torch" or "reference" (gathers the batch; a constant column is nan at
    eps = 0).
    Raises ValueError for other shapes, eps < 0, fewer than 2 rows in all (a variance of one number
    is undefined), uneven ranks and an unknown impl.

    >>> standardise(torch.tensor([[1.0], [3.0]]), eps=0.0)
    tensor([[-1.],
            [ 1.]])
    """
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    check_rows(2, process_group, z=z)
    return _STANDARDISE(implementation(impl, "z", z), z.device, z, eps, unbiased, process_group)


def cross_diagonal(a: Tensor, b: Tensor, *, impl: str = "auto") -> Tensor:
    """sum_n a_nd b_nd over this rank's rows: the diagonal of a^T b, (D,) float32.

    a, b (N, D), any float dtype.  No collective: all_reduce_sum joins ranks.  First order only.
    impl: "auto", "triton", "torch" or "reference".
    Raises ValueError for shapes, dtypes or devices that differ, or shapes that are not (N, D).

    >>> cross_diagonal(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])).tolist()
    [3.0, 8.0]
    """
    check_pair(a, b)
    if a.ndim != 2 or a.shape != b.shape:
        got = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise ValueError(f"a and b must both be (N, D), got {got}")
    out = _DIAGONAL(implementation(impl, "a", a), a.device, a, None if b is a else b)
    return out.to(accumulator(a.dtype))


def check_pair(a: Tensor, b: Tensor) -> None:
    """Refuse two tensors that are not of one floating dtype on one device."""
    require_float(a=a, b=b)
    if a.dtype != b.dtype or a.device != b.device:
        got = f"{a.dtype} on {a.device} and {b.dtype} on {b.device}"
        raise ValueError(f"a and b must have one dtype and device, got {got}")
