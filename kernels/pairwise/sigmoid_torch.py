"""The pairwise sigmoid loss and its gradients in torch, a tile of scores at a time.

    z_ij = -y_ij s_ij     total += softplus(z_ij)     W_ij = -y_ij sigmoid(z_ij)
    u_i = sum_j W_ij k_j  dq_i = scale u_i            dk_j = sum_i W_ij scale q_i
    dscale = sum_i q_i . u_i                          dbias = sum_ij W_ij

On a CPU a tile without a positive pair, as most are, is spared the passes that turn signs.
Memory: tiles, k and the gradients in float32.  See sigmoid.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.autograd import accumulator
from ..common.chunks import spans, tile_shape
from .masks import Tile

Need = tuple[bool, bool, bool, bool]  # which gradients: of q, k, scale and bias

# Above it softplus(z) is z: exp(-40) is below float64's rounding of 40, and exp(40) is no float32's
# end.  torch's own 20 is not below it.
LINEAR = 40.0


class Logits(NamedTuple):
    """q (M, D), k (N, D); scale, bias 0-d; row_ids, col_ids, mask: `Masks.ids` and `Masks.key`."""

    q: Tensor
    k: Tensor
    scale: Tensor
    bias: Tensor
    row_ids: Tensor | None
    col_ids: Tensor | None
    mask: str


class Results(NamedTuple):
    """The sum (0-d), and its gradients in the accumulator's dtype: no elements where not needed."""

    total: Tensor
    q: Tensor
    k: Tensor
    scale: Tensor
    bias: Tensor


def results(logits: Logits, need: Need) -> Results:
    """The sum over all pairs and the gradients that are needed."""
    q, acc = logits.q, accumulator(logits.q.dtype)
    keys, scale, bias = (x.to(acc) for x in (logits.k, logits.scale, logits.bias))
    tile = Tile(logits.mask, logits.row_ids, logits.col_ids, q.device)
    need_q, need_k, need_scale, need_bias = need
    dq = keys.new_zeros(q.shape if need_q else 0)
    dk = torch.zeros_like(keys) if need_k else keys.new_empty(0)
    totals, dscale, dbias = [], [], []
    R, C = tile_shape(len(q), len(keys), keys)
    scores, spare = keys.new_empty(2, max(1, R // 2) * C)
    for i in spans(len(q), max(1, R // 2)):  # the two together keep to the budget
        rows = q[i].to(acc)
        x, u = rows * scale, torch.zeros_like(rows) if need_q or need_scale else None
        for j in spans(len(keys), C):
            size = len(rows), min(C, len(keys) - j.start)
            z, other = (b[: math.prod(size)].view(size) for b in (scores, spare))
            positive = _some(tile.keep(i, j))
            torch.addmm(bias, x, keys[j].T, out=z)
            _turn(z, positive, other)
            totals.append(torch.ops.aten.softplus.out(z, 1, LINEAR, out=other).sum())
            if not any(need):
                continue
            w = _turn(z.sigmoid_(), positive, other)
            if need_bias:
                dbias.append(w.sum())
            if u is not None:
                u.addmm_(w, keys[j])
            if need_k:
                dk[j].addmm_(w.T, x)
        if need_scale and u is not None:
            dscale.append((rows * u).sum())
        if need_q and u is not None:
            torch.mul(u, scale, out=dq[i])
    sums = (torch.stack(s).sum() if s else keys.new_empty(0) for s in (totals, dscale, dbias))
    return Results(next(sums), dq, dk, *sums)


def _some(positive: Tensor) -> Tensor | None:
    """None where there is no positive pair, as far as a look at that costs no wait."""
    return positive if positive.device.type != "cpu" or positive.any() else None


def _turn(x: Tensor, positive: Tensor | None, spare: Tensor) -> Tensor:
    """x becomes -y x; `spare` is overwritten."""
    if positive is None:
        return x
    one = x.new_ones(())
    return x.mul_(torch.where(positive, -one, one, out=spare))
