"""Log-sum-exps of nested prefixes and their gradients in torch, a tile of scores at a time.

    S_p (R, C) = S_p-1 + q_c k_c^T       c: the features that prefix p adds
    s_p = scale a_i S_p b_j              a_i = 1 / |q_i up to m_p|, b_j alike; 1 if not normalized
    W_p = g_i exp(s - m_i) / l_i + h_j exp(s - m_j) / l_j        g, h upstream
    G_c = sum of a_i W_p b_j over the prefixes p that have c
    dq_c = scale (G_c k_c - q_c sum_p a_i^2 r_pi)        r_pi = sum_j a_i W_p b_j S_p
    dscale = sum_pi r_pi                                 dk_c: likewise, by columns

Backward holds the S of all prefixes of a tile: from the last to the first, G is their running sum,
so that each feature is multiplied once for q and once for k, however many prefixes have it.
m is the maximum, or 0 where no exponential can overflow or vanish, as in lse_torch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.autograd import accumulator
from ..common.chunks import spans, square_tile
from .lse_torch import SAFE
from .masks import Tile


class Nested(NamedTuple):
    """What the scores are made of.

    q (M, D), k (N, D); dims: the prefixes' lengths; scale 0-d; row_ids, col_ids and mask as in
    `Pairs`.  same: k is q, and the scores symmetric.
    """

    q: Tensor
    k: Tensor
    scale: Tensor
    row_ids: Tensor | None
    col_ids: Tensor | None
    dims: list[int]
    normalize: bool
    mask: str
    same: bool


class _Scores:
    """Tiles of scores by prefix, a dropped pair at -inf."""

    def __init__(self, nested: Nested) -> None:
        acc = accumulator(nested.q.dtype)
        self.k = nested.k.to(acc)
        self.q = self.k if nested.same else nested.q.to(acc)
        self.scale, self.same = nested.scale.to(acc), nested.same
        self.parts = [slice(a, b) for a, b in zip((0, *nested.dims), nested.dims, strict=False)]
        self.a = self.b = None
        if nested.normalize:
            self.a = _inverse_norms(self.q, nested.dims)
            self.b = self.a if self.same else _inverse_norms(self.k, nested.dims)
        self.scaled = self.scale if self.a is None else self.scale * self.a
        self.tile = Tile(nested.mask, nested.row_ids, nested.col_ids, self.q.device)

    def tiles(self) -> list[tuple[slice, slice]]:
        """All tiles; of symmetric scores those on and above the diagonal."""
        side = square_tile(self.q, len(self.parts))
        rows = list(spans(len(self.q), side))
        cols = rows if self.same else list(spans(len(self.k), side))
        return [(i, j) for n, i in enumerate(rows) for j in (cols[n:] if self.same else cols)]

    def add(self, before: Tensor | None, p: int, i: slice, j: slice) -> Tensor:
        """S of prefix p, of that of the one before it, which stays as it is."""
        q, k = self.q[i, self.parts[p]], self.k[j, self.parts[p]]
        return q @ k.T if before is None else torch.addmm(before, q, k.T)

    def score(self, S: Tensor, p: int, i: slice, j: slice, keep: Tensor | None) -> Tensor:
        """s of S, in a tensor of its own."""
        if self.b is None:
            s = S * self.scaled
        else:
            s = (S * self.scaled[p, i, None]).mul_(self.b[p, j])
        return s if keep is None else s.masked_fill_(keep.logical_not(), -math.inf)

    def kept(self, i: slice, j: slice) -> Tensor | None:
        """Which pairs of a tile take part; None for all."""
        return self.tile.keep(i, j) if self.tile.rules else None

    def bounded(self) -> bool:
        """Whether no score can leave +-SAFE; on a CPU alone, where looking costs no wait."""
        if self.q.device.type != "cpu":
            return False
        most = self.scale.abs()
        if self.a is None:
            most = most * self.q.norm(dim=1).max() * self.k.norm(dim=1).max()
        return bool(most <= SAFE)


def _inverse_norms(x: Tensor, dims: list[int]) -> Tensor:
    """(P, N): what makes each prefix of each row one long; a row of zeros stays zero."""
    norms = torch.stack([torch.linalg.vector_norm(x[:, :m], dim=1) for m in dims])
    return norms.clamp_min_(1e-12).reciprocal_()


def statistics(nested: Nested) -> tuple[Tensor, Tensor]:
    """Statistics (2, P, M) of the rows and (2, P, N) of the columns; those of symmetric scores are
    the rows', in another tensor."""
    scores, P = _Scores(nested), len(nested.dims)
    bounded = scores.bounded()
    rows = _empty(P, len(nested.q), scores.q, bounded)
    cols = rows if nested.same else _empty(P, len(nested.k), scores.q, bounded)
    for i, j in scores.tiles():
        S, keep, mirrored = None, scores.kept(i, j), not nested.same or i != j
        for p in range(P):
            S = scores.add(S, p, i, j)
            s = scores.score(S, p, i, j, keep)
            if bounded:
                s.exp_()
            _fold(rows[:, p, i], s, 1, bounded)
            if mirrored:
                _fold(cols[:, p, j], s, 0, bounded)
    return rows, cols.clone() if nested.same else cols


