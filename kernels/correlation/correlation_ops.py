"""Gram matrices, covariances and their gradients by Triton as operators of torch: as gram_torch.

torch.compile keeps an operator whole in its graph; what one has not got is an empty tensor there.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common.operators import operator
from ..common.rows import evened
from .gram_torch import Matrix, Terms


def _flat(total: Tensor, matrices: list[Matrix]) -> list[Tensor]:
    """The results of an operator, which cannot return None: an absent part is an empty tensor."""
    parts = [x for matrix in matrices for x in matrix]
    return [total, *(total.new_empty(0) if x is None else x for x in parts)]


def _matrix(values: Tensor, diagonal: Tensor, fp16_scale: Tensor) -> Matrix:
    """What `_flat` took apart."""
    return Matrix(
        values, diagonal if diagonal.numel() else None, None if fp16_scale.ndim else fp16_scale
    )


def _flat_fake(x: Tensor, *shapes: tuple[Any, Any], apart: bool) -> list[Tensor]:
    """Tensors as `_flat` makes of x's matrices."""
    floats = partial(x.new_empty, dtype=torch.float32)
    scale = () if x.dtype == torch.float16 else 0
    parts = [(x.new_empty(s), floats(s[0] if apart else 0), floats(scale)) for s in shapes]
    return [floats(()), *(tensor for part in parts for tensor in part)]


def _run_grams(sides: list[Tensor], others: list[Tensor], start: int) -> list[Tensor]:
    """Total; values, diagonal and scale of each side's Gram.  others: none where all are here."""
    from . import gram_triton

    sides, others = [evened(x) for x in sides], [evened(x) for x in others]
    return _flat(*gram_triton.gram_matrices(sides, others or None, start))


def _fake_grams(sides, others, start):
    n, N = sides[0].shape[0], (others or sides)[0].shape[0]
    return _flat_fake(sides[0], *((n, N) for _ in sides), apart=True)


def _run_covariance(a: Tensor, b: Tensor | None) -> list[Tensor]:
    """Total without the diagonal, if D is E; values, diagonal and scale."""
    from . import gram_triton

    total, matrix = gram_triton.covariance_matrix(a, b)
    return _flat(total, [matrix])


def _fake_covariance(a, b):
    D, E = a.shape[1], (a if b is None else b).shape[1]
    return _flat_fake(a, (D, E), apart=D == E)


def _run_gradient(
    matrix: list[Tensor], rows: Tensor | None, terms: list[Tensor | None], transposed: bool
) -> Tensor:
    """By a Gram, of rows; rows None: by a covariance, of terms' `other`.

    matrix: values, diagonal, scale.  terms: mine, other, coef, factor.
    """
    from .gradient_triton import gradient

    return gradient(_matrix(*matrix), rows, Terms(*terms), transposed)  # pyright: ignore


def _fake_gradient(matrix, rows, terms, transposed):
    values = matrix[0]
    if rows is not None:
        return rows.new_empty(values.shape[0], rows.shape[1])
    return terms[1].new_empty(terms[1].shape[0], values.shape[0 if transposed else 1])


_grams = operator("correlation_grams", _run_grams, _fake_grams)
_covariance = operator("correlation_covariance", _run_covariance, _fake_covariance)
_gradient = operator("correlation_gradient", _run_gradient, _fake_gradient)


def grams(
    a: Tensor, b: Tensor | None, all_a: Tensor, all_b: Tensor | None, start: int
) -> tuple[Tensor, Matrix, Matrix | None]:
    """As gram_torch.grams."""
    sides = [x for x in (a, b) if x is not None]
    others = [x for x in (all_a, all_b) if x is not None]
    total, *parts = _grams(sides, [] if len(a) == len(all_a) else others, start)
    return total, _matrix(*parts[:3]), None if b is None else _matrix(*parts[3:])


def covariance(a: Tensor, b: Tensor | None, split: bool) -> tuple[Tensor, Tensor, Matrix]:
    """As gram_torch.covariance; without `split` a square matrix's diagonal goes apart."""
    total, values, diagonal, scale = _covariance(a, b)
    if split:
        return diagonal, total, _matrix(values, diagonal.new_empty(0), scale)
    matrix = _matrix(values, diagonal, scale)
    return diagonal.new_empty(0), total + diagonal.square().sum(), matrix


def gradient(matrix: Matrix, rows: Tensor, terms: Terms) -> Tensor:
    """As gram_torch.gradient."""
    if terms.coef is None:
        terms = terms._replace(other=None)
    return _gradient(_flat(terms.factor, [matrix])[1:], rows, list(terms), False)


def gradient_across(
    matrix: Matrix, other: Tensor, coef: Tensor | None, factor: Tensor, transposed: bool
) -> Tensor:
    """As gram_torch.gradient_across."""
    if coef is None and matrix.diagonal is not None:
        coef = factor * matrix.diagonal
    whole = _flat(factor, [Matrix(matrix.values, None, matrix.fp16_scale)])[1:]
    return _gradient(whole, None, [None, other, coef, factor], transposed)
