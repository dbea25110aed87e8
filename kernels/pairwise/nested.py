"""Log-sum-exps of the similarities of nested prefixes, in one sweep over the features.

    s^p_ij = scale q_i . k_j over the first m_p of D features        m_1 < ... < m_P <= D
    lse^p_i = log sum_{j kept} exp(s^p_ij), and lse^p_j over a column's rows        [nats]
    normalize: q_i and k_j are divided by the length of those m_p features first

Why: a loss of P prefixes (Matryoshka) multiplies the first features P times over.  A longer
prefix's products are a shorter one's and those of the features between: products cost m_P features
in all, not the sum of m, in forward and backward.  Prefixes are normalized by a factor of each row
and each column, so that one running sum serves them all.
Memory: O((M + N) (D + P)), and P tiles.  In place: nothing.  A row with no pair left is -inf.
In torch alone, on every device: nested_torch.py.
Source: Kusupati et al. 2022, Matryoshka Representation Learning, arXiv:2205.13147.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.autograd import FirstOrder, accumulator, first_order
from ..common.dispatch import declare
from ..common.operators import operator
from . import nested_torch
from .lse import Mask, as_number, check_pairs, pairwise_lse_reference
from .lse_torch import log_sum, weights
from .masks import Masks
from .nested_torch import Nested


def pairwise_lse_nested_reference(q, k, dims, scale, normalize=False, mask=None):
    """The formula, prefix by prefix, in the dtype it is given: the tests' oracle."""
    unit = F.normalize if normalize else lambda x: x
    pairs = [(unit(q[:, :m]), unit(k[:, :m])) for m in dims]
    sides = [pairwise_lse_reference(a, b, scale, mask, both=True) for a, b in pairs]
    rows, cols = zip(*sides, strict=True)
    return torch.stack(rows), torch.stack(cols)


def _run(q, k, dims, scale, normalize, mask: Masks, impl: str) -> tuple[Tensor, Tensor]:
    same = q is k and mask.symmetric
    options = list(dims), normalize, mask.key
    k = None if same else k.view_as(k) if k is q else k  # the compiler wants no tensor twice
    return _Nested.apply(q, k, scale, *mask.ids(), *options)  # pyright: ignore


_NESTED = declare("pairwise_lse_nested", _run, pairwise_lse_nested_reference, fused=())


def _statistics(
    tensors: list[Tensor | None], dims: list[int], normalize: bool, mask: str, same: bool
) -> tuple[Tensor, Tensor]:
    return nested_torch.statistics(Nested(*tensors, dims, normalize, mask, same))  # pyright: ignore


def _fake_statistics(tensors, dims, normalize, mask, same):
    like = tensors[0].new_empty(0, dtype=accumulator(tensors[0].dtype))
    return tuple(like.new_empty(2, len(dims), len(x)) for x in tensors[:2])


def _gradients(
    tensors: list[Tensor | None],
    sides: list[Tensor],
    dims: list[int],
    normalize: bool,
    mask: str,
    same: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    nested = Nested(*tensors, dims, normalize, mask, same)  # pyright: ignore
    return nested_torch.gradients(nested, *sides)


def _fake_gradients(tensors, sides, dims, normalize, mask, same):
    like = tensors[0].new_empty(0, dtype=accumulator(tensors[0].dtype))
    shapes = tensors[0].shape, (0,) if same else tensors[1].shape, ()
    return tuple(like.new_empty(shape) for shape in shapes)


nested_statistics = operator("nested_statistics", _statistics, _fake_statistics)
nested_gradients = operator("nested_gradients", _gradients, _fake_gradients)


class _Nested(FirstOrder):
    """Log-sum-exps (P, M) of rows and (P, N) of columns; k is None for symmetric scores."""

    @staticmethod
    def forward(ctx: Any, q, k, scale, row_ids, col_ids, *options):
        same = k is None
        tensors = [q, q if same else k, scale, row_ids, col_ids]
        rows, cols = nested_statistics(tensors, *options, same)
        ctx.save_for_backward(q, k, scale, row_ids, col_ids, rows, cols)
        ctx.options = options
        return log_sum(rows), log_sum(cols)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_rows, grad_cols):
        q, k, scale, row_ids, col_ids, rows, cols = ctx.saved_tensors
        same = k is None
        if same:  # the two are one
            grad_rows = grad_rows + grad_cols
        sides = [weights(rows, grad_rows), weights(cols, grad_cols)]
        tensors = [q, q if same else k, scale, row_ids, col_ids]
        made = nested_gradients(tensors, sides, *ctx.options, same)
        need = ctx.needs_input_grad[:3]
        out = [
            g.to(x.dtype) if n else None for g, x, n in zip(made, (q, k, scale), need, strict=True)
        ]
        return *out, *(None,) * 5


def pairwise_lse_nested(
    q: Tensor,
    k: Tensor,
    dims: Sequence[int],
    scale: float | Tensor,
    *,
    normalize: bool = False,
    mask: Mask = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Log-sum-exps of each prefix: (P, M) over each row's columns, (P, N) over each column's rows.

    q (M, D), k (N, D), which may be q itself; scale: a number or a 0-d tensor, with gradient.
    dims: integers that rise from 1 or more to D at most.  mask: as in `pairwise_lse`.
    Raises ValueError for what `pairwise_lse` refuses, and other dims.

    >>> z = torch.eye(4)
    >>> pairwise_lse_nested(z, z, [1, 4], 1.0)[0][:, 3]  # ln 4, and ln(3 + e)
    tensor([1.3863, 1.7437])
    """
    masks = check_pairs(q, k, mask)
    whole = all(isinstance(m, int) for m in dims)
    rise = whole and all(a < b for a, b in zip((0, *dims), (*dims, q.shape[1] + 1), strict=True))
    if not dims or not rise:
        raise ValueError(f"dims must be integers that rise from 1 to {q.shape[1]}, got {dims}")
    scale = as_number("scale", scale, q)
    inputs = {"q": q, "k": k}
    return _NESTED(impl, q, k, tuple(dims), scale, normalize, masks, inputs=inputs)
