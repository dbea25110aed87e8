"""A loss of all nested prefixes of its embeddings in one sweep, the gradient made with it.

    S_p = S_p-1 + q_c k_c^T       c: the features that prefix p adds to the one before it
    s_p = scale a_i S_p a_j       a: 1 / the prefix's length, or 1 where it stays as it is
    W_p = a_i a_j dloss/ds_p      of the exponentials of s_p, kept from the sweep
    G_c = sum of W_p over the prefixes p that have c
    dq_c = scale (G_c k_c - q_c sum of a_i^2 r_p over the same p)
    r_p = sum_j s_p dloss/ds_p / scale                what a length has in it, where a is not 1

Why: one after another, the prefixes multiply the first features again and again.  Here each is
multiplied once for the scores and once for each side's gradient: from the last prefix to the
first, G is a running sum of W.
Of NTXentLoss and CLIPLoss, as they are, in one process on a CPU, in float32 and float64, where no
exponential can overflow or vanish and all of them fit into KEPT_BYTES.  On a GPU and over ranks
_nested_pairs.py has both; elsewhere the prefixes are taken one after another.  The value is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.distributed import LOCAL
from fastssl.kernels.common import ahead, spans, square_tile
from fastssl.kernels.pairwise import LINEAR, SAFE, as_number
from fastssl.losses._ahead import Gradients, fits
from fastssl.losses._checks import check_batch
from fastssl.losses._nested_pairs import Prefixes, clip, fits_pairs, nt_xent
from fastssl.losses.clip import CLIPLoss
from fastssl.losses.ntxent import NTXentLoss

KEPT_BYTES = 1 << 26  # of exponentials
Tiles = list[tuple[slice, slice]]


def nested_loss(
    loss: Any,
    dims: Sequence[int],
    weights: Sequence[float],
    normalize: bool,
    inputs: Sequence[Any],
    named: Mapping[str, Any],
) -> Tensor | None:
    """The weighted sum of the loss of each prefix, or None where they are taken one by one.

    normalize: whether CLIP's prefixes are made one long; NT-Xent's are in any case.
    """
    if type(loss) not in (NTXentLoss, CLIPLoss) or len(dims) < 2:
        return None
    try:
        given = signature(loss.forward).bind(*inputs, **named).arguments
    except TypeError:  # by other names, or wrong: the loss itself will say
        return None
    first, second, *rest = given.values()
    if isinstance(loss, CLIPLoss) and (rest[1:] or isinstance(rest[0], Tensor) and rest[0].ndim):
        return None
    if isinstance(loss, NTXentLoss) and loss.memory_bank is not None:
        return None
    if fits_pairs(loss, first, second):
        if isinstance(loss, NTXentLoss):
            return nt_xent(loss, Prefixes(dims, weights, True), first, second)
        return clip(loss, Prefixes(dims, weights, normalize), first, second, *rest)
    if not all(_is_plain(x) and fits(loss.process_group, x) for x in (first, second)):
        return None
    if isinstance(loss, NTXentLoss):
        return _nt_xent(loss, dims, weights, first, second)
    return _clip(_Prefixes(dims, weights, first), normalize, first, second, *rest)


def _is_plain(x: Tensor) -> bool:
    return x.ndim == 2 and x.dtype in (torch.float32, torch.float64)


class _Prefixes:
    """What the prefixes add: parts, slices of the features; and their losses' weights (P,)."""

    def __init__(self, dims: Sequence[int], weights: Sequence[float], x: Tensor) -> None:
        self.parts = [slice(a, b) for a, b in zip((0, *dims), dims, strict=False)]
        self.weights = x.new_tensor(list(weights))

    def sums(self, x: Tensor) -> Tensor:
        """The sums of x (B, D) over each prefix: (P, B)."""
        return torch.stack([x[:, part].sum(1) for part in self.parts]).cumsum(0)

    def inverse(self, x: Tensor) -> Tensor:
        """1 / each prefix's length (P, B)."""
        return self.sums(x * x).rsqrt_()

    def keep_lengths(self, dx: Tensor, x: Tensor, inverse: Tensor, radial: Tensor) -> None:
        """Take from dx what each prefix's length has in it, by radial (P, B), which is used up."""
        along = radial.mul_(inverse).mul_(inverse).flip(0).cumsum(0).flip(0)
        for part, share in zip(self.parts, along, strict=True):
            dx[:, part].addcmul_(x[:, part], share.unsqueeze(1), value=-1)

    def value(self, short: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and its gradient to short, by how much positives are below the others' lse.

        short (P, ...) becomes the gradient.
        """
        value = torch.dot(F.softplus(short, 1, LINEAR).flatten(1).mean(1), self.weights)
        share = self.weights / short[0].numel()
        return value, short.sigmoid_().mul_(share.view(-1, *[1] * (short.ndim - 1)))


def _nt_xent(
    loss: NTXentLoss, dims: Sequence[int], weights: Sequence[float], out0: Tensor, out1: Tensor
) -> Tensor | None:
    check_batch(LOCAL, out0=out0, out1=out1)
    t, n, side = loss.temperature, 2 * len(out0), square_tile(out0, len(dims)) // 2 * 2
    size = len(dims) * n * (n + side) // 2 * out0.element_size()
    known = isinstance(t, float | int) and abs(1 / t) <= SAFE  # a tensor may want its gradient
    if not known or size > KEPT_BYTES:
        return None
    prefixes = _Prefixes(dims, weights, out0)
    fresh = [_Views(prefixes, out0, out1, t)]
    if not _can_square(fresh[0].inverse):
        return None

    def run(tensors: Sequence[Tensor], need: Sequence[bool]) -> Gradients:
        views = fresh.pop() if fresh else _Views(prefixes, *tensors, t)  # pyright: ignore
        rows = list(spans(n, side))
        tiles = [(i, j) for at, i in enumerate(rows) for j in rows[at:]]
        sums, kept = views.sweep(tiles, any(need))
        short = sums.log().view(len(dims), -1, 2).sub_(views.own.unsqueeze(2))
        value, push = prefixes.value(short)
        if not any(need):
            return value, tensors
        dz = views.gradient(tiles, kept, push, sums)
        return value, [dz[::2], dz[1::2]]

    return ahead(run, out0, out1)


def _can_square(inverse: Tensor) -> bool:
    """Whether the squares of all lengths can be added, of 1 / lengths."""
    low, high = inverse.aminmax()
    return bool(low >= 1e-15 and high <= 1e9)


def _slopes(f: Tensor, ones_and_v: Tensor, v: Tensor) -> Tensor:
    """sum_j f_ij (v_i + v_j) of columns j, given with ones above."""
    rest, moved = ones_and_v @ f.T
    return rest.mul_(v).add_(moved)


class _Views:
    """Both views of all images, the two of an image together, and their prefixes' lengths.

    z (2B, D); inverse (P, 2B): 1 / lengths; own (P, B): the positives' scores.
    """

    def __init__(self, prefixes: _Prefixes, out0: Tensor, out1: Tensor, t: float) -> None:
        self.prefixes, self.parts, self.t = prefixes, prefixes.parts, t
        self.z = torch.stack([out0.detach(), out1.detach()], 1).flatten(0, 1)
        self.inverse = prefixes.inverse(self.z)
        own = prefixes.sums(self.z[::2] * self.z[1::2])
        self.own = own.mul_(self.inverse[:, ::2]).mul_(self.inverse[:, 1::2]).div_(t)

    def sweep(self, tiles: Tiles, keep: bool) -> tuple[Tensor, list[list[Tensor]]]:
        """Sums (P, 2B) of exponentials over other images, and those by tile and prefix.

        Scores are symmetric: the tiles are those on and above the diagonal.
        """
        z, a, sums = self.z, self.inverse, torch.zeros_like(self.inverse)
        by_row, kept = (a / self.t).unsqueeze(2), []
        for i, j in tiles:
            S, es = None, []
            for p, part in enumerate(self.parts):
                x, y = z[i, part], z[j, part].T
                S = x @ y if S is None else S.addmm_(x, y)
                e = (S * by_row[p, i]).mul_(a[p, j]).exp_()
                if i == j:
                    _fill_own(e, 0)
                else:
                    sums[p, j] += e.sum(0)
                sums[p, i] += e.sum(1)
                es.append(e)
            if keep:
                kept.append(es)
        return sums, kept

    def gradient(
        self, tiles: Tiles, kept: list[list[Tensor]], push: Tensor, sums: Tensor
    ) -> Tensor:
        """The gradient (2B, D) of push (P, B, 2), that to the log-sum-exps; kept is used up."""
        z, a = self.z, self.inverse
        pull = push.sum(2).neg_()
        v = push.view_as(sums) / sums.clamp_min(torch.finfo(sums.dtype).tiny)
        lines, by_row, weighed = torch.stack([torch.ones_like(v), v], 1), v.unsqueeze(2), a * v
        radial = (pull * self.own).repeat_interleave(2, 1)
        pull = pull.mul_(a[:, ::2]).mul_(a[:, 1::2])
        dz = torch.zeros_like(z)
        for i, j in tiles:
            G, es = None, kept.pop(0)
            room = torch.empty_like(es[0])
            for p in reversed(range(len(es))):
                e, part = es.pop(), self.parts[p]
                logs = torch.log(e, out=room)
                if i == j:
                    _fill_own(logs, 0)
                logs.mul_(e)
                radial[p, i] += _slopes(logs, lines[p, :, j], v[p, i])
                if i != j:
                    radial[p, j] += _slopes(logs.T, lines[p, :, i], v[p, j])
                w = torch.addcmul(weighed[p, j], by_row[p, i], a[p, j], out=room)
                w.mul_(a[p, i, None])
                G = e.mul_(w) if G is None else G.addcmul_(e, w)
                if i == j:
                    half = slice(i.start // 2, i.stop // 2)
                    G.diagonal(1)[::2].add_(pull[p, half])
                    G.diagonal(-1)[::2].add_(pull[p, half])
                dz[i, part].addmm_(G, z[j, part])
                if i != j:
                    dz[j, part].addmm_(G.T, z[i, part])
        self.prefixes.keep_lengths(dz.div_(self.t), z, a, radial)
        return dz


def _fill_own(tile: Tensor, value: float) -> None:
    """Give a tile on the diagonal that value at each view's pairs with its own image's views."""
    for line in (tile.diagonal(), tile.diagonal(1)[::2], tile.diagonal(-1)[::2]):
        line.fill_(value)


def _clip(
    prefixes: _Prefixes,
    normalize: bool,
    x: Tensor,
    t: Tensor,
    logit_scale: float | Tensor,
) -> Tensor | None:
    B = check_batch(LOCAL, image_features=x, text_features=t)
    scale, longest = as_number("logit_scale", logit_scale, x), slice(0, prefixes.parts[-1].stop)
    most, fresh = abs(float(scale.detach())), []
    if normalize:
        fresh.append([prefixes.inverse(z.detach()) for z in (x, t)])
    for z in () if normalize else (x, t):
        most *= float(torch.linalg.vector_norm(z.detach()[:, longest], dim=1).max())
    fits_in = len(prefixes.parts) * B * B * x.element_size() <= KEPT_BYTES
    if not (fits_in and 0 < most <= SAFE and all(_can_square(a) for pair in fresh for a in pair)):
        return None

    def run(tensors: Sequence[Tensor], need: Sequence[bool]) -> Gradients:
        inverse = None
        if normalize:
            inverse = fresh.pop() if fresh else [prefixes.inverse(z) for z in tensors[:2]]
        es, own, sums = _clip_sweep(prefixes, tensors, inverse)
        value, push = prefixes.value(sums.log().sub_(own.unsqueeze(1)))
        if not any(need):
            return value, tensors
        return value, _clip_gradients(prefixes, tensors, inverse, es, own, push, sums)

    return ahead(run, x, t, scale)


def _clip_sweep(
    prefixes: _Prefixes, tensors: Sequence[Tensor], inverse: list[Tensor] | None
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Of each prefix: exponentials (B, B) without the pairs' own, those scores (P, B), and sums
    (P, 2, B).  inverse: of images and texts, or None where they stay as they are."""
    x, t, scale = tensors[0], tensors[1], float(tensors[2])
    S, es, own = None, [], []
    for p, part in enumerate(prefixes.parts):
        a, b = x[:, part], t[:, part].T
        S = a @ b if S is None else S.addmm_(a, b)
        if inverse is None:
            e = S * scale
        else:
            e = (S * (inverse[0][p] * scale).unsqueeze(1)).mul_(inverse[1][p])
        line = e.diagonal()
        own.append(line.clone())
        es.append(e.exp_())
        line.zero_()
    sums = torch.stack([torch.stack([e.sum(1), e.sum(0)]) for e in es])
    return es, torch.stack(own), sums


def _clip_gradients(
    prefixes: _Prefixes,
    tensors: Sequence[Tensor],
    inverse: list[Tensor] | None,
    es: list[Tensor],
    own: Tensor,
    push: Tensor,
    sums: Tensor,
) -> list[Tensor]:
    """Those of push (P, 2, B), that to the log-sum-exps; es is used up."""
    x, t, scale = tensors
    pull = push.sum(1).neg_()
    weight = push.div_(sums.clamp_min_(torch.finfo(sums.dtype).tiny))
    radial = [pull * own, pull * own]
    dx, dt, G, room = x.new_zeros(x.shape), t.new_zeros(t.shape), None, torch.empty_like(es[0])
    for p in reversed(range(len(es))):
        e, part, (row, col) = es.pop(), prefixes.parts[p], weight[p]
        if inverse is not None:
            f = torch.log(e, out=room)
            f.diagonal().zero_()
            f.mul_(e)
            one = torch.ones_like(row)
            radial[0][p] += _slopes(f, torch.stack([one, col]), row)
            radial[1][p] += _slopes(f.T, torch.stack([one, row]), col)
        w = torch.add(row.unsqueeze(1), col, out=room)
        if inverse is not None:
            a, b = inverse[0][p], inverse[1][p]
            w.mul_(a.unsqueeze(1)).mul_(b)
            pull[p].mul_(a).mul_(b)
        G = e.mul_(w) if G is None else G.addcmul_(e, w)
        G.diagonal().add_(pull[p])
        dx[:, part], dt[:, part] = G @ t[:, part], G.T @ x[:, part]
    longest = slice(0, prefixes.parts[-1].stop)
    dscale = (dx[:, longest] * x[:, longest]).sum()
    for dz, z, at in ((dx, x, 0), (dt, t, 1)):
        dz.mul_(scale)
        if inverse is not None:
            prefixes.keep_lengths(dz, z, inverse[at], radial[at])
    return [dx, dt, dscale]
