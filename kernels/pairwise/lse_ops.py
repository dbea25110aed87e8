"""Pairwise log-sum-exps as operators of torch, with a gradient, and which module computes them.

"torch" is lse_torch.  "triton" is one of two schedules in each pass: fused tiles (lse_triton), or
products by cuBLAS with one pass over the scores (lse_gemm); `classes.schedule` says which.
torch.compile keeps an operator whole in its graph, and an operator takes tensors, numbers and
strings: so a mask goes by its key, and the implementation by its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..common.autograd import FirstOrder, accumulator, first_order
from ..common.operators import operator
from ..common.rows import cut, evened
from . import lse_torch
from .classes import schedule
from .lse_torch import Grads, Pairs, weights


def backend(impl: str, x: Tensor, step: str) -> Any:
    """The module that has `statistics`, `log_sum`, `join`, `weights` and `gradients` of rows x.

    impl: "torch", "triton", or one of Triton's schedules by name, to be compared.
    step: that of `classes.schedule`; what one schedule makes of it the other can go on with.
    """
    if impl == "torch":
        return lse_torch
    from . import lse_gemm, lse_triton

    by = schedule(x, step) if impl == "triton" else impl
    return {"tiles": lse_triton, "products": lse_gemm}[by]


class Blocks(NamedTuple):
    """What merges blocks of keys itself has of an implementation: functions as in lse_torch."""

    impl: str

    def statistics(self, pairs: Pairs, both: bool) -> tuple[Tensor, Tensor]:
        """Those of rows and columns."""
        alone = not (both or pairs.same or pairs.scale.ndim) and pairs.bias is None
        step = "rows" if alone else "sides"
        return backend(self.impl, pairs.q, step).statistics(pairs, both)

    def gradients(
        self, pairs: Pairs, rows: Tensor | None, cols: Tensor | None, need: lse_torch.Need
    ) -> Grads:
        """Those to q, k, scale and bias."""
        return backend(self.impl, pairs.q, "grads").gradients(pairs, rows, cols, need)

    def log_sum(self, stats: Tensor) -> Tensor:
        """The log-sum-exp; not by `backend`, as the compiler cannot look into `schedule`."""
        return self._units.log_sum(stats)

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        """The statistics of two disjoint sets of pairs together."""
        return self._units.join(a, b)

    def weights(self, stats: Tensor, grad: Tensor) -> Tensor:
        """m_i and g_i / l_i."""
        return weights(stats, grad)

    @property
    def _units(self) -> Any:
        """The module of the statistics' unit, that of all of Triton's schedules, or torch's."""
        if self.impl == "torch":
            return lse_torch
        from . import scores_triton

        return scores_triton


def _stats(
    tensors: list[Tensor | None], mask: str, same: bool, both: bool, impl: str
) -> tuple[Tensor, Tensor]:
    """`statistics` of rows and columns.  tensors: q, k, scale, bias, row_ids, col_ids."""
    pairs = _pairs(tensors, mask, same, impl)
    return Blocks(impl).statistics(pairs, both)


def _pairs(tensors: Sequence[Any], mask: str, same: bool, impl: str) -> Pairs:
    q, k, scale, bias, row_ids, col_ids = tensors
    if impl != "torch":
        q = evened(q)
        k = q if same else evened(k)
    return Pairs(q, k, scale, bias, row_ids, col_ids, mask, same)


def _fake_stats(tensors, mask, same, both, impl):
    q, k = tensors[:2]
    like = q.new_empty(0, dtype=accumulator(q.dtype))
    return like.new_empty(2, q.shape[0]), like.new_empty(2, k.shape[0] if both else 0)


def _grads(
    tensors: list[Tensor | None],
    rows: Tensor | None,
    cols: Tensor | None,
    mask: str,
    same: bool,
    need: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`gradients` to q, k, scale and bias."""
    pairs, D = _pairs(tensors, mask, same, impl), tensors[0].shape[1]  # pyright: ignore
    dq, dk, *rest = Blocks(impl).gradients(pairs, rows, cols, tuple(need))  # pyright: ignore
    return cut(dq, D), cut(dk, D), *rest  # pyright: ignore[reportReturnType]


def _fake_grads(tensors, rows, cols, mask, same, need, impl):
    q, k, scale = tensors[:3]
    like = q.new_empty(0, dtype=accumulator(q.dtype))
    sizes = q.shape, k.shape, scale.shape, k.shape[:1]
    asked = need[0] or same, need[1] and not same, need[2], need[3]
    return tuple(like.new_empty(s if a else 0) for s, a in zip(sizes, asked, strict=True))


stats = operator("pairwise_stats", _stats, _fake_stats)
grads = operator("pairwise_grads", _grads, _fake_grads)


class _LSE(FirstOrder):
    """Row and column log-sum-exps; k is None for symmetric scores of q with itself."""

    @staticmethod
    def forward(ctx: Any, q, k, scale, bias, row_ids, col_ids, *options):
        mask, both, impl = ctx.options = options
        same, rest = k is None, (scale, bias, row_ids, col_ids)
        rows, cols = stats([q, q if same else k, *rest], mask, same, both, impl)
        ctx.save_for_backward(q, k, *rest, rows, cols)
        log_sum = Blocks(impl).log_sum
        return log_sum(rows), log_sum(cols)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_rows, grad_cols):
        q, k, scale, bias, row_ids, col_ids, rows, cols = ctx.saved_tensors
        mask, both, impl = ctx.options
        need, same = ctx.needs_input_grad[:4], k is None
        if same and both:  # the two are one
            grad_rows, both = grad_rows + grad_cols, False
        tensors = [q, q if same else k, scale, bias, row_ids, col_ids]
        sides = weights(rows, grad_rows), weights(cols, grad_cols) if both else None
        made = Grads(*grads(tensors, *sides, mask, same, list(need), impl))
        leaves = q, k, scale, bias
        out = [g.to(x.dtype) if n else None for g, x, n in zip(made, leaves, need, strict=True)]
        return *out, *(None,) * 5


def lse(pairs: Pairs, both: bool, impl: str) -> tuple[Tensor, Tensor]:
    """Row log-sum-exps (M,), and column ones (N,); (0,) of them unless `both`."""
    q, k, *rest, same = pairs
    k = None if same else k.view_as(k) if k is q else k  # the compiler wants no tensor twice
    return _LSE.call(q, k, *rest, both, impl)  # pyright: ignore[reportReturnType]
