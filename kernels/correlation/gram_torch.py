"""Gram matrices, covariances and their gradients in torch, on any device.

The functions that `plans.py` builds on.  Symmetric matrices are computed in STRIPS
strips of rows, each from its diagonal block on, and mirrored: nearly half the products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.autograd import accumulator
from ..common.chunks import row_spans, spans
from ..common.matmul import product, weighted

STRIPS = 4  # of a symmetric product: 5/8 of the work, in products still large
LEAST_ROWS = 128  # of a strip


class Matrix(NamedTuple):
    """What a gradient needs of a Gram matrix or of a covariance.

    values: the matrix, where an implementation may hold its diagonal apart, in float32, and what
    is left in 16 bits, as multiples of `fp16_scale`.
    """

    values: Tensor
    diagonal: Tensor | None = None
    fp16_scale: Tensor | None = None


class Terms(NamedTuple):
    """What a gradient has beside its product with a matrix.

    mine (n, D): the rows that a Gram's diagonal stands for.  other (n, D): the second tensor's,
    with coef (D,), or both None.  factor: 0-d.
    """

    mine: Tensor | None
    other: Tensor | None
    coef: Tensor | None
    factor: Tensor


def _symmetric(x: Tensor) -> Tensor:
    """x x^T."""
    n = len(x)
    step = max(LEAST_ROWS, -(-n // STRIPS))
    if step >= n:
        return product(x, x.T)
    out = x.new_empty(n, n, dtype=accumulator(x.dtype))
    for i in spans(n, step):
        out[i, i.start :] = product(x[i], x[i.start :].T)
        out[i.stop :, i] = out[i, i.stop :].T
    return out


def dot(x: Tensor, y: Tensor) -> Tensor:
    """sum_ij x_ij y_ij, a chunk of rows at a time."""
    acc = accumulator(x.dtype)
    parts = [(x[i].to(acc) * y[i].to(acc)).sum() for i in row_spans(x, x.shape[1])]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


def grams(
    a: Tensor, b: Tensor | None, all_a: Tensor, all_b: Tensor | None, start: int
) -> tuple[Tensor, Matrix, Matrix | None]:
    """sum_ij (a_i . a_j)(b_i . b_j) for this rank's rows i and all rows j; the Gram of a, of b.

    a, b (n, D): rows start, start + 1, ... of all_a, all_b (N, D).  b is None: it is a.
    """
    matrices = [
        _symmetric(x) if len(x) == len(others) else product(x, others.T)
        for x, others in ((a, all_a), (b, all_b))
        if x is not None and others is not None
    ]
    total, last = dot(matrices[0], matrices[-1]), None if b is None else Matrix(matrices[1])
    return total, Matrix(matrices[0]), last


def cross(a: Tensor, b: Tensor | None) -> Tensor:
    """a^T b (D, E), this rank's; b is None: it is a."""
    return _symmetric(a.T) if b is None else product(a.T, b)


def squared(c: Tensor, split: bool) -> tuple[Tensor, Tensor]:
    """The diagonal of c, taken out of it, and the sum of the squares that are left.

    Without `split` the diagonal stays, and what is returned of it is empty.
    """
    diagonal = c.new_empty(0)
    if split:
        diagonal = c.diagonal().clone()
        c.diagonal().zero_()
    return diagonal, dot(c, c)


def covariance(a: Tensor, b: Tensor | None, split: bool) -> tuple[Tensor, Tensor, Matrix]:
    """One process: diagonal and sum of squares as `squared` has them, and a^T b."""
    c = cross(a, b)
    return *squared(c, split), Matrix(c)


def overlap(p: Matrix, q: Matrix) -> Tensor:
    """sum_ij P_ij Q_ij of two matrices of one implementation."""
    whole = dot(p.values, q.values)
    if p.fp16_scale is not None and q.fp16_scale is not None:
        whole = whole * p.fp16_scale * q.fp16_scale
    if p.diagonal is not None and q.diagonal is not None:
        whole = whole + torch.dot(p.diagonal, q.diagonal)
    return whole


def blend(p: Matrix, q: Matrix, x: Tensor, y: Tensor) -> Matrix:
    """x P + y Q of two matrices of one implementation; x, y: 0-d."""
    scale, diagonal, in_p, in_q = None, None, x, y
    if p.fp16_scale is not None and q.fp16_scale is not None:
        in_p, in_q = x * p.fp16_scale, y * q.fp16_scale
        scale = in_p.abs() + in_q.abs()
        least = torch.finfo(scale.dtype).tiny
        in_p, in_q = in_p / scale.clamp_min(least), in_q / scale.clamp_min(least)
    if p.diagonal is not None and q.diagonal is not None:
        diagonal = x * p.diagonal + y * q.diagonal
    values = (p.values * in_p).addcmul_(q.values, in_q.expand_as(q.values))
    return Matrix(values.to(p.values.dtype), diagonal, scale)


def gradient(matrix: Matrix, rows: Tensor, terms: Terms) -> Tensor:
    """factor * G rows + other * coef, in rows' dtype: the gradient by a Gram matrix G.

    rows (N, D): all ranks'.
    """
    _, other, coef, factor = terms
    out = (matrix.values * factor) @ rows.to(factor.dtype)
    if other is not None and coef is not None:
        out = out.addcmul_(other.to(out.dtype), coef)
    return out.to(rows.dtype)


def gradient_across(
    matrix: Matrix, other: Tensor, coef: Tensor | None, factor: Tensor, transposed: bool
) -> Tensor:
    """factor * other C + other * coef (C^T if transposed): the gradient by a covariance C (D, E).

    The diagonal of C is zero where there is a coef, and takes it.
    """
    weights = matrix.values * factor
    if coef is not None:
        weights.diagonal().copy_(coef)
    return weighted(other, weights.T if transposed else weights).to(other.dtype)
