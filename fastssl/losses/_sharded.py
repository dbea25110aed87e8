"""Log-sum-exps over the pairs of a batch that is spread over ranks.

    q (b, D), k (n, D) on each of W ranks         s_ij = scale q_i . k_j over the joined batch
    rows (b,)   over all W n keys                 of this rank's rows
    cols (n,)   over all W b rows                 of this rank's keys, with both=True

"gather": this rank's rows meet every rank's keys, b x W n pairs; the columns' sums, of which each
rank has a part, are exchanged.  "ring": the keys go round, and no rank holds them all (_ring.py);
of symmetric scores every pair is computed once, where "gather" computes both halves.
Value and gradient are exact either way: see fastssl.distributed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fastssl.distributed import (
    Group,
    all_gather_nograd,
    all_gather_rows,
    all_to_all_rows,
    world_size,
)
from fastssl.kernels import PairMask, pairwise_lse
from fastssl.kernels.pairwise import Masks, as_number, check_pairs

from ._ring import ring_lse

STRATEGIES = ("gather", "ring")


class Rule(NamedTuple):
    """A pair mask's rule with this rank's ids (b,) of its rows and (n,) of its keys.

    Ids are those of the joined batch: two ranks' rows must not share one by accident.
    """

    mask: PairMask
    row_ids: Tensor
    col_ids: Tensor


def sharded_lse(
    q: Tensor,
    k: Tensor,
    scale: float | Tensor,
    *,
    rules: Sequence[Rule] = (),
    both: bool = False,
    process_group: Group = None,
    strategy: str = "gather",
) -> tuple[Tensor, Tensor]:
    """Row log-sum-exps (b,) over every rank's keys, and column ones (n,) over every rank's rows.

    q, k: of this rank, the same shapes on every rank (not checked here); k may be q itself.
    scale: as in `pairwise_lse`.  The columns' are (0,) unless `both`.
    """
    W = world_size(process_group)
    if strategy == "ring" and W > 1:
        masks = Masks()
        for rule, row_ids, col_ids in rules:
            masks = masks & (rule(row_ids) if row_ids is col_ids else rule(row_ids, col_ids))
        check_pairs(q, k, masks)
        return ring_lse(q, k, as_number("scale", scale, q, rows=True), masks, both, process_group)
    keys = all_gather_rows(k, process_group, check=False) if W > 1 else k
    masks = Masks()
    for rule, row_ids, col_ids in rules:
        alike = W == 1 and row_ids is col_ids
        ids = all_gather_nograd(col_ids, process_group, check=False)
        masks = masks & (rule(row_ids) if alike else rule(row_ids, ids))
    if not both:
        rows = pairwise_lse(q, keys, scale, mask=masks)
        return rows, rows.new_empty(0)
    rows, cols = pairwise_lse(q, keys, scale, mask=masks, both=True)
    if W > 1:
        cols = all_to_all_rows(cols, process_group).unflatten(0, (W, -1)).logsumexp(0)
    return rows, cols


def check_strategy(strategy: str) -> str:
    """Raise ValueError for a strategy that is not there."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    return strategy
