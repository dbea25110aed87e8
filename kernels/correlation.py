"""Batch statistics and the size of a cross-correlation, over the joined batch of all ranks.

    mu, var = mean and variance of each column over N rows         z (N, D)
    standardise(z) = (z - mu) / sqrt(var + eps)
    cross_diagonal(a, b)_d = sum_n a_nd b_nd
    frobenius_sq(a, b) = |a^T b|_F^2 = sum_ij (a_i . a_j)(b_i . b_j)

Why: the D x D matrix a^T b costs N D^2 and D^2 floats, several times over in eager; the two N x N
Gram matrices give the same number for N^2 D.  Forward and backward, the covariance takes 3
products and the Grams 4, so the Grams win when N < 0.75 D.  Across ranks gathering a and b (2 N D)
then moves fewer bytes, too, than a ring all-reduce of the matrix (2 D^2).
Variances are sums of squares about a first mean, corrected by a second: ranks are joined by their
differences from rank 0's mean, so a column at 1e4 loses nothing to cancellation.
Memory: O(N D + min(N, D)^2).  In place: nothing.
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

from ._chunks import row_spans
from ._dispatch import (
    accumulator,
    declare,
    finished,
    first_order,
    full_precision,
    require_float,
)


class Moments(NamedTuple):
    """Column statistics of the joined batch: mean (D,) and variance (D,)."""

    mean: Tensor
    var: Tensor


def column_moments_reference(z: Tensor, unbiased: bool = False, process_group: Group = None):
    """Mean and variance of the gathered batch, in the dtype it is given."""
    rows = all_gather_rows(z, process_group)
    return Moments(rows.mean(0), rows.var(0, correction=int(unbiased)))


def standardise_reference(z, eps, unbiased, process_group):
    """The formula on the gathered batch, in the dtype it is given; this rank's rows of it."""
    mean, var = column_moments_reference(z, unbiased, process_group)
    return (z - mean) / (var + eps).sqrt()


def frobenius_sq_reference(a, b, process_group):
    """|a^T b|_F^2 by the D x D matrix of the gathered batch, in the dtype it is given."""
    c_DE = all_gather_rows(a, process_group).T @ all_gather_rows(b, process_group)
    return c_DE.square().sum()


def _column_dot(a: Tensor, b: Tensor) -> Tensor:
    """sum_n a_nd b_nd, without the (N, D) product."""
    total = a.new_zeros(a.shape[1])
    for i in row_spans(a, a.shape[1]):
        total += (a[i] * b[i]).sum(0)
    return total


def _centre(z: Tensor, unbiased: bool, group: Group) -> tuple[Tensor, Tensor, Tensor, int]:
    """This rank's rows minus the global mean; the global mean and variance; the variance's divisor.

    float32.  The same bits of mean and variance on every rank: each joins the same gathered parts.
    """
    shift = z.mean(0, dtype=accumulator(z.dtype))
    rows = z - shift
    rest = rows.mean(0)  # what rounding left of the mean
    m2 = _column_dot(rows, rows) - len(z) * rest.square()
    parts = all_gather_nograd(torch.stack([shift, rest, m2])[None], group, check=False)
    base = parts[0, 0]
    means = parts[:, 0] - base + parts[:, 1]  # each rank's mean, from rank 0's first one
    middle = means.mean(0)
    m2 = parts[:, 2].sum(0) + len(z) * (means - middle).square().sum(0)
    rows -= middle - (shift - base)
    divisor = len(z) * len(parts) - int(unbiased)
    return rows, base + middle, m2.clamp_min_(0) / divisor, divisor


class _Standardise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z, eps, unbiased, group):
        out, _, var, ctx.divisor = _centre(z, unbiased, group)
        inv_std = (var + eps).rsqrt()
        out *= inv_std
        ctx.save_for_backward(out, inv_std)
        ctx.group, ctx.dtype = group, z.dtype
        return finished(out)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad):
        out, inv_std = ctx.saved_tensors
        sums = torch.stack([grad.sum(0), _column_dot(grad, out)])
        g_sum, g_out = all_reduce_sum(sums, ctx.group)
        n = len(out) * world_size(ctx.group)
        dz = out * (g_out / -ctx.divisor)
        dz += grad
        dz -= g_sum / n
        dz *= inv_std
        return dz.to(ctx.dtype), None, None, None


