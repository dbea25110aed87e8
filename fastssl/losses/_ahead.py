"""Losses of one process on a CPU, the gradient made with the loss: what they share, and some.

A step of a small batch is mostly torch's bookkeeping of some fifty operations and their
derivatives; of a large one, scores that are computed again for the gradient.  Here autograd sees
one operation.  Scores that are one tile, and no exponential of which can overflow or vanish, are
worked on whole, in as few operations as there can be; others a tile at a time, and what fits of
the exponentials is still there for the gradient (`lse_ahead`).
The formulas are those of the losses themselves, which come here where `fits` allows it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.distributed import Group, world_size
from fastssl.kernels import exclude_self, exclude_self_and_pair
from fastssl.kernels.common import accumulator, ahead, can_read_values
from fastssl.kernels.common.chunks import CHUNK_BYTES
from fastssl.kernels.pairwise import LINEAR, SAFE, Pairs, as_masks, lse_ahead

Gradients = tuple[Tensor, Sequence[Tensor]]
_PAIR, _SELF = as_masks(exclude_self_and_pair).key, as_masks(exclude_self).key
_WIDE = torch.float32, torch.float64  # dtypes that are their own accumulator
_NARROW = 64  # features, whose D x D products cost no more than a few calls
_FEW = 256  # pairs whose scores are as soon worked on twice as weighed
_LEAST = 1e-30  # of a share that has all its digits
_TINY = torch.finfo(torch.float32).tiny  # in the place of a sum without a term


def fits(group: Group, *views: Tensor, axes: int = 2, least: int = 1) -> bool:
    """Whether views of so many axes pass `check_batch`, and their loss is made here: of a rank that
    is alone, on a CPU, and not traced.

    In one look: small batches have no time for two.  What it refuses goes on to `check_batch`.
    """
    first = views[0]
    if not (can_read_values(first) and first.is_cpu):
        return False
    shape, dtype = first.shape, first.dtype
    if len(shape) != axes or 0 in shape or shape[0] < least or not dtype.is_floating_point:
        return False
    for x in views[1:]:
        if x.shape != shape or x.dtype != dtype or not x.is_cpu:
            return False
    return world_size(group) == 1


def centered(views: Sequence[Tensor]) -> Tensor:
    """(V, B, D): each of V views less its mean, in float32, or float64 for float64."""
    c = torch.stack(tuple(views)).to(accumulator(views[0].dtype))
    c.sub_(c.mean(1, keepdim=True))
    return c.sub_(c.mean(1, keepdim=True))  # what rounding left


def has_few_features(x: Tensor) -> bool:
    """Whether D x D products are cheaper than those of the rows of x (N, D)."""
    return x.shape[1] <= max(x.shape[0], _NARROW)


def square(x: Tensor) -> Tensor:
    """The sum of squares of x."""
    return x.square().sum()


def nt_xent(
    z0: Tensor,
    z1: Tensor,
    temperature: float | Callable[[Tensor], float],
    weigh: Callable[[Tensor], Tensor] | None = None,
) -> Tensor | None:
    """NTXentLoss of z0, z1 (B, D); None where a row is too long or too short for its square.

    temperature: a number, or a function of the mean cosine of an image's views.
    weigh: a function of the rows' losses (2, B) or (B, 2), by which they are multiplied.
    """
    fresh = [with_norms(z0, z1)]
    low, high = fresh[0][1].aminmax()
    if not (low >= 1e-9 and high <= 1e15):
        return None

    def run(tensors: Sequence[Tensor], need: Sequence[bool]) -> Gradients:
        wide, norms = fresh.pop() if fresh else with_norms(*tensors)
        y, B = wide.div_(norms), len(tensors[0])
        t = temperature
        if callable(t):
            t = t((y[:B] * y[B:]).sum() / B)
        whole = abs(t) * SAFE >= 1 and one_tile(tensors[0], 2 * B)
        made = _whole_nt_xent if whole else _nt_xent
        value, g = made(y, t, tensors[0].dtype, any(need), weigh)
        if any(need):
            unit_backward_(g, y, norms)
        return value, g.chunk(2)

    return ahead(run, z0, z1)


def unit_backward_(g: Tensor, y: Tensor, norms: Tensor) -> Tensor:
    """The gradient g to rows y of length one, made that to the rows, norms (N, 1) long."""
    return g.addcmul_(y, (g * y).sum(1, keepdim=True), value=-1).div_(norms)


def one_tile(x: Tensor, n: int) -> bool:
    """Whether n x n scores are one tile, and sums and products of x's dtype."""
    return x.dtype in _WIDE and n * n * x.element_size() <= CHUNK_BYTES["cpu"]  # see `tile_shape`


