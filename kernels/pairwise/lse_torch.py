"""Pairwise log-sum-exps and their gradients in torch, a tile of scores at a time.

    s_ij = scale_i q_i . k_j + bias_j        M rows, N columns, D features
    stats (2, M): m_i and l_i = sum_j exp(s_ij - m_i), lse_i = m_i + log l_i; likewise of columns
    W_ij = g_i exp(s_ij - m_i) / l_i + h_j exp(s_ij - m_j) / l_j        g, h upstream
    dq_i = scale_i u_i    u_i = sum_j W_ij k_j        dk_j = sum_i W_ij scale_i q_i
    dscale_i = q_i . u_i                              dbias_j = sum_i W_ij

m is the maximum, or 0 where the norms of q and k tell that no exponential can overflow or vanish.
One exponential of s_ij - c serves row and column, c one number for a tile whose maxima lie within
SAFE of each other (e.g. of CLIP's scores), or 0; elsewhere each side takes its own.
`ahead` gives the loss and its gradients at once: some tiles of the forward are then still there.
Memory: a tile, and q, k and the gradients in float32; ahead also KEPT_BYTES of tiles.  What it is
for stands in lse.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.autograd import accumulator
from ..common.chunks import spans, tile_shape
from .masks import Tile

SAFE = 40.0  # exp(+-40) times any number of pairs is far from float32's ends
KEPT_BYTES = 1 << 25  # of exponentials, from the forward to the gradients
Spans = list[tuple[slice, slice]]
Sides = tuple[Tensor | None, Tensor | None]
Need = tuple[bool, bool, bool, bool]  # which gradients: of q, k, scale and bias


class Pairs(NamedTuple):
    """What the scores are made of.

    q (M, D), k (N, D); scale 0-d or (M,); bias (N,) or None; row_ids (P, M), col_ids (P, N) or
    None and mask: those of `Masks.ids` and `Masks.key`.  same: k is q, and the scores symmetric.
    """

    q: Tensor
    k: Tensor
    scale: Tensor
    bias: Tensor | None
    row_ids: Tensor | None
    col_ids: Tensor | None
    mask: str
    same: bool


class _Scores:
    """Tiles of scores, a dropped pair at -inf.  most: what no score passes, if that is known."""

    def __init__(self, pairs: Pairs, most: float | None = None) -> None:
        acc = accumulator(pairs.q.dtype)
        self.keys = pairs.k.to(acc)
        self.scale = pairs.scale.to(acc)
        self.q = self.keys if pairs.same else pairs.q.to(acc)
        self.on_cpu = self.scale.device.type == "cpu"  # elsewhere to read a number would wait
        # A product takes one number with it.  With 0 it would not look at the rows, and hide a nan.
        host = self.scale.ndim == 0 and self.on_cpu and float(self.scale) != 0
        self.alpha = float(self.scale) if host else 1.0
        self.x = self.q if host else self.q * self.by_row
        self.bias = None if pairs.bias is None else pairs.bias.to(acc)
        self.tile = Tile(pairs.mask, pairs.row_ids, pairs.col_ids, pairs.q.device)
        self.most = most

    def __call__(self, i: slice, j: slice) -> Tensor:
        add, beta = (self.x.new_empty(()), 0) if self.bias is None else (self.bias[j], 1)
        s = torch.addmm(add, self.x[i], self.keys[j].T, beta=beta, alpha=self.alpha)
        return self.tile.drop(s, i, j)

    @property
    def by_row(self) -> Tensor:
        """The scale, to be multiplied with (M, D)."""
        return self.scale if self.scale.ndim == 0 else self.scale[:, None]

    @cached_property
    def bounded(self) -> bool:
        """Whether no score can leave +-SAFE; on a CPU alone, where looking costs no wait."""
        if self.most is not None or not self.on_cpu:
            return self.most is not None and self.most <= SAFE
        x, y = (torch.linalg.vector_norm(z, dim=1).max() for z in (self.x, self.keys))
        most = abs(self.alpha) * x * y
        if self.bias is not None:
            most = most + self.bias.abs().max()
        return bool(most <= SAFE)


def _tiles(pairs: Pairs, x: Tensor) -> Spans:
    """All tiles; of symmetric scores those on and above the diagonal."""
    M, N = len(x), len(pairs.k)
    R, C = tile_shape(M, N, x)
    if not pairs.same:
        return [(i, j) for i in spans(M, R) for j in spans(N, C)]
    blocks = list(spans(M, min(R, C)))
    return [(i, j) for a, i in enumerate(blocks) for j in blocks[a:]]


class _Tile(NamedTuple):
    """exp(s - ref) of a tile; ref: one number, or each row's (R,)."""

    e: Tensor
    ref: float | Tensor


