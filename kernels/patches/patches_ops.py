"""Patches as operators of torch, and their gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..common.autograd import first_order
from ..common.operators import operator
from . import patches_torch
from . import patches_triton as launches
from .patches_torch import KINDS, Spec


def _fake_mse(pred, images, norm, ids, spec, eps):
    loss = pred.new_empty(ids.shape, dtype=torch.float32)
    return loss, loss.new_empty((*ids.shape, 2) if eps is not None else (0,))


class Fused:
    """`patches_torch`'s functions by Triton; images (B, C, T, H, W) in any layout."""

    gather = operator(
        "patches_gathered",
        launches.gather,
        lambda images, norm, ids, patch, dtype: images.new_empty(
            *ids.shape, images.shape[1] * math.prod(patch), dtype=dtype
        ),
    )
    spread = operator(
        "patches_spread",
        launches.spread,
        lambda grad, norm, ids, patch, shape, dtype: grad.new_empty(shape, dtype=dtype),
    )
    mse = operator("patches_mse", launches.mse, _fake_mse)
    mse_grad = operator(
        "patches_mse_grad",
        launches.mse_grad,
        lambda grad, pred, *arguments: pred.new_empty(pred.shape),
    )

    @staticmethod
    def error(
        pred: Tensor, images: Tensor, norm: Tensor | None, ids: Tensor, spec: Spec, keep: bool
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """The loss of each patch, (B, K), and what `gradient` needs."""
        loss, stats = Fused.mse(pred, images, norm, ids, _numbers(spec), spec.eps)
        return loss, (pred, images, norm, ids, stats)

    @staticmethod
    def gradient(grad: Tensor, saved: tuple[Tensor, ...], spec: Spec) -> Tensor:
        """The gradient to pred, given that of each patch's loss."""
        return Fused.mse_grad(grad, *saved, _numbers(spec))


def _numbers(spec: Spec) -> list[int]:
    return [*spec.patch, KINDS.index(spec.kind)]


backends: dict[str, Any] = {"torch": patches_torch, "triton": Fused}


class GatherPatches(torch.autograd.Function):
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


class PatchMSE(torch.autograd.Function):
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