def with_norms(z0: Tensor, z1: Tensor) -> tuple[Tensor, Tensor]:
    """(2B, D) and (2B, 1): all views, the first ones and then the second, and their lengths."""
    z = torch.cat([z0.detach(), z1.detach()])
    wide = z.to(accumulator(z.dtype))
    return wide, torch.linalg.vector_norm(wide, dim=1, keepdim=True)


def _whole_nt_xent(
    y: Tensor, temperature: float, dtype: torch.dtype, need: bool, weigh: Any
) -> tuple[Tensor, Tensor]:
    """Value, and gradient to the rows y of length one, of all scores at once."""
    s, B = torch.mm(y, y.T), len(y) // 2
    above, below = s.diagonal(B), s.diagonal(-B)
    positive = above / temperature
    e = s.div_(temperature).exp_().fill_diagonal_(0)
    above.zero_()
    below.zero_()
    sums = e.sum(1)
    short = sums.log().view(2, B).sub_(positive)
    value, push = _weighed(short, weigh)
    if not need:
        return value, y
    push.div_(len(y) * temperature)
    pull = push.sum(0).neg_()
    weight = push.view(-1).div_(sums.clamp_min_(_TINY))
    g = torch.mm(e.mul_(weight + weight.unsqueeze(1)), y)
    _pull(g, y, pull.unsqueeze(1))
    return value, g


