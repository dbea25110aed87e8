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

from ..common.autograd import FirstOrder, accumulator, first_order, full_precision
from ..common.operators import operator
from ..common.rows import cut, evened
from . import sigmoid_torch
from .sigmoid_torch import Logits, Need, Results


def _backend(impl: str) -> Any:
    if impl == "torch":
        return sigmoid_torch
    from . import sigmoid_triton

    return sigmoid_triton


def _run(
    tensors: list[Tensor | None], mask: str, need: list[bool], impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`results`.  tensors: those of `Logits`."""
    (q, k, *rest), even = tensors, evened if impl == "triton" else lambda x: x
    logits = Logits(even(q), even(k), *rest, mask)  # pyright: ignore
    total, dq, dk, *numbers = _backend(impl).results(logits, tuple(need))
    return total, cut(dq, q.shape[1]), cut(dk, q.shape[1]), *numbers  # pyright: ignore


def _fake(tensors, mask, need, impl):
    q, k = tensors[:2]
    like = q.new_empty((), dtype=accumulator(q.dtype))
    sizes = q.shape, k.shape, (), ()
    made = (like.new_empty(s if n else 0) for s, n in zip(sizes, need, strict=True))
    return like, *made


sigmoid = operator("pairwise_sigmoid", _run, _fake)


class _Sigmoid(FirstOrder):
    """Backward multiplies the gradients where they lie; a second one makes them anew."""

    @staticmethod
    def forward(ctx: Any, *arguments):
        *tensors, mask, need, impl = arguments
        total, *made = sigmoid(tensors, mask, list(need), impl)
        ctx.made = None if torch.compiler.is_compiling() else made
        ctx.save_for_backward(*(made if ctx.made is None else tensors))
        ctx.dtypes = [x.dtype if n else None for x, n in zip(tensors, need, strict=False)]
        ctx.options = mask, list(need), impl
        return total

    @staticmethod
    @first_order
    def backward(ctx: Any, grad):
        if torch.compiler.is_compiling():  # which plans memory itself
            made = [grad * g for g in ctx.saved_tensors]
        else:
            made = ctx.made or sigmoid(list(ctx.saved_tensors), *ctx.options)[1:]
            made, ctx.made = [g.mul_(grad) for g in made], None
        out = (g.to(dtype) if dtype else None for g, dtype in zip(made, ctx.dtypes, strict=True))
        return *out, *(None,) * 5


def total(logits: Logits, impl: str) -> Tensor:
    """The sum, 0-d, of the accumulator's dtype."""
    learned = torch.is_grad_enabled()
    need: Need = tuple(learned and x.requires_grad for x in logits[:4])  # pyright: ignore
    return _Sigmoid.call(*logits, need, impl)  # pyright: ignore[reportReturnType]


def results(logits: Logits, need: Need, impl: str) -> Results:
    """The sum and its gradients, outside of autograd."""
    with torch.no_grad(), full_precision(logits.q.device):
        return Results(*sigmoid(list(logits[:6]), logits.mask, list(need), impl))
