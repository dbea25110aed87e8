"""The n best similarities of each row, streamed over tiles.

    s_ij = q_i . k_j
    values_i = the n largest s_ij over kept j, descending    indices_i = their j

Why: eager makes all (M, N) scores to keep n of each row.  This holds one tile of them and the
running best: a k-nearest-neighbour search over a whole data set fits beside the model.
Traffic: q once, k once per row of tiles, 12 n bytes a row out.  Compute-bound for D above a few
tens.  Memory: O(M n).  No gradient.  In place: nothing.
Source: blockwise selection as in Johnson et al. 2017, FAISS, arXiv:1702.08734, section 4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._chunks import spans, tile_shape
from ._dispatch import accumulator, declare
from .pairwise import PairMask, check_pairs, scores


def pairwise_topk_reference(q, k, n, mask, row_ids, col_ids):
    """The formula, eager, in the dtype it is given: the tests' oracle.  Holds (M, N) scores."""
    s_MN = q @ k.T
    if mask is not None:
        s_MN = s_MN.masked_fill(~mask.keep(row_ids[:, None], col_ids[None, :]), -math.inf)
    return s_MN.topk(n, dim=1)


def _topk_torch(q, k, n, mask, row_ids, col_ids):
    acc = accumulator(q.dtype)
    values = q.new_empty(len(q), n, dtype=acc)
    indices = q.new_empty(len(q), n, dtype=torch.int64)
    keys = k.to(acc)
    R, C = tile_shape(len(q), len(k), keys)
    for i in spans(len(q), R):
        x = q[i].to(acc)
        best = x.new_full((len(x), n), -math.inf)
        where = torch.full_like(best, -1, dtype=torch.int64)
        for j in spans(len(k), C):
            s = scores(x, keys[j], row_ids[i], col_ids[j], mask)
            v, at = s.topk(min(n, s.shape[1]), dim=1)
            both, places = torch.cat([best, v], 1), torch.cat([where, at + j.start], 1)
            best, chosen = both.topk(n, dim=1)
            where = places.gather(1, chosen)
        values[i], indices[i] = best, where
    return values, indices


_TOPK = declare("pairwise_topk", torch=_topk_torch, reference=pairwise_topk_reference)


@torch.no_grad()
def pairwise_topk(
    q: Tensor,
    k: Tensor,
    n: int,
    *,
    mask: PairMask | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The n largest q_i . k_j of each row, best first: values (M, n) float32, indices (M, n) int64.

    q (M, D), k (N, D): any float dtype, the same for both; products in float32.
    mask, row_ids, col_ids: as in `pairwise_lse`.  A row with fewer than n pairs left is filled up
    with value -inf and index -1.  Equal values come in no promised order.  No gradient.
    Raises ValueError for n outside 1..N, and what `pairwise_lse` refuses.

    >>> values, indices = pairwise_topk(torch.eye(2), torch.eye(2), 1)
    >>> values.tolist(), indices.tolist()
    ([[1.0], [1.0]], [[0], [1]])
    """
    rows, cols = check_pairs(q, k, row_ids, col_ids)
    if not 1 <= n <= len(k):
        raise ValueError(f"n must lie between 1 and N = {len(k)}, got {n}")
    values, indices = _TOPK(impl, q.device, q, k, n, mask, rows, cols)
    return values.to(accumulator(q.dtype)), indices.masked_fill(values == -math.inf, -1)
