"""Nearest points and their pull in torch, on any device: the functions `chamfer.py` builds on."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.chunks import row_spans
from ..common.dispatch import accumulator


def squares(x: Tensor, y: Tensor) -> Tensor:
    """|x - y|^2 of every pair, (..., N, M), by coordinates: nothing cancels far from the origin."""
    acc = accumulator(x.dtype)
    total = x.new_zeros(*x.shape[:-1], y.shape[-2], dtype=acc)
    for k in range(x.shape[-1]):
        delta = x[..., k, None].to(acc) - y[..., None, :, k].to(acc)
        total.addcmul_(delta, delta)
    return total


def nearest(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Squared distance and place of the nearest of y to each x, (G, N), and of x to each y, (G, M).

    Of several nearest, the first.  A tile of distances is one chunk, and serves both ways.
    """
    (G, N), M, acc = x.shape[:2], y.shape[1], accumulator(x.dtype)
    near_x = x.new_empty(G, N, dtype=acc), torch.empty(G, N, dtype=torch.int32, device=x.device)
    near_y = x.new_empty(G, M, dtype=acc), torch.empty(G, M, dtype=torch.int32, device=x.device)
    near_y[0].fill_(torch.inf)
    near_y[1].fill_(0)
    points = list(row_spans(near_x[0].T, M))
    for g in row_spans(near_x[0], points[0].stop * M):
        for i in points:
            tile = squares(x[g, i], y[g])
            near_x[0][g, i], near_x[1][g, i] = tile.min(2)
            least, places = tile.min(1)
            closer = (least < near_y[0][g]) | least.isnan()
            near_y[0][g] = torch.where(closer, least, near_y[0][g])
            near_y[1][g] = torch.where(closer, places.int() + i.start, near_y[1][g])
    return *near_x, *near_y


def pulled(
    grad: Tensor, x: Tensor, y: Tensor, places: Tensor, back: Tensor, weights: list[float],
    root: bool,
) -> Tensor:  # fmt: skip
    """The gradient to x, (G, N, D) as x; weights: those of x's nearest and of y's."""
    acc = accumulator(x.dtype)
    x_acc, y_acc = x.to(acc), y.to(acc)
    own = x_acc - _points(y_acc, places)
    dx = own * (_factor(own, root) * (weights[0] * grad)[:, None, None])
    other = _points(x_acc, back) - y_acc
    other = other * (_factor(other, root) * (weights[1] * grad)[:, None, None])
    dx.scatter_add_(1, back.long()[..., None].expand_as(other), other)
    return dx.to(x.dtype)


def _points(x: Tensor, places: Tensor) -> Tensor:
    return x.gather(1, places.long()[..., None].expand(-1, -1, x.shape[2]))


def _factor(delta: Tensor, root: bool) -> Tensor | float:
    if not root:
        return 2.0
    far = torch.linalg.vector_norm(delta, dim=-1, keepdim=True)
    return torch.where(far > 0, 1 / far, 0.0)
