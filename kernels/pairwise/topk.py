"""The n best similarities of each row, streamed over tiles.

    s_ij = q_i . k_j
    values_i = the n largest s_ij over kept j, descending    indices_i = their j

Why: eager makes all (M, N) scores to keep n of each row.  This holds one tile of them and the
running best: a k-nearest-neighbor search over a whole data set fits beside the model.
Traffic: q once, k once per row of tiles, 12 n bytes a row out.  Compute-bound for D above a few
tens.  Memory: O(M n).  No gradient.  In place: nothing.
pairwise_topk is an operator of torch, so that torch.compile keeps it whole; topk_triton.py has the
Triton kernel.
Source: blockwise selection as in Johnson et al. 2017, FAISS, arXiv:1702.08734, section 4.
"""

from __future__ import annotations

import math
from numbers import Integral

import torch
from torch import Tensor

from ..common.autograd import accumulator
from ..common.chunks import spans, tile_shape
from ..common.dispatch import declare
from ..common.operators import operator
from ..common.rows import evened
from .lse import Mask, check_pairs
from .masks import Masks, Tile
from .topk_configs import MOST


def pairwise_topk_reference(q, k, n, mask: Masks):
    """The formula, eager, in the dtype it is given: the tests' oracle.  Holds (M, N) scores."""
    s_MN = q @ k.T
    return s_MN.masked_fill(~mask.keep(len(q), len(k), q.device), -math.inf).topk(n, dim=1)


def topk_torch(
    q: Tensor, k: Tensor, n: int, row_ids: Tensor | None, col_ids: Tensor | None, mask: str
) -> tuple[Tensor, Tensor]:
    """Values and indices (M, n), best first; the ids and mask are those of `Masks`."""
    tile = Tile(mask, row_ids, col_ids, q.device)
    acc = accumulator(q.dtype)
    values = q.new_empty(len(q), n, dtype=acc)
    indices = q.new_empty(len(q), n, dtype=torch.int64)
    keys = k.to(acc)
    R, C = tile_shape(len(q), len(k), keys)
    scores = keys.new_empty(R * C)  # one tile's, however many there are
    for i in spans(len(q), R):
        x = q[i].to(acc)
        best = x.new_full((len(x), n), -math.inf)
        where = torch.full_like(best, -1, dtype=torch.int64)
        for j in spans(len(k), C):
            part = keys[j]
            s = scores[: len(x) * len(part)].view(len(x), len(part))
            tile.drop(torch.mm(x, part.T, out=s), i, j)
            v, at = s.topk(min(n, s.shape[1]), dim=1)
            both, places = torch.cat([best, v], 1), torch.cat([where, at + j.start], 1)
            best, chosen = both.topk(n, dim=1)
            where = places.gather(1, chosen)
        values[i], indices[i] = best, where
    return values, indices


def _topk(
    q: Tensor,
    k: Tensor,
    n: int,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    mask: str,
    impl: str,
) -> tuple[Tensor, Tensor]:
    if impl == "torch":
        return topk_torch(q, k, n, row_ids, col_ids, mask)
    from .topk_triton import topk

    return topk(evened(q), evened(k), n, row_ids, col_ids, mask)


def _fake(q, k, n, row_ids, col_ids, mask, impl):
    shape = q.shape[0], n
    return q.new_empty(shape, dtype=accumulator(q.dtype)), q.new_empty(shape, dtype=torch.int64)


_search = operator("pairwise_topk", _topk, _fake)


def _run(q, k, n, mask: Masks, impl: str):
    return _search(q, k, n, *mask.ids(), mask.key, impl)


_TOPK = declare("pairwise_topk", _run, pairwise_topk_reference)


@torch.no_grad()
def pairwise_topk(
    q: Tensor,
    k: Tensor,
    n: int,
    *,
    mask: Mask = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The n largest q_i . k_j of each row, best first: values (M, n) float32, indices (M, n) int64.

    q (M, D), k (N, D): any float dtype, the same for both; products in float32.
    mask: as in `pairwise_lse`.  A row with fewer than n pairs left is filled up
    with value -inf and index -1.  Equal values come in no promised order, and a NaN before all
    numbers.  No gradient.
    impl: "auto", "triton", "torch" or "reference" (the formula, with (M, N) scores).  auto is
    triton on CUDA, and torch elsewhere, for float64, n > 256 and for a rule without Triton twin.
    float64 inputs are multiplied and returned in float64, by torch and the reference alone.
    Raises ValueError for n outside 1..N, for impl="triton" with n > 256, and for what
    `pairwise_lse` refuses.

    >>> values, indices = pairwise_topk(torch.eye(2), torch.eye(2), 1)
    >>> values.tolist(), indices.tolist()
    ([[1.0], [1.0]], [[0], [1]])
    """
    masks = check_pairs(q, k, mask)
    if not isinstance(n, Integral | torch.SymInt):
        raise ValueError(f"n must be an integer, got {n!r}")
    if not 1 <= n <= len(k):
        raise ValueError(f"n must lie between 1 and N = {len(k)}, got {n}")
    problem = masks.problem
    if n > MOST:
        problem = f"impl='triton' is for n up to {MOST}, got {n}; impl='torch' takes any"
    values, indices = _TOPK(impl, q, k, n, masks, inputs={"q": q}, problem=problem)
    return values.to(accumulator(q.dtype)), indices.masked_fill(values == -math.inf, -1)
