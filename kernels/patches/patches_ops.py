"""Patches as operators of torch, and their gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.autograd import FirstOrder, first_order
from ..common.operators import launches
from . import patches_torch
from .patches_torch import KINDS, Spec


def _fake_gather(images, norm, ids, patch, dtype):
    return images.new_empty(*ids.shape, images.shape[1] * math.prod(patch), dtype=dtype)


def _fake_mse(
    pred: Tensor, images: Tensor, norm: Tensor | None, ids: Tensor, spec: Sequence[int],
    eps: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    loss = pred.new_empty(ids.shape, dtype=torch.float32)
    return loss, loss.new_empty((*ids.shape, 2) if eps is not None else (0,))


def _fake_mse_grad(
    grad: Tensor, pred: Tensor, images: Tensor, norm: Tensor | None, ids: Tensor, stats: Tensor,
    spec: Sequence[int],
) -> Tensor:  # fmt: skip
    return pred.new_empty(pred.shape)


fused = launches(
    f"{__package__}.patches_triton",
    patches_torch,
    gather=_fake_gather,
    spread=lambda grad, norm, ids, patch, shape, dtype: grad.new_empty(shape, dtype=dtype),
    mse=_fake_mse,
    mse_grad=_fake_mse_grad,
)


def _error(
    pred: Tensor, images: Tensor, norm: Tensor | None, ids: Tensor, spec: Spec, keep: bool
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The loss of each patch, (B, K), and what `gradient` needs."""
    loss, stats = fused.mse(pred, images, norm, ids, _numbers(spec), spec.eps)
    return loss, (pred, images, norm, ids, stats)


def _gradient(grad: Tensor, saved: tuple[Tensor, ...], spec: Spec) -> Tensor:
    """The gradient to pred, given that of each patch's loss."""
    return fused.mse_grad(grad, *saved, _numbers(spec))


def _numbers(spec: Spec) -> list[int]:
    return [*spec.patch, KINDS.index(spec.kind)]


fused.error, fused.gradient = _error, _gradient
backends: dict[str, Any] = {"torch": patches_torch, "triton": fused}


class GatherPatches(FirstOrder):
    @staticmethod
    def forward(ctx: Any, images, norm, ids, patch, dtype, impl):
        ctx.save_for_backward(ids, norm)
        ctx.like = images.shape, images.dtype
        ctx.patch, ctx.impl = patch, impl
        return backends[impl].gather(images, norm, ids, patch, dtype)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad):
        ids, norm = ctx.saved_tensors
        d_images = backends[ctx.impl].spread(grad, norm, ids, ctx.patch, *ctx.like)
        return d_images, None, None, None, None, None


class PatchMSE(FirstOrder):
    @staticmethod
    def forward(ctx: Any, pred, images, norm, ids, spec, impl):
        loss, saved = backends[impl].error(pred, images, norm, ids, spec, True)
        ctx.save_for_backward(*saved)
        ctx.spec, ctx.impl = spec, impl
        return loss

    @staticmethod
    @first_order
    def backward(ctx: Any, grad):
        d_pred = backends[ctx.impl].gradient(grad, ctx.saved_tensors, ctx.spec)
        return d_pred, None, None, None, None, None