def _empty(P: int, n: int, x: Tensor, bounded: bool) -> Tensor:
    stats = x.new_zeros(2, P, n)
    if not bounded:
        stats[0] = torch.finfo(x.dtype).min
    return stats


def _fold(stats: Tensor, s: Tensor, dim: int, bounded: bool) -> None:
    """Fold a tile of scores, or of their exponentials, into maxima and sums of exp(s - maximum)."""
    m, total = stats
    if bounded:
        total += s.sum(dim)
        return
    peak = torch.maximum(m, s.amax(dim))
    total.mul_((m - peak).exp_()).add_((s - peak.unsqueeze(dim)).exp_().sum(dim))
    m.copy_(peak)


def gradients(nested: Nested, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients to q, k and scale, of rows (2, P, M) and cols (2, P, N): m, and g / l.

    Of symmetric scores rows alone is read, and has both sides' upstream; dk is (0,).
    """
    scores, P, same = _Scores(nested), len(nested.dims), nested.same
    cols = rows if same else cols
    q, k, parts = scores.q, scores.k, scores.parts
    dq, dk = torch.zeros_like(q), torch.zeros_like(k) if not same else q.new_empty(0)
    row_sums = q.new_zeros(P, len(q))
    col_sums = row_sums if same else q.new_zeros(P, len(k))
    flat = q.device.type == "cpu" and not rows[0].any() and not cols[0].any()
    for i, j in scores.tiles():
        keep, diagonal = scores.kept(i, j), same and i == j
        S = [scores.add(None, 0, i, j)]
        for p in range(1, P):
            S.append(scores.add(S[-1], p, i, j))
        G = None
        for p in reversed(range(P)):
            s = scores.score(S[p], p, i, j, keep)
            w = _weigh(s, rows[:, p, i], cols[:, p, j], flat, diagonal)
            if scores.a is not None and scores.b is not None:
                w.mul_(scores.a[p, i, None]).mul_(scores.b[p, j])
            r = S.pop().mul_(w)
            row_sums[p, i] += r.sum(1)
            if not diagonal:
                col_sums[p, j] += r.sum(0)
            G = w if G is None else G.add_(w)
            dq[i, parts[p]].addmm_(G, k[j, parts[p]])
            if not diagonal:
                (dq if same else dk)[j, parts[p]].addmm_(G.T, q[i, parts[p]])
    dscale = row_sums.sum() / (2 if same else 1)  # of symmetric scores each pair is in it twice
    sides = [(dq, q, scores.a, row_sums)] + ([] if same else [(dk, k, scores.b, col_sums)])
    for dx, x, inverse, sums in sides:
        if inverse is not None:
            _through_norms(dx, x, parts, inverse.square() * sums)
        dx.mul_(scores.scale)
    return dq, dk, dscale


def _weigh(s: Tensor, row: Tensor, col: Tensor, flat: bool, diagonal: bool) -> Tensor:
    """W of a tile of scores, which it may overwrite; flat: all m are 0."""
    if flat:
        return s.exp_().mul_(row[1, :, None] + col[1])
    w = (s - row[0, :, None]).exp_().mul_(row[1, :, None])
    if diagonal:  # of symmetric scores: s_ij and s_ji are rounded apart, and m with them
        return w + w.T
    return w.add_(s.sub_(col[0]).exp_().mul_(col[1]))


def _through_norms(dx: Tensor, x: Tensor, parts: list[slice], shares: Tensor) -> None:
    """Take from dx what each prefix's length has in it: shares (P, N), of x up to each prefix."""
    beyond = shares.flip(0).cumsum(0).flip(0)  # of all prefixes that have a part
    for part, share in zip(parts, beyond, strict=True):
        dx[:, part].addcmul_(x[:, part], share[:, None], value=-1)
