"""The nearest neighbors of each row: in its group of rows, on this rank or on all.

    indices_ik = the j of the k-th largest x_i . x_j among rows j != i of i's group

The joined batch of W ranks, W B rows in rank order, is cut into groups of as many rows each, one
after the other; without a process group each rank's own B rows are.
Why: as `pairwise_topk`, on which it is built: no scores are kept.
Ranks: rows of a group that reaches beyond this rank are gathered, once, with a gradient that goes
back to the rank they came from.
Source: Sablayrolles et al. 2019, arXiv:1806.03198, section 3.2; groups and the k nearest:
Simeoni et al. 2025, DINOv3, arXiv:2508.10104, whose KoLeo term takes them across ranks.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.distributed import LOCAL, Group, all_gather_rows, rank, world_size

from ..common.checks import check_rows
from ..pairwise import exclude_self, pairwise_topk, same_group


class Neighbors(NamedTuple):
    """rows (N, D): where neighbors are looked for, this rank's rows among them; with a gradient.
    indices (B, topk) int64: the neighbors of each row, nearest first, as places in `rows`."""

    rows: Tensor
    indices: Tensor


def nearest_reference(x: Tensor, topk: int, groups: int) -> Tensor:
    """The places (B, topk) in one process, by all B x B products."""
    blocks = x.unflatten(0, (groups, -1))
    s = (blocks @ blocks.mT).detach()
    s.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    first = torch.arange(groups, device=x.device).view(-1, 1, 1) * blocks.shape[1]
    return (s.topk(topk, dim=2).indices + first).flatten(0, 1)


def nearest(
    x: Tensor,
    *,
    topk: int = 1,
    groups: int = 1,
    process_group: Group = LOCAL,
    impl: str = "auto",
) -> Neighbors:
    """The topk rows of largest x_i . x_j beside itself, of each row of x: `Neighbors`.

    x (B, D): any float dtype; of rows of length one these are the nearest by distance.
    groups: into how many the rows of all ranks of process_group are cut, of one size each; LOCAL:
    this rank's rows.  What is nearest has no gradient; rows[indices] has one, to x on every rank.
    impl: that of `pairwise_topk`.
    Raises ValueError for what is not (B, D) floats, as many on every rank; for groups that do not
    divide all rows; for a topk that is not in 1..rows of a group - 1.

    >>> nearest(torch.tensor([[1.0], [2.0], [-1.0], [-3.0]])).indices.T
    tensor([[1, 0, 3, 2]])
    """
    check_rows(2, process_group, x=x)
    B = len(x)
    N = B * world_size(process_group)
    if not isinstance(groups, int) or groups < 1 or N % groups:
        raise ValueError(f"groups must divide the {N} rows, got {groups!r}")
    size = N // groups
    if not isinstance(topk, int) or not 1 <= topk < size:
        raise ValueError(f"topk must lie in 1..{size - 1}, the others of a group, got {topk!r}")
    first = B * rank(process_group)
    low, high = first // size * size, -(-(first + B) // size) * size
    alone = low == first and high == first + B
    rows = x if alone else all_gather_rows(x, process_group, check=False)[low:high]
    mask = exclude_self
    if not alone or size < B:
        there = torch.arange(low, high, device=x.device)
        here = torch.arange(first, first + B, device=x.device)
        mask = exclude_self(here, there)
        if high - low > size:
            mask = mask & same_group(here // size, there // size)
    q, k = x.detach(), rows.detach()
    return Neighbors(rows, pairwise_topk(q, k, topk, mask=mask, impl=impl)[1])