class _Kept(dict[tuple[int, int], _Tile]):
    """Tiles of the forward, by where they begin, as many as there is room for."""

    def __init__(self, room: int = KEPT_BYTES) -> None:
        super().__init__()
        self.room = room

    def put(self, i: slice, j: slice, tile: _Tile | None) -> None:
        """Keep the tile, if it fits."""
        size = 0 if tile is None else tile.e.numel() * tile.e.element_size()
        if tile is not None and size <= self.room:
            self.room -= size
            self[i.start, j.start] = tile

    def take(self, i: slice, j: slice) -> _Tile | None:
        """The tile, which is then the caller's, or None."""
        return self.pop((i.start, j.start), None)


def _fold(stats: Tensor, total: Tensor, peak: Tensor, ref: float | Tensor) -> None:
    """Fold sums of exp(s - ref), of scores of that maximum, into the running maxima and sums."""
    m = torch.maximum(stats[0], peak)
    grown = total.mul_((ref - m).clamp_max_(SAFE).exp_())  # a row without a pair has no maximum
    stats[1].mul_((stats[0] - m).exp_()).add_(grown)
    stats[0].copy_(m)


def _fold_rows(stats: Tensor, s: Tensor) -> _Tile:
    """Fold a tile's scores into its rows' statistics; s becomes the tile."""
    m = torch.maximum(stats[0], s.amax(1))
    e = s.sub_(m.unsqueeze(1)).exp_()
    stats[1].mul_((stats[0] - m).exp_()).add_(e.sum(1))
    stats[0].copy_(m)
    return _Tile(e, m)


def _fold_both(rows: Tensor, cols: Tensor, s: Tensor, on_cpu: bool) -> _Tile | None:
    """The same of rows and of columns, by one exponential where the maxima are near each other."""
    sides = (1, rows, s.amax(1)), (0, cols, s.amax(0))
    high = float(sides[0][2].max()) if on_cpu else math.inf
    if math.isfinite(high) and high - min(_least(peak) for _, _, peak in sides) <= SAFE:
        e = s.sub_(high).exp_()
        for dim, stats, peak in sides:
            _fold(stats, e.sum(dim), peak, high)
        return _Tile(e, high)
    for dim, stats, peak in sides:
        m = torch.maximum(stats[0], peak)
        _fold(stats, (s - m.unsqueeze(dim)).exp_().sum(dim), peak, m)
    return None


def _least(peak: Tensor) -> float:
    """The least of the maxima of rows that have a pair left."""
    least = float(peak.min())
    return least if least > -math.inf else float(peak.masked_fill(peak == least, math.inf).min())


def _empty_stats(n: int, x: Tensor, bounded: bool) -> Tensor:
    # The least finite number, not -inf: a row with nothing left must not meet -inf - -inf.
    stats = x.new_zeros(2, n)
    if not bounded:
        stats[0] = torch.finfo(x.dtype).min
    return stats


