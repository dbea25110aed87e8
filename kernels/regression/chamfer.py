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

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..common.autograd import FirstOrder, accumulator, finished, first_order
from ..common.checks import require_float
from ..common.chunks import row_spans
from ..common.dispatch import declare
from ..common.operators import launches

DIMENSIONS = 8


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


def _squares(x: Tensor, y: Tensor) -> Tensor:
    """|x - y|^2 of every pair, (..., N, M), by coordinates: nothing cancels far from the origin."""
    acc = accumulator(x.dtype)
    total = x.new_zeros(*x.shape[:-1], y.shape[-2], dtype=acc)
    for k in range(x.shape[-1]):
        delta = x[..., k, None].to(acc) - y[..., None, :, k].to(acc)
        total.addcmul_(delta, delta)
    return total


def _nearest(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
            tile = _squares(x[g, i], y[g])
            near_x[0][g, i], near_x[1][g, i] = tile.min(2)
            least, places = tile.min(1)
            closer = (least < near_y[0][g]) | least.isnan()
            near_y[0][g] = torch.where(closer, least, near_y[0][g])
            near_y[1][g] = torch.where(closer, places.int() + i.start, near_y[1][g])
    return *near_x, *near_y


def _pull(
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


def _fake_nearest(x, y):
    sizes = (x.shape[:2], torch.float32), (x.shape[:2], torch.int32)
    sizes += (y.shape[:2], torch.float32), (y.shape[:2], torch.int32)
    return tuple(x.new_empty(shape, dtype=dtype) for shape, dtype in sizes)


_TORCH = SimpleNamespace(nearest=_nearest, pull=_pull)
_TRITON = launches(
    f"{__package__}.chamfer_triton",
    _TORCH,
    nearest=_fake_nearest,
    pull=lambda grad, x, *arguments: x.new_empty(x.shape),
)
backends = {"torch": _TORCH, "triton": _TRITON}


class _Chamfer(FirstOrder):
    @staticmethod
    def forward(ctx: Any, pred, target, root, impl):
        least_p, places_p, least_t, places_t = backends[impl].nearest(pred, target)
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
        pull, (need_p, need_t) = backends[ctx.impl].pull, ctx.needs_input_grad[:2]
        d_p = pull(grad, pred, target, at_p, at_t, [w_p, w_t], ctx.root) if need_p else None
        d_t = pull(grad, target, pred, at_t, at_p, [w_t, w_p], ctx.root) if need_t else None
        return d_p, d_t, None, None


_CHAMFER = declare("chamfer", _Chamfer.call, chamfer_reference)


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
    loss = _CHAMFER(impl, pred, target, kind == "l1", inputs={"pred": pred, "target": target})
    return loss.to(accumulator(pred.dtype))
