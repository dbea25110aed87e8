"""Tokens in and out of a sequence as operators of torch, and their gradients."""

from __future__ import annotations

from typing import Any

import torch

from ..common.autograd import FirstOrder, finished, first_order
from ..common.operators import launches
from . import tokens_torch


def _fake_restore_grads(grad, ids, visible, need_visible, need_token, need_pos):
    B, L, D = grad.shape
    return (
        grad.new_empty(B, visible, D) if need_visible else grad.new_empty(0),
        grad.new_empty(D if need_token else 0, dtype=torch.float32),
        grad.new_empty((L, D) if need_pos else (0,), dtype=torch.float32),
    )


fused = launches(
    f"{__package__}.tokens_triton",
    tokens_torch,
    gather=lambda source, ids: source.new_empty(*ids.shape, source.shape[2]),
    restore=lambda visible, ids, *rest: visible.new_empty(*ids.shape, visible.shape[2]),
    pack=lambda tokens, ids, owners: tokens.new_empty(*ids.shape, tokens.shape[2]),
    restore_grads=_fake_restore_grads,
    scatter=lambda x, ids, length: x.new_empty(x.shape[0], length, x.shape[2]),
    scatter_table=lambda x, ids, length: x.new_empty(length, x.shape[2], dtype=torch.float32),
    unpack=lambda x, ids, owners, *sizes: x.new_empty(*sizes, x.shape[1]),
)
backends: dict[str, Any] = {"torch": tokens_torch, "triton": fused}


class Restore(FirstOrder):
    @staticmethod
    def forward(ctx: Any, visible, ids, token, pos, impl):
        ctx.save_for_backward(ids)
        ctx.visible, ctx.impl = visible.shape[1], impl
        ctx.dtypes = token.dtype, None if pos is None else pos.dtype
        return finished(backends[impl].restore(visible, ids, token, pos))

    @staticmethod
    @first_order
    def backward(ctx: Any, grad):
        need_visible, _, *needs = ctx.needs_input_grad[:4]
        grads = backends[ctx.impl].restore_grads
        visible, *sums = grads(grad, *ctx.saved_tensors, ctx.visible, need_visible, *needs)
        sums = (s.to(t) if n else None for s, t, n in zip(sums, ctx.dtypes, needs, strict=True))
        return visible if need_visible else None, None, *sums, None


class Gather(FirstOrder):
    """Of tokens (B, L, D), or (1, L, D) for all."""

    @staticmethod
    def forward(ctx: Any, tokens, ids, impl):
        ctx.save_for_backward(ids)
        ctx.shape, ctx.dtype, ctx.impl = tokens.shape, tokens.dtype, impl
        return backends[impl].gather(tokens, ids)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad):
        (ids,), backend = ctx.saved_tensors, backends[ctx.impl]
        if ctx.shape[0] == 1 and len(ids) != 1:
            return backend.scatter_table(grad, ids, ctx.shape[1]).to(ctx.dtype)[None], None, None
        return backend.scatter(grad, ids, ctx.shape[1]), None, None


class Scatter(FirstOrder):
    @staticmethod
    def forward(ctx: Any, tokens, ids, length, impl):
        ctx.save_for_backward(ids)
        ctx.impl = impl
        return finished(backends[impl].scatter(tokens, ids, length))

    @staticmethod
    @first_order
    def backward(ctx: Any, grad):
        return backends[ctx.impl].gather(grad, *ctx.saved_tensors), None, None, None


class GatherPacked(FirstOrder):
    @staticmethod
    def forward(ctx: Any, tokens, ids, owners, impl):
        ctx.save_for_backward(ids, owners)
        ctx.shape, ctx.impl = tokens.shape[:2], impl
        return backends[impl].pack(tokens, ids, owners)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad):
        return backends[ctx.impl].unpack(grad, *ctx.saved_tensors, *ctx.shape), None, None, None
