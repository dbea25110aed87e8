"""Log-sum-exps of nested prefixes as operators of torch, with a gradient, of the Triton kernels.

torch.compile keeps an operator whole in its graph, and an operator takes tensors, numbers and
strings: so a mask goes by its key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common import rows as common_rows
from ..common.autograd import FirstOrder, first_order
from ..common.operators import operator
from .lse_torch import weights
from .masks import Masks
from .nested_rows import Nested, Rows


def _nested(
    tensors: Sequence[Any], dims: Sequence[int], normalize: bool, mask: str, same: bool
) -> Nested:
    q, k, scale, row_ids, col_ids = tensors
    rows = Rows(q, dims, normalize, common_rows.EVEN)
    cols = rows if same else Rows(k, dims, normalize, common_rows.EVEN)
    return Nested(rows, cols, scale, row_ids, col_ids, mask, same)


def _stats(
    tensors: list[Tensor | None],
    dims: list[int],
    normalize: bool,
    mask: str,
    same: bool,
    both: bool,
) -> tuple[Tensor, Tensor]:
    """Statistics of rows and columns.  tensors: q, k, scale, row_ids, col_ids."""
    from . import nested_triton

    return nested_triton.statistics(_nested(tensors, dims, normalize, mask, same), both)


def _fake_stats(tensors, dims, normalize, mask, same, both):
    q, k = tensors[:2]
    like = q.new_empty(0, dtype=torch.float32)
    P = len(dims)
    return like.new_empty(2, P, q.shape[0]), like.new_empty(2, P, k.shape[0] if both else 0)


def _grads(
    tensors: list[Tensor | None],
    rows: Tensor,
    cols: Tensor | None,
    dims: list[int],
    normalize: bool,
    mask: str,
    same: bool,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients to q, k and scale, as far as they are needed.  rows, cols: `weights`."""
    from . import nested_triton

    nested = _nested(tensors, dims, normalize, mask, same)
    return nested_triton.gradients(nested, rows, cols, need)


def _fake_grads(tensors, rows, cols, dims, normalize, mask, same, need):
    like = tensors[0].new_empty(0, dtype=torch.float32)
    asked = need[0] or same, need[1] and not same, need[2]
    sizes = (x.shape for x in tensors[:3])
    return tuple(like.new_empty(s if a else 0) for s, a in zip(sizes, asked, strict=True))


stats = operator("pairwise_nested_stats", _stats, _fake_stats)
grads = operator("pairwise_nested_grads", _grads, _fake_grads)


def log_sum(stats: Tensor) -> Tensor:
    """That of the kernels' statistics, which the compiler looks into."""
    from .scores_triton import log_sum

    return log_sum(stats)


class _NestedLSE(FirstOrder):
    """Row and column log-sum-exps; k is None for symmetric scores of q with itself."""

    @staticmethod
    def forward(ctx: Any, q, k, scale, row_ids, col_ids, *options):
        dims, normalize, mask, both = ctx.options = options
        same, rest = k is None, (scale, row_ids, col_ids)
        rows, cols = stats([q, q if same else k, *rest], list(dims), normalize, mask, same, both)
        ctx.save_for_backward(q, k, *rest, rows, cols)
        return log_sum(rows), log_sum(cols)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_rows, grad_cols):
        q, k, scale, row_ids, col_ids, rows, cols = ctx.saved_tensors
        dims, normalize, mask, both = ctx.options
        need, same = list(ctx.needs_input_grad[:3]), k is None
        if same and both:  # the two are one
            grad_rows, both = grad_rows + grad_cols, False
        tensors = [q, q if same else k, scale, row_ids, col_ids]
        sides = weights(rows, grad_rows), weights(cols, grad_cols) if both else None
        made = grads(tensors, *sides, list(dims), normalize, mask, same, need)
        leaves = q, k, scale
        out = [g.to(x.dtype) if n else None for g, x, n in zip(made, leaves, need, strict=True)]
        return *out, *(None,) * 6


def lse(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    dims: tuple[int, ...],
    normalize: bool,
    mask: Masks,
    both: bool,
) -> tuple[Tensor, Tensor]:
    """Row log-sum-exps (P, M), and column ones (P, N): (P, 0) of them unless `both`."""
    same = q is k and mask.symmetric
    other = None if same else k.view_as(k) if k is q else k  # the compiler wants no tensor twice
    options = dims, normalize, mask.key, both
    return _NestedLSE.call(q, other, scale, *mask.ids(), *options)  # pyright: ignore