def _nt_xent(
    y: Tensor, temperature: float, dtype: torch.dtype, need: bool, weigh: Any
) -> tuple[Tensor, Tensor]:
    """The same a tile at a time.  dtype: that of all pairs' products."""
    first, second = y.chunk(2)
    scale = y.new_full((), 1 / temperature)
    positive = (first * second).sum(1, keepdim=True) * scale
    rows = torch.stack([first, second], 1).flatten(0, 1).to(dtype)  # so `_PAIR` needs no ids
    value = push = positive

    def upstream(lse: Tensor, none: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal value, push
        short = lse.view(-1, 2) - positive
        value, push = _weighed(short, weigh)
        return push.div_(short.numel()).flatten(), none

    pairs = Pairs(rows, rows, scale, None, None, None, _PAIR, True)
    g = lse_ahead(pairs, False, upstream, (need, False, False, False), 1 / abs(temperature)).q
    if not need:
        return value, y
    g = g.view(-1, 2, g.shape[1]).transpose(0, 1).flatten(0, 1)
    _pull(g, y, push.sum(1, keepdim=True).mul_(-scale))
    return value, g


def _pull(g: Tensor, y: Tensor, pull: Tensor) -> None:
    """Add to the gradient g what the other view of an image does: the largest part by far.

    Among the others' it would cost their sum digits.
    """
    B = len(pull)
    g[:B].addcmul_(y[B:], pull)
    g[B:].addcmul_(y[:B], pull)


def _weighed(short: Tensor, weigh: Callable[[Tensor], Tensor] | None) -> tuple[Tensor, Tensor]:
    """The mean of the weighed -log sigmoid(-short), and its gradient but for their number."""
    if weigh is None:
        return _mean_nll(short), short.sigmoid_()
    losses = F.softplus(short, 1, LINEAR)
    weight = weigh(losses)
    return (losses * weight).mean(), short.sigmoid_().mul_(weight)


def _mean_nll(short: Tensor) -> Tensor:
    """The mean of -log sigmoid(-short), short by how much a positive is below the others' lse."""
    return F.softplus(short, 1, LINEAR).mean()


def hypersphere(z0: Tensor, z1: Tensor, t: float, lam: float, alpha: float) -> Tensor | None:
    """HypersphereLoss of z0, z1 (B, D); None where `nt_xent` is."""
    fresh = [with_norms(z0, z1)]
    low, high = fresh[0][1].aminmax()
    if not (low >= 1e-9 and high <= 1e15):
        return None

    def run(tensors: Sequence[Tensor], need: Sequence[bool]) -> Gradients:
        wide, norms = fresh.pop() if fresh else with_norms(*tensors)
        y = wide.div_(norms)
        x0, x1 = y.chunk(2)
        apart = x0 - x1
        far = apart.square().sum(1, keepdim=True)
        value = far.pow(alpha / 2).mean()
        slope = far.pow_(alpha / 2 - 1).mul_(alpha / len(far)).masked_fill_(far.isinf(), 0)
        pull = apart.mul_(slope)
        grads = [pull, pull.neg()]
        for x, g, wanted in zip((x0, x1), grads, need, strict=True):
            value = value + lam / 2 * _uniform(x, tensors[0].dtype, t, lam / 2, g, wanted)
        if any(need):
            return value, [
                unit_backward_(g, x, norm)
                for g, x, norm in zip(grads, (x0, x1), norms.chunk(2), strict=True)
            ]
        return value, tensors

    return ahead(run, z0, z1)


def _uniform(
    x: Tensor, dtype: torch.dtype, t: float, weight: float, g: Tensor, need: bool
) -> Tensor:
    """log mean_{i != j} exp(-t |x_i - x_j|^2) of rows x; g gains weight times its gradient."""
    B = len(x)
    if 4 * t <= SAFE and one_tile(x.to(dtype), B):
        e = torch.mm(x, x.T).sub_(1).mul_(2 * t).exp_().fill_diagonal_(0)
        total = e.sum()
        if need:
            g.addmm_(e, x, alpha=4 * t * weight / float(total))
        return total.log_().sub_(math.log(B * (B - 1)))
    rows, scale = x.to(dtype), x.new_full((), 2 * t)
    value = scale

    def upstream(lse: Tensor, none: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal value
        total = lse.logsumexp(0)
        value = total - 2 * t - math.log(B * (B - 1))
        return (lse - total).exp_().mul_(weight), none

    pairs = Pairs(rows, rows, scale, None, None, None, _SELF, True)
    made = lse_ahead(pairs, False, upstream, (need, False, False, False), 2 * t).q
    if need:
        g.add_(made)
    return value


def clip(x: Tensor, t: Tensor, scale: Tensor) -> Tensor:
    """CLIPLoss of x, t (B, D) and scale (0-d)."""
    return ahead(_clip, x, t, scale)


def _clip(tensors: Sequence[Tensor], need: Sequence[bool]) -> Gradients:
    x, t, scale = tensors
    B = x.shape[0]
    if one_tile(x, B):
        factor = float(scale)
        if factor and B <= _FEW and scale.dtype == x.dtype:
            made = _few_clip(x, t, scale, factor, need)
            if made is not None:
                return made
        s = torch.mm(x, t.T)
        low, high = s.mul_(factor).aminmax()
        if factor and float(high) - float(low) <= SAFE:
            return _whole_clip(x, t, factor, need, s, float(high))
    return _clip_by_tiles(x, t, scale, need)


def _few_clip(
    x: Tensor, t: Tensor, scale: Tensor, factor: float, need: Sequence[bool]
) -> Gradients | None:
    """Value and gradients by two softmaxes; None where a pair's own share of one is nothing.

    What the others have of a row is summed without the pair, which keeps the digits of a near
    perfect match.
    """
    s = torch.addmm(scale, x, t.T, beta=0, alpha=factor)  # scale stands where nothing is added
    rows, cols = s.softmax(1), s.softmax(0)
    row_line, col_line = rows.diagonal(), cols.diagonal()
    own = torch.stack([row_line, col_line])
    if not float(own.amin()) >= _LEAST:
        return None
    row_line.zero_()
    col_line.zero_()
    others = torch.stack([rows.sum(1), cols.sum(0)])
    w = rows.add_(cols)
    row_line.sub_(others.sum(0))
    value, alpha = others.div_(own).log1p_().mean(), factor / others.numel()
    dx = torch.addmm(scale, w, t, beta=0, alpha=alpha) if need[0] or need[2] else x
    dt = torch.addmm(scale, w.T, x, beta=0, alpha=alpha) if need[1] else t
    return value, (dx, dt, (dx * x).sum().div_(factor) if need[2] else scale)


def _whole_clip(
    x: Tensor, t: Tensor, scale: float, need: Sequence[bool], s: Tensor, high: float
) -> Gradients:
    """Value and gradients from all scores s, which become their weights.  high: their highest."""
    line = s.diagonal()
    own = line.clone()
    line.fill_(-torch.inf)
    e = s.sub_(high).exp_()
    sums = torch.stack([e.sum(1), e.sum(0)])
    short = sums.log().sub_(own - high)
    value = _mean_nll(short)
    push = short.sigmoid_().mul_(scale / short.numel())
    pull = push.sum(0).neg_()
    weight = push.div_(sums)
    w = e.mul_(weight[0].unsqueeze(1) + weight[1])
    w.diagonal().zero_()
    dx = torch.mm(w, t) if need[0] or need[2] else x
    dscale = x
    if need[2]:
        by_row = (dx * x).sum(1).addcmul_(pull, own, value=1 / scale)
        dscale = by_row.sum().div_(scale)
    dt = torch.mm(w.T, x).addcmul_(x, pull.unsqueeze(1)) if need[1] else t
    return value, [dx.addcmul_(t, pull.unsqueeze(1)) if need[0] else dx, dt, dscale]


def _clip_by_tiles(x: Tensor, t: Tensor, scale: Tensor, need: Sequence[bool]) -> Gradients:
    acc = accumulator(x.dtype)
    wide_x, wide_t, factor = x.to(acc), t.to(acc), scale.to(acc)
    cosine = (wide_x * wide_t).sum(1)
    own = cosine * factor
    value = push = own

    def upstream(rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal value, push
        short = torch.stack([rows, cols]).sub_(own)
        value, push = _mean_nll(short), short.sigmoid_().div_(short.numel())
        return push[0], push[1]

    pairs = Pairs(x, t, factor, None, None, None, _SELF, False)
    dx, dt, dscale, _ = lse_ahead(pairs, True, upstream, (*need, False))  # pyright: ignore
    pull = push.sum(0).neg_()
    if need[0]:
        dx.addcmul_(wide_t, (pull * factor).unsqueeze(1))
    if need[1]:
        dt.addcmul_(wide_x, (pull * factor).unsqueeze(1))
    return value, [dx, dt, dscale.add_((pull * cosine).sum()) if need[2] else dscale]


def siglip(x: Tensor, t: Tensor, scale: Tensor, bias: Tensor) -> Tensor | None:
    """SigLIPLoss of x, t (B, D), scale and bias (0-d); None for more scores than one tile's."""
    return ahead(_siglip, x, t, scale, bias) if one_tile(x, x.shape[0]) else None


def _siglip(tensors: Sequence[Tensor], need: Sequence[bool]) -> Gradients:
    x, t, scale, bias = tensors
    B, factor, bias = x.shape[0], float(scale), bias.to(x.dtype)
    # A product by 0 would not look at the rows, and hide a nan.
    z = torch.addmm(bias, x, t.T, alpha=factor) if factor else torch.mm(x, t.T).mul_(0).add_(bias)
    matches = z.diagonal().neg_()
    value = F.softplus(z, 1, LINEAR).sum().div_(B)
    w = z.sigmoid_()
    matches.neg_()
    dbias = w.sum().div_(B) if need[3] else x
    u = torch.addmm(bias, w, t, beta=0, alpha=1 / B) if need[0] or need[2] else x
    dscale = (u * x).sum() if need[2] else x
    dt = torch.addmm(bias, w.T, x, beta=0, alpha=factor / B) if need[1] else t
    return value, (u.mul_(factor) if need[0] else u, dt, dscale, dbias)
