"""Statistics of columns over the joined batch of all ranks.

    mu, var = mean and variance of each column over N rows         z (N, D)
    standardize(z) = (z - mu) / sqrt(var + eps)
    cross_diagonal(a, b)_d = sum_n a_nd b_nd

    d standardize: dz = (g - sum g / N - out * sum(g out) / M) / sqrt(var + eps),  var = sum / M

Why: batch norm without affine, over all ranks on any back end, and each column's numbers alone.
Ranks are joined by their differences from rank 0's mean, so a column at 1e6 loses nothing to
cancellation.  Traffic: z once, the result once; backward its gradient and itself once, dz once.
In place: nothing.
Source: Ioffe & Szegedy 2015, arXiv:1502.03167 (gradient through the statistics); Chan, Golub &
LeVeque 1983, "Algorithms for computing the sample variance" (correction, joining of parts).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastssl.distributed import Group, all_gather_rows, world_size

from ..common.autograd import accumulator
from ..common.checks import check_pair, check_rows, require_at_least, require_features
from ..common.dispatch import declare
from . import moments_torch
from .moments_ops import ColumnMoments, CrossDiagonal, Standardize, StandardizeAtOnce


class Moments(NamedTuple):
    """Column statistics of the joined batch: mean (D,) and variance (D,)."""

    mean: Tensor
    var: Tensor


def column_moments_reference(z: Tensor, unbiased: bool = False, process_group: Group = None):
    """Mean and variance of the gathered batch, in the dtype it is given."""
    rows = all_gather_rows(z, process_group)
    return Moments(rows.mean(0), rows.var(0, correction=int(unbiased)))


def standardize_reference(z, eps, unbiased, process_group):
    """The formula on the gathered batch, in the dtype it is given; this rank's rows of it."""
    mean, var = column_moments_reference(z, unbiased, process_group)
    return (z - mean) / (var + eps).sqrt()


def cross_diagonal_reference(a, b):
    """The formula, in the dtype it is given."""
    return (a * (a if b is None else b)).sum(0)


def _standardize(z, eps, unbiased, group, impl):
    if world_size(group) > 1:
        return Standardize.call(z, eps, unbiased, group, impl)
    if impl == "torch":
        return moments_torch.standardize(z, eps, unbiased)
    return StandardizeAtOnce.call(z, eps, unbiased, impl)


_MOMENTS = declare("column_moments", ColumnMoments.call, column_moments_reference)
_STANDARDIZE = declare("standardize", _standardize, standardize_reference)
_DIAGONAL = declare("cross_diagonal", CrossDiagonal.call, cross_diagonal_reference)


def column_moments(
    z: Tensor, *, unbiased: bool = False, process_group: Group = None, impl: str = "auto"
) -> Moments:
    """Mean and variance of each column over the joined batch: (D,) float32 both, on every rank.

    z (N, D): this rank's rows, any float dtype, as many on every rank; one read of them, and a
    second from cache.  The variance loses nothing to a mean far from zero.  Gradients are exact
    through the global statistics; first order only.
    impl: "auto", "triton", "torch" or "reference" (gathers, and computes in z's dtype).
    Raises ValueError for other shapes, fewer than 2 rows in all, uneven ranks, an unknown impl.

    >>> import torch
    >>> column_moments(torch.tensor([[1.0], [3.0]]))
    Moments(mean=tensor([2.]), var=tensor([1.]))
    """
    check_rows(2, process_group, z=z)
    acc = accumulator(z.dtype)
    mean, var = _MOMENTS(impl, z, unbiased, process_group, inputs={"z": z})
    return Moments(mean.to(acc), var.to(acc))


def standardize(
    z: Tensor,
    *,
    eps: float,
    unbiased: bool = False,
    process_group: Group = None,
    impl: str = "auto",
) -> Tensor:
    """This rank's rows, each column of the joined batch at mean 0 and variance 1: as z, (N, D).

    z (N, D): any float dtype, as many rows on every rank.  eps is added to the variance, inside the
    root; biased variance by default, as batch normalization has it.  A constant column becomes
    zeros, for eps = 0 too, where its gradient is zero as well.  The gradient is exact through
    the global mean and variance (one (2, D) all-reduce); first order only.
    impl: "auto", "triton", "torch" or "reference" (gathers the batch; a constant column is nan at
    eps = 0).
    Raises ValueError for other shapes, eps < 0, fewer than 2 rows in all (a variance of one number
    is undefined), uneven ranks and an unknown impl.

    >>> import torch
    >>> standardize(torch.tensor([[1.0], [3.0]]), eps=0.0)
    tensor([[-1.],
            [ 1.]])
    """
    require_at_least(0, eps=eps)
    check_rows(2, process_group, z=z)
    return _STANDARDIZE(impl, z, eps, unbiased, process_group, inputs={"z": z})


def cross_diagonal(a: Tensor, b: Tensor, *, impl: str = "auto") -> Tensor:
    """sum_n a_nd b_nd over this rank's rows: the diagonal of a^T b, (D,) float32.

    a, b (N, D), any float dtype.  No collective: all_reduce_sum joins ranks.  First order only.
    impl: "auto", "triton", "torch" or "reference".
    Raises ValueError for shapes, dtypes or devices that differ, or shapes that are not (N, D).

    >>> import torch
    >>> cross_diagonal(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])).tolist()
    [3.0, 8.0]
    """
    check_pair(a, b)
    if a.ndim != 2 or a.shape != b.shape:
        got = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise ValueError(f"a and b must both be (N, D), got {got}")
    require_features(a=a)
    out = _DIAGONAL(impl, a, None if b is a else b, inputs={"a": a})
    return out.to(accumulator(a.dtype))
