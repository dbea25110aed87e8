"""The pairwise sigmoid loss as an operator of torch: with a fake, and a gradient known at once.

The result is one number, so that its gradient is known in the forward but for one factor: the
operator makes it there, from the scores that it has at hand, and backward multiplies.
torch.compile keeps an operator whole in its graph, and an operator takes tensors, numbers and
strings: so a mask goes by its key, and the implementation by its name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import sigmoid_torch
from ._dispatch import accumulator, first_order, full_precision
from .masks import twins
from .sigmoid_torch import Logits, Need, Results

fused: Any = None
if twins is not None:
    from . import sigmoid_fused as fused


@torch.library.custom_op("fastssl::pairwise_sigmoid", mutates_args=())
def sigmoid(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    mask: str,
    need: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`results`."""
    logits = Logits(q, k, scale, bias, row_ids, col_ids, mask)
    engine = fused if impl == "triton" else sigmoid_torch
    need_q, need_k, need_scale, need_bias = need
    found = engine.results(logits, (need_q, need_k, need_scale, need_bias))
    return found.total, found.q, found.k, found.scale, found.bias


@sigmoid.register_fake
def _(q, k, scale, bias, row_ids, col_ids, mask, need, impl):
    like = q.new_empty((), dtype=accumulator(q.dtype))
    sizes = q.shape, k.shape, (), ()
    made = (like.new_empty(s if n else 0) for s, n in zip(sizes, need, strict=True))
    return like, *made


class _Sigmoid(torch.autograd.Function):
    """Backward multiplies the gradients where they lie; a second one makes them anew."""

    @staticmethod
    def forward(ctx: Any, q, k, scale, bias, row_ids, col_ids, mask, need, impl):
        given = q, k, scale, bias, row_ids, col_ids
        found, *made = sigmoid(*given, mask, list(need), impl)
        ctx.made = None if torch.compiler.is_compiling() else made
        ctx.save_for_backward(*(made if ctx.made is None else given))
        ctx.dtypes = [x.dtype if n else None for x, n in zip(given, need, strict=False)]
        ctx.options = mask, list(need), impl
        return found

    @staticmethod
    @first_order
    def backward(ctx: Any, grad):
        if torch.compiler.is_compiling():  # which plans memory itself
            made = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
            return *((grad * g).to(dtype) if dtype else None for g, dtype in made), *(None,) * 5
        made = ctx.made or list(sigmoid(*ctx.saved_tensors, *ctx.options)[1:])  # which is emptied
        out = [made.pop(0).mul_(grad).to(dtype) if dtype else made.pop(0) for dtype in ctx.dtypes]
        return *(g if dtype else None for g, dtype in zip(out, ctx.dtypes, strict=True)), *(
            None,
        ) * 5


def total(logits: Logits, impl: str) -> Tensor:
    """The sum, 0-d, of the accumulator's dtype."""
    learned = torch.is_grad_enabled()
    need: Need = tuple(learned and x.requires_grad for x in logits[:4])  # pyright: ignore
    return _Sigmoid.apply(*logits, need, impl)  # pyright: ignore[reportReturnType]


def results(logits: Logits, need: Need, impl: str) -> Results:
    """The sum and its gradients, outside of autograd."""
    with torch.no_grad(), full_precision(logits.q.device):
        return Results(*sigmoid(*logits, list(need), impl))