def statistics(pairs: Pairs, both: bool) -> tuple[Tensor, Tensor]:
    """Statistics (2, M) of the rows, and (2, N) of the columns: (2, 0) unless `both`.

    Those of the columns are those of the rows, in another tensor, where the scores are symmetric.
    """
    rows, cols = _statistics(_Scores(pairs), pairs, both, _Kept(0))
    return rows, cols.clone() if both and pairs.same else cols if both else cols.new_empty(2, 0)


def _statistics(score: _Scores, pairs: Pairs, both: bool, kept: _Kept) -> tuple[Tensor, Tensor]:
    """Of rows and of columns, which of symmetric scores are one tensor."""
    bounded = score.bounded
    M, N = len(pairs.q), len(pairs.k)
    rows = _empty_stats(M, score.x, bounded)
    cols = rows if pairs.same else _empty_stats(N if both else 0, score.x, bounded)
    for i, j in _tiles(pairs, score.x):
        s = score(i, j)
        mirrored = both if not pairs.same else i != j
        if bounded:
            tile = _Tile(s.exp_(), 0.0)
            rows[1, i].add_(s.sum(1))
            if mirrored:
                cols[1, j].add_(s.sum(0))
        elif mirrored:
            tile = _fold_both(rows[:, i], cols[:, j], s, score.on_cpu)
        else:
            tile = _fold_rows(rows[:, i], s)
        kept.put(i, j, tile)
    return rows, cols


def log_sum(stats: Tensor) -> Tensor:
    """The log-sum-exp of statistics; -inf where no pair was left."""
    return stats[0] + stats[1].log()


def join(a: Tensor, b: Tensor) -> Tensor:
    """The statistics of two disjoint sets of pairs together."""
    m = torch.maximum(a[0], b[0])
    return torch.stack([m, a[1] * (a[0] - m).exp() + b[1] * (b[0] - m).exp()])


def weights(stats: Tensor, grad: Tensor) -> Tensor:
    """(2, M): m and g / l; a pair's W is that times e, in Triton 2, to the s - m; 0 of no pair."""
    m, total = stats
    return torch.stack([m, torch.where(total == 0, 0, grad.to(total.dtype) / total)])


class Grads(NamedTuple):
    """In float32 (float64 for float64): dq (M, D), dk (N, D), dscale like scale, dbias (N,).

    What was not asked for has no elements.
    """

    q: Tensor
    k: Tensor
    scale: Tensor
    bias: Tensor


def gradients(pairs: Pairs, rows: Tensor | None, cols: Tensor | None, need: Need) -> Grads:
    """The gradients to q, k, scale and bias, as far as each is needed.

    rows, cols: the `weights` of rows and columns; None for a side without upstream gradient.  Of
    symmetric scores rows alone, and the whole gradient is in dq.
    """
    score, sides = _Scores(pairs), (rows, rows if pairs.same else cols)
    flat = score.on_cpu and all(side is None or not side[0].any() for side in sides)
    return _gradients(score, pairs, sides, need, flat, _Kept(0))


def _gradients(
    score: _Scores, pairs: Pairs, sides: Sides, need: Need, flat: bool, kept: _Kept
) -> Grads:
    """flat: all m are 0, as those of bounded scores are."""
    need_q, need_k, need_scale, need_bias = need
    need_k = need_k and not pairs.same
    u = torch.zeros_like(score.x) if need_q or need_scale or pairs.same else None
    dk = torch.zeros_like(score.keys) if need_k else None
    dbias = score.x.new_zeros(len(pairs.k) if need_bias else 0)
    ref = _reference(sides, flat) if score.on_cpu else None
    for i, j in _tiles(pairs, score.x):
        # s_ij and s_ji of the diagonal are rounded apart, and large ones' exponentials with them.
        twice = pairs.same and i == j and not flat
        row, col = _part(sides[0], i), None if twice else _part(sides[1], j)
        tile = kept.take(i, j)
        if tile is None:
            w = _weigh(score(i, j), row, col, ref, flat)
        else:
            w = _weigh_tile(tile, row, col, flat)
        w = w + w.T if twice else w
        if u is not None:
            u[i].addmm_(w, score.keys[j])
            if pairs.same and i != j:
                u[j].addmm_(w.T, score.keys[i])
        if dk is not None:
            dk[j].addmm_(w.T, score.x[i], alpha=score.alpha)
        if need_bias:
            dbias[j] += w.sum(0)
    return _finish(score, pairs.same, u, dk, dbias, need)


