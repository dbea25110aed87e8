"""Pairwise log-sum-exps and their gradients in torch, a tile of scores at a time.

    s_ij = scale_i q_i . k_j + bias_j        M rows, N columns, D features
    stats (2, M): m_i and l_i = sum_j exp(s_ij - m_i), lse_i = m_i + log l_i; likewise of columns
    W_ij = g_i exp(s_ij - m_i) / l_i + h_j exp(s_ij - m_j) / l_j        g, h upstream
    dq_i = scale_i u_i    u_i = sum_j W_ij k_j        dk_j = sum_i W_ij scale_i q_i
    dscale_i = q_i . u_i                              dbias_j = sum_i W_ij

m is the maximum, or 0 where the norms of q and k tell that no exponential can overflow or vanish:
then one exponential serves row and column, and no maximum is taken.
Memory: a tile, and q, k and the gradients in float32.  What it is for stands in lse.py.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.autograd import accumulator
from ..common.chunks import spans, tile_shape
from .masks import Tile

SAFE = 40.0  # exp(+-40) times any number of pairs is far from float32's ends
Spans = list[tuple[slice, slice]]


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
    """Tiles of scores, a dropped pair at -inf."""

    def __init__(self, pairs: Pairs) -> None:
        acc = accumulator(pairs.q.dtype)
        self.keys = pairs.k.to(acc)
        self.scale = pairs.scale.to(acc)
        self.q = self.keys if pairs.same else pairs.q.to(acc)
        # A product takes one number with it; on other devices to read it would wait.  With 0 it
        # would not look at the rows, and hide a nan.
        host = self.scale.ndim == 0 and self.scale.device.type == "cpu" and float(self.scale) != 0
        self.alpha = float(self.scale) if host else 1.0
        self.x = self.q if host else self.q * self.by_row
        self.bias = None if pairs.bias is None else pairs.bias.to(acc)
        self.tile = Tile(pairs.mask, pairs.row_ids, pairs.col_ids, pairs.q.device)

    def __call__(self, i: slice, j: slice) -> Tensor:
        add, beta = (self.x.new_empty(()), 0) if self.bias is None else (self.bias[j], 1)
        s = torch.addmm(add, self.x[i], self.keys[j].T, beta=beta, alpha=self.alpha)
        if self.tile.rules:
            s.masked_fill_(self.tile.keep(i, j).logical_not(), -math.inf)
        return s

    @property
    def by_row(self) -> Tensor:
        """The scale, to be multiplied with (M, D)."""
        return self.scale if self.scale.ndim == 0 else self.scale[:, None]

    def bounded(self) -> bool:
        """Whether no score can leave +-SAFE; on a CPU alone, where looking costs no wait."""
        if self.x.device.type != "cpu":
            return False
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


def _fold(stats: Tensor, s: Tensor, dim: int) -> None:
    """Fold a tile of scores into the running maxima and the sums of exp(s - maximum)."""
    m, total = stats
    peak = torch.maximum(m, s.amax(dim))
    total.mul_((m - peak).exp_()).add_((s - peak.unsqueeze(dim)).exp_().sum(dim))
    m.copy_(peak)


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
    score = _Scores(pairs)
    bounded = score.bounded()
    M, N = len(pairs.q), len(pairs.k)
    rows = _empty_stats(M, score.x, bounded)
    cols = rows if pairs.same else _empty_stats(N if both else 0, score.x, bounded)
    for i, j in _tiles(pairs, score.x):
        s = score(i, j)
        mirrored = both if not pairs.same else i != j
        if bounded:
            s.exp_()
            rows[1, i] += s.sum(1)
            if mirrored:
                cols[1, j] += s.sum(0)
        else:
            _fold(rows[:, i], s, 1)
            if mirrored:
                _fold(cols[:, j], s, 0)
    return rows, cols.clone() if both and pairs.same else cols if both else cols.new_empty(2, 0)


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


def gradients(
    pairs: Pairs, rows: Tensor | None, cols: Tensor | None, need: tuple[bool, bool, bool, bool]
) -> Grads:
    """The gradients to q, k, scale and bias, as far as each is needed.

    rows, cols: the `weights` of rows and columns; None for a side without upstream gradient.  Of
    symmetric scores rows alone, and the whole gradient is in dq.
    """
    score = _Scores(pairs)
    if pairs.same:
        cols = rows
    need_q, need_k, need_scale, need_bias = need
    need_k = need_k and not pairs.same
    u = torch.zeros_like(score.x) if need_q or need_scale or pairs.same else None
    dk = torch.zeros_like(score.keys) if need_k else None
    dbias = score.x.new_zeros(len(pairs.k) if need_bias else 0)
    flat = score.x.device.type == "cpu"  # elsewhere to look would wait
    flat = flat and all(side is None or not side[0].any() for side in (rows, cols))
    for i, j in _tiles(pairs, score.x):
        if pairs.same and i == j and not flat:  # s_ij and s_ji are rounded apart, and m with them
            w = _weigh(score(i, j), _part(rows, i), None, flat)
            w = w + w.T
        else:
            w = _weigh(score(i, j), _part(rows, i), _part(cols, j), flat)
        if u is not None:
            u[i].addmm_(w, score.keys[j])
            if pairs.same and i != j:
                u[j].addmm_(w.T, score.keys[i])
        if dk is not None:
            dk[j].addmm_(w.T, score.x[i], alpha=score.alpha)
        if need_bias:
            dbias[j] += w.sum(0)
    return _finish(score, pairs.same, u, dk, dbias, need)


def _part(side: Tensor | None, at: slice) -> Tensor | None:
    return None if side is None else side[:, at]


def _weigh(s: Tensor, row: Tensor | None, col: Tensor | None, flat: bool) -> Tensor:
    """W of a tile of scores, which it overwrites; flat: all m are 0, and one exponential does."""
    if flat:
        s.exp_()
        if row is None or col is None:
            return s.mul_(col[1] if row is None else row[1, :, None])  # type: ignore[index]
        return s.mul_(row[1, :, None] + col[1])
    if row is None or col is None:
        one = col if row is None else row[..., None]
        return s.sub_(one[0]).exp_().mul_(one[1])  # type: ignore[index]
    w = (s - row[0, :, None]).exp_().mul_(row[1, :, None])
    return w.add_(s.sub_(col[0]).exp_().mul_(col[1]))


def _finish(
    score: _Scores,
    same: bool,
    u: Tensor | None,
    dk: Tensor | None,
    dbias: Tensor,
    need: tuple[bool, bool, bool, bool],
) -> Grads:
    none = partial(score.x.new_empty, 0)  # an operator may not return one tensor twice
    dscale = none()
    if need[2] and u is not None:
        dscale = torch.bmm(score.q.unsqueeze(1), u.unsqueeze(2)).flatten()  # no (M, D) between
        # Of symmetric scores each pair stands in u twice, once from either side.
        dscale = dscale if score.scale.ndim else dscale.sum() / (2 if same else 1)
    dq = none() if u is None or not (need[0] or same) else u.mul_(score.by_row)
    return Grads(dq, none() if dk is None else dk, dscale, dbias)
