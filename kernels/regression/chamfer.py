"""The Chamfer distance of two point clouds.

    s(x, y) = mean_n min_m f(x_n - y_m)       chamfer(p, t) = s(p, t) + s(t, p)
    "l2": f(d) = |d|^2                        "l1": f(d) = |d| / 2

G pairs of clouds, of N and M points in D <= 8 dimensions.
Why: eager makes all (G, N, M, D) differences and (G, N, M) distances, and keeps them for backward.
Here a tile of distances is made at a time; each point's nearest one, 4 bytes, is all that is kept,
and the gradient goes through it alone: exact, wherever the nearest is one.  Where several are
equally near it goes through the first.  Differences are squared, not expanded to products: clouds
far from the origin lose nothing.
Cost: 3 D N M operations a pair, each way in Triton; in torch, backward costs N + M.
Memory: O(N + M), and one chunk.  In place: nothing.
Source: Pang et al. 2022, Point-MAE, arXiv:2203.06604, section 3.3, whose reconstruction loss is
"l2"; "l1", half the sum of both mean distances, is usual for completion of point clouds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.dispatch import accumulator, declare, finished, first_order, require_float
from ..correlation.moments import by_engine, implementation
from ..pairwise.masks import twins
from . import chamfer_torch

DIMENSIONS = 8
engines: dict[str, Any] = {"torch": chamfer_torch}
if twins is not None:
    from . import chamfer_ops

    engines["triton"] = chamfer_ops


def chamfer_reference(pred, target, root):
    """The formula, eager, in the dtype it is given: all differences at once."""
    pairs = (pred[:, :, None] - target[:, None]).square().sum(-1)
    loss = 0
    for axis in (1, 2):
        least = pairs.min(axis).values
        loss = loss + (_root(least) if root else least).mean(1)
    return loss / 2 if root else loss


def _root(least: Tensor) -> Tensor:
    """Its square root, with gradient 0 at 0."""
    return torch.where(least > 0, least, 1).sqrt() * (least > 0)


class _Chamfer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pred, target, root, impl):
        least_p, places_p, least_t, places_t = engines[impl].nearest(pred, target)
        ctx.save_for_backward(pred, target, places_p, places_t)
        ctx.root, ctx.impl = root, impl
        if root:
            return (least_p.sqrt().mean(1) + least_t.sqrt().mean(1)) / 2
        return finished(least_p.mean(1) + least_t.mean(1))

    @staticmethod
    @first_order
    def backward(ctx: Any, grad):
        pred, target, at_p, at_t = ctx.saved_tensors
        half = 0.5 if ctx.root else 1.0
        w_p, w_t = half / pred.shape[1], half / target.shape[1]
        pulled, (need_p, need_t) = engines[ctx.impl].pulled, ctx.needs_input_grad[:2]
        d_p = pulled(grad, pred, target, at_p, at_t, [w_p, w_t], ctx.root) if need_p else None
        d_t = pulled(grad, target, pred, at_t, at_p, [w_t, w_p], ctx.root) if need_t else None
        return d_p, d_t, None, None


_CHAMFER = declare("chamfer", **by_engine(_Chamfer.apply, chamfer_reference))


def chamfer(pred: Tensor, target: Tensor, *, kind: str = "l2", impl: str = "auto") -> Tensor:
    """The Chamfer distance of each pair of clouds: (G,) float32.

    pred (G, N, D), target (G, M, D): any float dtype, D <= 8, N and M at least 1.
    kind: "l2" sums both means of squared distances, in the points' unit squared; "l1" averages
    both means of distances, in the points' unit, with gradient 0 at distance 0.
    Gradients to pred and target, through each point's nearest, the first of several; first order
    only.  A cloud with a coordinate that is not finite has a loss that is not finite.
    impl: "auto", "triton", "torch" or "reference" (makes all differences, in the inputs' dtype).
    Raises ValueError for shapes that disagree, an empty cloud, an unknown kind and an unknown impl.

    >>> chamfer(torch.tensor([[[0.0], [1.0]]]), torch.tensor([[[3.0]]]))
    tensor([10.5000])
    """
    require_float(pred=pred, target=target)
    shapes = tuple(pred.shape), tuple(target.shape)
    if not (pred.ndim == target.ndim == 3 and shapes[0][::2] == shapes[1][::2]):
        got = f"{shapes[0]} and {shapes[1]}"
        raise ValueError(f"pred and target must be (G, N, D) and (G, M, D), got {got}")
    if not 1 <= pred.shape[2] <= DIMENSIONS:
        raise ValueError(f"points must have 1 to {DIMENSIONS} coordinates, got {pred.shape[2]}")
    if 0 in (pred.shape[1], target.shape[1]):
        got = f"{shapes[0]} and {shapes[1]}"
        raise ValueError(f"pred and target must have points, got {got}")
    if kind not in ("l2", "l1"):
        raise ValueError(f"kind must be 'l2' or 'l1', got {kind!r}")
    for name, x in (("pred", pred), ("target", target)):
        impl = implementation(impl, name, x)
    loss = _CHAMFER(impl, pred.device, pred, target, kind == "l1")
    return loss.to(accumulator(pred.dtype))