def _reference(sides: Sides, flat: bool) -> float | None:
    """The c of one exponential for all tiles, or None."""
    if flat:
        return 0.0
    peaks = [side[0] for side in sides if side is not None]
    if len(peaks) < 2:
        return None
    high, low = max(float(m.max()) for m in peaks), min(float(m.min()) for m in peaks)
    return high if high - low <= SAFE else None


def _part(side: Tensor | None, at: slice) -> Tensor | None:
    return None if side is None else side[:, at]


def _weigh(
    s: Tensor, row: Tensor | None, col: Tensor | None, ref: float | None, flat: bool
) -> Tensor:
    """W of a tile of scores, which it overwrites."""
    if ref is not None:
        return _weigh_tile(_Tile((s.sub_(ref) if ref else s).exp_(), ref), row, col, flat)
    if row is None or col is None:
        one = col if row is None else row[..., None]
        return s.sub_(one[0]).exp_().mul_(one[1])  # type: ignore[index]
    w = (s - row[0, :, None]).exp_().mul_(row[1, :, None])
    return w.add_(s.sub_(col[0]).exp_().mul_(col[1]))


def _weigh_tile(tile: _Tile, row: Tensor | None, col: Tensor | None, flat: bool) -> Tensor:
    """W of a tile of exponentials, which it overwrites."""

    def factor(side: Any) -> Tensor:
        return side[1] if flat else side[1] * (tile.ref - side[0]).clamp_max_(SAFE).exp_()

    if row is None:
        return tile.e.mul_(factor(col))
    if col is None:
        return tile.e.mul_(factor(row)[:, None])
    rows, cols = factor(row), factor(col)
    for i in spans(len(rows), -(-len(rows) // 2)):  # or the sums would be a second tile
        tile.e[i].mul_(rows[i, None] + cols)
    return tile.e


def ahead(
    pairs: Pairs,
    both: bool,
    upstream: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    need: Need,
    most: float | None = None,
) -> Grads:
    """The gradients of a function of the log-sum-exps, with which it is called once.

    upstream: of those of rows and columns gives its gradients to them; of symmetric scores to the
    rows alone.  most: what no score's magnitude passes, where the caller knows it.
    """
    score, kept = _Scores(pairs, most), _Kept(KEPT_BYTES if any(need) else 0)
    rows, cols = _statistics(score, pairs, both, kept)
    grad_rows, grad_cols = upstream(log_sum(rows), log_sum(cols))
    if not any(need):
        return Grads(*(score.x.new_empty(0) for _ in need))
    row = weights(rows, grad_rows)
    col = row if pairs.same else weights(cols, grad_cols) if both else None
    return _gradients(score, pairs, (row, col), need, score.bounded, kept)


def _finish(
    score: _Scores,
    same: bool,
    u: Tensor | None,
    dk: Tensor | None,
    dbias: Tensor,
    need: Need,
) -> Grads:
    none = partial(score.x.new_empty, 0)  # an operator may not return one tensor twice
    dscale = none()
    if need[2] and u is not None:
        dscale = torch.bmm(score.q.unsqueeze(1), u.unsqueeze(2)).flatten()  # no (M, D) between
        # Of symmetric scores each pair stands in u twice, once from either side.
        dscale = dscale if score.scale.ndim else dscale.sum() / (2 if same else 1)
    dq = none() if u is None or not (need[0] or same) else u.mul_(score.by_row)
    return Grads(dq, none() if dk is None else dk, dscale, dbias)