class _ColumnMoments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z, unbiased, group):
        _, mean, var, ctx.divisor = _centre(z, unbiased, group)
        ctx.save_for_backward(z, mean)
        ctx.group = group
        return mean, var

    @staticmethod
    @first_order
    def backward(ctx: Any, g_mean, g_var):
        z, mean = ctx.saved_tensors
        g_mean, g_var = all_reduce_sum(torch.stack([g_mean, g_var]), ctx.group)
        n = len(z) * world_size(ctx.group)
        dz = (z - mean).mul_(g_var * (2 / ctx.divisor)).add_(g_mean / n)
        return dz.to(z.dtype), None, None


class _CrossDiagonal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a, b):
        ctx.save_for_backward(a, b)
        acc = accumulator(a.dtype)
        return finished(_column_dot(a.to(acc), b.to(acc)))

    @staticmethod
    @first_order
    def backward(ctx: Any, grad):
        a, b = ctx.saved_tensors
        return (grad * b).to(a.dtype), (grad * a).to(b.dtype)


class _FrobeniusByCovariance(torch.autograd.Function):
    """Keeps C = a^T b, summed over ranks; d|C|^2/da = 2 b C^T, d/db = 2 a C."""

    @staticmethod
    def forward(ctx: Any, a, b, group):
        acc = accumulator(a.dtype)
        c_DE = all_reduce_sum(a.to(acc).T @ b.to(acc), group)
        ctx.save_for_backward(a, b, c_DE)
        ctx.group = group
        return _column_dot(c_DE, c_DE).sum()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad):
        a, b, c_DE = ctx.saved_tensors
        grad = 2 * all_reduce_sum(grad, ctx.group)
        da = b.to(c_DE.dtype) @ c_DE.T if ctx.needs_input_grad[0] else None
        db = a.to(c_DE.dtype) @ c_DE if ctx.needs_input_grad[1] else None
        return _times(da, grad, a.dtype), _times(db, grad, b.dtype), None


class _FrobeniusByGram(torch.autograd.Function):
    """Keeps this rank's rows of a a^T and b b^T; d/da = 2 (b b^T) a on those rows, d/db alike.

    A row's Gram meets every rank's rows, so its gradient is whole without a second collective.
    """

    @staticmethod
    def forward(ctx: Any, a, b, group):
        acc = accumulator(a.dtype)
        all_a, all_b = (all_gather_nograd(t, group, check=False) for t in (a, b))
        gram_a = a.to(acc) @ all_a.to(acc).T
        gram_b = gram_a if a is b else b.to(acc) @ all_b.to(acc).T
        ctx.save_for_backward(all_a, all_b, gram_a, gram_b)
        ctx.group = group
        return all_reduce_sum(_column_dot(gram_a, gram_b).sum(), group)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad):
        all_a, all_b, gram_a, gram_b = ctx.saved_tensors
        grad = 2 * all_reduce_sum(grad, ctx.group)
        da = gram_b @ all_a.to(gram_b.dtype) if ctx.needs_input_grad[0] else None
        db = gram_a @ all_b.to(gram_a.dtype) if ctx.needs_input_grad[1] else None
        return _times(da, grad, all_a.dtype), _times(db, grad, all_b.dtype), None


def _times(product: Tensor | None, grad: Tensor, dtype: torch.dtype) -> Tensor | None:
    return None if product is None else product.mul_(grad).to(dtype)


def prefers_gram(rows: int, features: int) -> bool:
    """Whether |a^T b|^2 is cheaper by N x N Grams (4 N^2 D) than by the covariance (3 N D^2)."""
    return rows < 0.75 * features


def _frobenius_torch(a, b, process_group):
    rows = len(a) * world_size(process_group)
    gram = prefers_gram(rows, min(a.shape[1], b.shape[1]))
    return (_FrobeniusByGram if gram else _FrobeniusByCovariance).apply(a, b, process_group)


_STANDARDISE = declare("standardise", torch=_Standardise.apply, reference=standardise_reference)
_FROBENIUS = declare("frobenius_sq", torch=_frobenius_torch, reference=frobenius_sq_reference)


