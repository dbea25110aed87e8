"""A loss of all nested prefixes of its embeddings in one sweep, the gradient made with it.

    S_p = S_p-1 + q_c k_c^T       c: the features that prefix p adds to the one before it
    s_p = scale a_i S_p a_j       a: 1 / the prefix's length for NT-Xent, and 1 for CLIP
    W_p = a_i a_j dloss/ds_p      of the exponentials of s_p, kept from the sweep
    G_c = sum of W_p over the prefixes p that have c
    dq_c = scale (G_c k_c - q_c sum of a_i^2 r_p over the same p)
    r_p = sum_j s_p dloss/ds_p / scale                NT-Xent's alone: what a length has in it

Why: one after another, the prefixes multiply the first features again and again.  Here each is
multiplied once for the scores and once for each side's gradient: from the last prefix to the
first, G is a running sum of W.
Of NTXentLoss and CLIPLoss, as they are, in one process on a CPU, in float32 and float64, where no
exponential can overflow or vanish and all of them fit into KEPT_BYTES; elsewhere the prefixes are
taken one after another, which has the same value.
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
from fastssl.losses.clip import CLIPLoss
from fastssl.losses.ntxent import NTXentLoss

KEPT_BYTES = 1 << 26  # of exponentials
Tiles = list[tuple[slice, slice]]


def nested_loss(
    loss: Any,
    dims: Sequence[int],
    weights: Sequence[float],
    inputs: Sequence[Any],
    named: Mapping[str, Any],
) -> Tensor | None:
    """The weighted sum of the loss of each prefix, or None where they are taken one by one."""
    if type(loss) not in (NTXentLoss, CLIPLoss) or len(dims) < 2 or torch.compiler.is_compiling():
        return None
    try:
        given = signature(loss.forward).bind(*inputs, **named).arguments
    except TypeError:  # by other names, or wrong: the loss itself will say
        return None
    first, second, *rest = given.values()
    if not all(_is_plain(x) and fits(x, loss.process_group) for x in (first, second)):
        return None
    if isinstance(loss, NTXentLoss):
        return _nt_xent(loss, dims, weights, first, second)
    return _clip(dims, weights, first, second, *rest)


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
    if loss.memory_bank is not None or not known or size > KEPT_BYTES:
        return None
    prefixes = _Prefixes(dims, weights, out0)
    fresh = [_Views(prefixes, out0, out1, t)]
    low, high = fresh[0].inverse.aminmax()
    if not (low >= 1e-15 and high <= 1e9):  # lengths whose squares can be added
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


class _Views:
    """Both views of all images, the two of an image together, and their prefixes' lengths.

    z (2B, D); inverse (P, 2B): 1 / lengths; own (P, B): the positives' scores.
    """

    def __init__(self, prefixes: _Prefixes, out0: Tensor, out1: Tensor, t: float) -> None:
        self.parts, self.t = prefixes.parts, t
        self.z = torch.stack([out0.detach(), out1.detach()], 1).flatten(0, 1)
        self.inverse = prefixes.sums(self.z * self.z).rsqrt_()
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
                rest, moved = lines[p, :, j] @ logs.T
                radial[p, i] += rest.mul_(v[p, i]).add_(moved)
                if i != j:
                    rest, moved = lines[p, :, i] @ logs
                    radial[p, j] += rest.mul_(v[p, j]).add_(moved)
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
        along = radial.mul_(a).mul_(a).mul_(self.t).flip(0).cumsum(0).flip(0)
        for part, share in zip(self.parts, along, strict=True):
            dz[:, part].addcmul_(z[:, part], share.unsqueeze(1), value=-1)
        return dz.div_(self.t)


def _fill_own(tile: Tensor, value: float) -> None:
    """Give a tile on the diagonal that value at each view's pairs with its own image's views."""
    for line in (tile.diagonal(), tile.diagonal(1)[::2], tile.diagonal(-1)[::2]):
        line.fill_(value)


def _clip(
    dims: Sequence[int],
    weights: Sequence[float],
    x: Tensor,
    t: Tensor,
    logit_scale: float | Tensor,
    *rest: Any,
) -> Tensor | None:
    if rest or isinstance(logit_scale, Tensor) and logit_scale.ndim:
        return None
    B = check_batch(LOCAL, image_features=x, text_features=t)
    scale, prefixes = as_number("logit_scale", logit_scale, x), _Prefixes(dims, weights, x)
    longest = [z.detach()[:, : dims[-1]] for z in (x, t)]
    lengths = [torch.linalg.vector_norm(z, dim=1).max() for z in longest]
    most = abs(float(scale.detach())) * float(lengths[0]) * float(lengths[1])
    if len(dims) * B * B * x.element_size() > KEPT_BYTES or not 0 < most <= SAFE:
        return None

    def run(tensors: Sequence[Tensor], need: Sequence[bool]) -> Gradients:
        x, t, scale = tensors
        es, short, sums = _clip_sweep(prefixes, x, t, float(scale))
        value, push = prefixes.value(short)
        if not any(need):
            return value, tensors
        return value, _clip_gradients(prefixes, tensors, es, push, sums)

    return ahead(run, x, t, scale)


def _clip_sweep(
    prefixes: _Prefixes, x: Tensor, t: Tensor, scale: float
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Of each prefix: exponentials (B, B) without the pairs' own, `short` and sums (P, 2, B)."""
    S, es, own = None, [], []
    for part in prefixes.parts:
        a, b = x[:, part], t[:, part].T
        S = a @ b if S is None else S.addmm_(a, b)
        e = S * scale
        line = e.diagonal()
        own.append(line.clone())
        es.append(e.exp_())
        line.zero_()
    sums = torch.stack([torch.stack([e.sum(1), e.sum(0)]) for e in es])
    return es, sums.log().sub_(torch.stack(own).unsqueeze(1)), sums


def _clip_gradients(
    prefixes: _Prefixes, tensors: Sequence[Tensor], es: list[Tensor], push: Tensor, sums: Tensor
) -> list[Tensor]:
    """Those of push (P, 2, B), that to the log-sum-exps; es is used up."""
    x, t, scale = tensors
    push.mul_(scale)
    pull = push.sum(1).neg_()
    weight = push.div_(sums.clamp_min_(torch.finfo(sums.dtype).tiny))
    dx, dt, G, room = x.new_zeros(x.shape), t.new_zeros(t.shape), None, torch.empty_like(es[0])
    for p in reversed(range(len(es))):
        e, part = es.pop(), prefixes.parts[p]
        w = torch.add(weight[p, 0].unsqueeze(1), weight[p, 1], out=room)
        G = e.mul_(w) if G is None else G.addcmul_(e, w)
        G.diagonal().add_(pull[p])
        dx[:, part], dt[:, part] = G @ t[:, part], G.T @ x[:, part]
    longest = slice(0, prefixes.parts[-1].stop)
    dscale = (dx[:, longest] * x[:, longest]).sum().div_(scale)
    return [dx, dt, dscale]
