"""How far the similarities among an image's patches are from a teacher's.

    distance_b = mean_ij (x_bi . x_bj - y_bi . y_bj)^2          x, y (B, P, D)

With d = x - y and s = x + y, 2 (x x' - y y') = d s' + s d', so that

    4 P^2 distance = |d s' + s d'|^2                            P x P a patch with each
                   = 2 tr(d'd s's) + 2 tr(d's d's)              D x D, for few features

Why: eager makes two (B, P, P) similarities, their difference and its square, and keeps three; here
those of a few images at a time are made, by one product, and made again for the gradient.
Accuracy: nothing large is subtracted, so that the distance of x from a y very near it keeps its
digits; |x'x|^2 + |y'y|^2 - 2 |x'y|^2 has none.  Of D x D products a distance far below |d| |s| / P,
as of a y that is x rotated, is good to their rounding alone.
Cost: 2 P^2 D flops an image, backward twice that; or 6 P D^2, and 10.
Memory: the gradient, and one chunk.  In place: nothing.
Source: Simeoni et al. 2025, DINOv3, arXiv:2508.10104, section 4.2: Gram anchoring.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..common.autograd import FirstOrder, accumulator, first_order
from ..common.checks import check_pair, require_features
from ..common.chunks import row_spans
from ..common.dispatch import declare
from ..common.operators import operator


def gram_distance_reference(x, y):
    """The formula, eager, in the dtype it is given: all (B, P, P) similarities."""
    return (x @ x.mT - y @ y.mT).square().mean((1, 2)).to(accumulator(x.dtype))


def has_few_features(P: int, D: int) -> bool:
    """Whether D x D products, five of P D^2 each way, cost less than two of P^2 D."""
    return 5 * D < 2 * P


def _chunks(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some images at a time: x - y and x + y in the dtype of sums."""
    (_, P, D), acc = x.shape, accumulator(x.dtype)
    side = D if has_few_features(P, D) else P
    for i in row_spans(x, 3 * side * side + 3 * P * D):
        wide, other = x[i].to(acc), y[i].to(acc)
        yield i, wide - other, wide + other


def _whole(d: Tensor, s: Tensor) -> Tensor:
    """Twice x x' - y y', (b, P, P)."""
    m = d @ s.mT
    return m + m.mT


def _distance(x: Tensor, y: Tensor) -> Tensor:
    (B, P, D), acc = x.shape, accumulator(x.dtype)
    value = x.new_empty(B, dtype=acc)
    for i, d, s in _chunks(x, y):
        if has_few_features(P, D):
            both = d.mT @ s
            sums = ((d.mT @ d) * (s.mT @ s)).sum((1, 2)) + (both * both.mT).sum((1, 2))
            value[i] = sums.clamp_min_(0).mul_(0.5 / P**2)
        else:
            value[i] = torch.linalg.vector_norm(_whole(d, s), dim=(1, 2)).square_().div_(4 * P**2)
    return value


def _gradients(
    grad: Tensor, x: Tensor, y: Tensor, need_x: bool, need_y: bool
) -> tuple[Tensor, Tensor]:
    """Those of x and of y; something, whatever it is, in the place of one that is not needed."""
    _, P, D = x.shape
    dx, dy = x.new_empty(x.shape if need_x else (0,)), y.new_empty(y.shape if need_y else (0,))
    for i, d, s in _chunks(x, y):
        g = (grad[i] / P**2)[:, None, None]
        if has_few_features(P, D):
            both, dd, ss = d.mT @ s, d.mT @ d, s.mT @ s
            if need_x:
                dx[i] = (d @ (ss + both.mT)).baddbmm_(s, both + dd).mul_(g)
            if need_y:
                dy[i] = (d @ (both.mT - ss)).baddbmm_(s, dd - both).mul_(g)
            continue
        m = _whole(d, s).mul_(2 * g)
        if need_x:
            dx[i] = m @ x[i].to(m.dtype)
        if need_y:
            dy[i] = (m @ y[i].to(m.dtype)).neg_()
    return dx, dy


def _fake_gradients(grad, x, y, need_x, need_y):
    return x.new_empty(x.shape if need_x else (0,)), y.new_empty(y.shape if need_y else (0,))


_measure = operator(
    "gram_distance", _distance, lambda x, y: x.new_empty(x.shape[0], dtype=accumulator(x.dtype))
)
_pull = operator("gram_distance_grads", _gradients, _fake_gradients)


class _GramDistance(FirstOrder):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, impl: str) -> Tensor:
        ctx.save_for_backward(x, y)
        return _measure(x, y)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        need = ctx.needs_input_grad
        dx, dy = _pull(grad, *ctx.saved_tensors, *need[:2])
        return dx if need[0] else None, dy if need[1] else None, None


_GRAM = declare("gram_distance", _GramDistance.call, gram_distance_reference, fused=())


def gram_distance(x: Tensor, y: Tensor, *, impl: str = "auto") -> Tensor:
    """mean_ij (x_i . x_j - y_i . y_j)^2 over the pairs of patches of each image: (B,) float32.

    x, y (B, P, D): any float dtype, one for both; products and sums in float32, or float64 of that.
    Gradients to x and y; first order only.
    impl: "auto", "torch" or "reference" (makes all similarities, in the inputs' dtype).
    Raises ValueError for shapes, dtypes or devices that disagree, and for no patches or features.

    >>> x = torch.eye(2)[None]
    >>> gram_distance(x, 2 * x)  # 1 - 4 of two pairs of four
    tensor([4.5000])
    """
    check_pair(x, y, ("x", "y"))
    if x.ndim != 3 or x.shape != y.shape or x.shape[1] == 0:
        got = f"{tuple(x.shape)} and {tuple(y.shape)}"
        raise ValueError(f"x and y must both be (B, P, D), P at least 1, got {got}")
    require_features(x=x)
    return _GRAM(impl, x, y, inputs={"x": x})
