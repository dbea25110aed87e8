"""The size of a cross-correlation, over the joined batch of all ranks.

    frobenius_sq(a, b) = |a^T b|_F^2 = sum_ij (a_i . a_j)(b_i . b_j)       a (N, D), b (N, E)
    cross_correlation(a, b) = its diagonal sum_n a_nd b_nd, and the rest of those squares

Why: the D x D matrix a^T b costs N D^2 and D^2 floats, several times over in eager; the two N x N
Gram matrices give the same number for N^2 D, and are symmetric.  No matrix larger than the inputs
is ever held.  `plans.py` has the ways to it, and which one is taken.
Accuracy: sums are float32 (float64 of float64).  By Grams the squares off the diagonal are a
difference of two sums, each good to about 1e-7 of all squares.
Memory: O(min(N, D)^2).  In place: nothing.
Source: Zbontar et al. 2021, arXiv:2103.03230, eq. 1; the trace identity |a^T b|^2 = tr(aa^T bb^T).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.distributed import Group, all_gather_rows, world_size

from ..common.autograd import accumulator
from ..common.checks import check_pair, check_rows
from ..common.dispatch import declare
from .plans import PLANS, choose

# Up to these many numbers of a covariance, that one, in torch's own graph, costs least: where it is
# the plan, and where Grams would be.
PLAIN, TINY = 1 << 16, 1 << 14


class Correlation(NamedTuple):
    """A cross-correlation a^T b: its diagonal (D,), and the sum of all other squares, 0-d."""

    diagonal: Tensor
    off_diagonal_sq: Tensor


def correlation_reference(a, b, split, plan, group):
    """By the D x E matrix of the gathered batch, in the dtype it is given; float32 results."""
    rows, acc = all_gather_rows(a, group), accumulator(a.dtype)
    c_DE = rows.T @ (rows if b is None else all_gather_rows(b, group))
    if not split:
        return None, c_DE.square().sum().to(acc)
    diagonal = c_DE.diagonal()
    return diagonal.to(acc), (c_DE - diagonal.diag()).square().sum().to(acc)


def plain(a, b, split):
    """One process: the matrix whole, differentiated by torch."""
    wide = a.to(accumulator(a.dtype))
    c_DE = wide.T @ (wide if b is None else b.to(wide.dtype))
    flat = c_DE.flatten()
    total = torch.dot(flat, flat)
    if not split:
        return None, total
    diagonal = c_DE.diagonal()
    return diagonal, total - torch.dot(diagonal, diagonal)


def _run(a, b, split, plan, group, impl):
    size = a.shape[1] * (a if b is None else b).shape[1]
    small = size <= PLAIN and plan == "covariance" or size <= TINY and plan != "sharded"
    if impl == "torch" and small and world_size(group) == 1:
        return plain(a, b, split)
    return PLANS[plan].call(a, b, split, group, impl)


_CORRELATION = declare("frobenius_sq", _run, correlation_reference)


def correlation_plan(
    rows: int, D: int, E: int, *, world: int = 1, itemsize: int = 4, same: bool = False
) -> str:
    """The plan that "auto" means: "gram", "covariance" or "sharded".

    rows: of one rank.  D, E: features of a and b.  itemsize: bytes of a number.  same: a is b.

    >>> correlation_plan(256, 8192, 8192), correlation_plan(4096, 2048, 2048, world=8)
    ('gram', 'covariance')
    """
    return choose(rows, D, E, world, itemsize, 1 if same else 2)


def plan_for(plan: str, a: Tensor, b: Tensor, group: Group, counts: tuple[int, int]) -> str:
    """What `plan` means for a and b; counts: `choose`'s sides and matrices.

    Raises ValueError for a plan that does not exist.
    """
    if plan == "auto":
        sizes = a.shape[0], a.shape[1], b.shape[1]
        return choose(*sizes, world_size(group), a.element_size(), *counts)
    if plan not in PLANS:
        raise ValueError(f"plan must be one of auto, {', '.join(PLANS)}, got {plan!r}")
    return plan


def _correlation(
    a: Tensor, b: Tensor, split: bool, plan: str, group: Group, impl: str
) -> tuple[Tensor, Tensor]:
    check_rows(1, group, a=a, b=b)
    check_pair(a, b)
    if a.shape[0] != b.shape[0] or (split and a.shape != b.shape):
        got = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise ValueError(f"a and b must have the same {'shape' if split else 'rows'}, got {got}")
    plan = plan_for(plan, a, b, group, (1 if a is b else 2, 1))
    other = None if a is b else b
    return _CORRELATION(impl, a, other, split, plan, group, inputs={"a": a})


def cross_correlation(
    a: Tensor, b: Tensor, *, plan: str = "auto", process_group: Group = None, impl: str = "auto"
) -> Correlation:
    """Diagonal of a^T b and the sum of its other squares, over the joined batch; float32.

    a, b (N, D): this rank's rows, any float dtype, as many on every rank; a may be b.  Sums, not
    means, the same on every rank.  First order only.
    plan: "auto", or one of "gram", "covariance" and "sharded": see `correlation_plan`.
    impl: "auto", "triton", "torch" or "reference" (D x D of the gathered batch, in a's dtype).
    Raises ValueError for other shapes, dtypes or devices, uneven ranks, an unknown plan or impl.

    >>> cross_correlation(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))
    Correlation(diagonal=tensor([3., 8.]), off_diagonal_sq=tensor(52.))
    """
    diagonal, off_diagonal_sq = _correlation(a, b, True, plan, process_group, impl)
    if a.shape[1] == 1:  # else the difference of two large numbers, or of infinities
        off_diagonal_sq = torch.zeros_like(off_diagonal_sq)
    return Correlation(diagonal, off_diagonal_sq)


def frobenius_sq(
    a: Tensor, b: Tensor, *, plan: str = "auto", process_group: Group = None, impl: str = "auto"
) -> Tensor:
    """|a^T b|_F^2 over the joined batch: a float32 scalar, the same on every rank.

    a (N, D), b (N, E): this rank's rows, any float dtype, as many on every rank.  a may be b: then
    the matrices are symmetric, and half of each is computed.  First order only.
    plan: "auto", or one of "gram", "covariance" and "sharded": see `correlation_plan`.
    impl: "auto", "triton", "torch" or "reference" (D x E of the gathered batch, in a's dtype).
    Raises ValueError for other shapes, dtypes or devices, uneven ranks, an unknown plan or impl.

    >>> frobenius_sq(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])).item()
    45.0
    """
    return _correlation(a, b, False, plan, process_group, impl)[1]