def _check_rows(unbiased: bool, group: Group, **tensors: Tensor) -> None:
    """Refuse what is not (N, D) float rows, as many on every rank and enough for a variance.

    What all ranks refuse together comes first: one that left alone would leave the others waiting.
    """
    require_all_even(group, **tensors)
    require_float(**tensors)
    for name, x in tensors.items():
        if x.ndim != 2:
            raise ValueError(f"{name} must be (N, D), got {tuple(x.shape)}")
        if len(x) * world_size(group) <= int(unbiased):
            raise ValueError(f"{name} must have more than {int(unbiased)} rows, got {len(x)}")


def column_moments(z: Tensor, *, unbiased: bool = False, process_group: Group = None) -> Moments:
    """Mean and variance of each column over the joined batch: (D,) float32 both, on every rank.

    z (N, D): this rank's rows, any float dtype, as many on every rank.  Gradients are exact through
    the global statistics; first order only.
    Raises ValueError for other shapes, no row (unbiased: no second row) and uneven ranks.

    >>> column_moments(torch.tensor([[1.0], [3.0]]))
    Moments(mean=tensor([2.]), var=tensor([1.]))
    """
    _check_rows(unbiased, process_group, z=z)
    with full_precision(z.device):
        mean, var = _ColumnMoments.apply(z, unbiased, process_group)  # type: ignore[misc]
        return Moments(mean, var)


def standardise(
    z: Tensor,
    *,
    eps: float,
    unbiased: bool = False,
    process_group: Group = None,
    impl: str = "auto",
) -> Tensor:
    """This rank's rows, each column of the joined batch at mean 0 and variance 1: (N, D) float32.

    z (N, D): any float dtype, as many rows on every rank.  eps is added to the variance, inside the
    root; biased variance by default, as batch normalisation has it.  The gradient is exact through
    the global mean and variance (one (2, D) all-reduce); first order only.
    impl: "auto", "torch" or "reference" (gathers the batch and computes in z's dtype).
    Raises ValueError for other shapes, eps < 0, too few rows, uneven ranks and an unknown impl.

    >>> standardise(torch.tensor([[1.0], [3.0]]), eps=0.0)
    tensor([[-1.],
            [ 1.]])
    """
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    _check_rows(unbiased, process_group, z=z)
    out = _STANDARDISE(impl, z.device, z, eps, unbiased, process_group)
    return out.to(accumulator(z.dtype))


def cross_diagonal(a: Tensor, b: Tensor) -> Tensor:
    """sum_n a_nd b_nd over this rank's rows: the diagonal of a^T b, (D,) float32.

    a, b (N, D), any float dtype.  No collective: all_reduce_sum joins ranks.  First order only.
    Raises ValueError for shapes that differ or are not (N, D).

    >>> cross_diagonal(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])).tolist()
    [3.0, 8.0]
    """
    require_float(a=a, b=b)
    if a.ndim != 2 or a.shape != b.shape:
        got = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise ValueError(f"a and b must both be (N, D), got {got}")
    with full_precision(a.device):
        return _CrossDiagonal.apply(a, b)  # pyright: ignore[reportReturnType]


def frobenius_sq(
    a: Tensor, b: Tensor, *, process_group: Group = None, impl: str = "auto"
) -> Tensor:
    """|a^T b|_F^2 over the joined batch: a float32 scalar, the same on every rank.

    a (N, D), b (N, E): this rank's rows, any float dtype, as many on every rank.  The sum of C_ij^2
    off the diagonal is this minus cross_diagonal(a, b).square().sum().  First order only.
    impl: "auto", "torch" (Grams or covariance, whichever is cheaper) or "reference" (covariance of
    the gathered batch, in a's dtype).
    Raises ValueError for other shapes, uneven ranks and an unknown impl.

    >>> frobenius_sq(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])).item()
    45.0
    """
    _check_rows(False, process_group, a=a, b=b)
    if a.shape[:1] != b.shape[:1] or a.dtype != b.dtype:
        got = f"{tuple(a.shape)} {a.dtype} and {tuple(b.shape)} {b.dtype}"
        raise ValueError(f"a and b must have the same rows and dtype, got {got}")
    out = _FROBENIUS(impl, a.device, a, b, process_group)
    return out.to(accumulator(a.dtype))
