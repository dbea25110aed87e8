"""Patches, and the two stages of masked modeling they are for, beside the formula as written.

B images of S pixels a side in patches of P; tokens of D features.  Floors as in losses.py, with
every elementwise operation counted; what only moves data has bytes alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.bench.cases.rivals import beside, by_implementation, library, nbytes, weigh
from fastssl.bench.measure.gate import SLACK_OTHERS, SLACK_OURS, step, why_wrong
from fastssl.bench.registry import OURS, REFERENCE, Problem, Shape, case, shapes_of
from fastssl.kernels import gather_patches, patch_mse
from fastssl.losses import MAELoss

_HIDDEN = 3 / 4
_IMAGE_SHAPES = shapes_of(
    "B S P",
    quick=[(8, 224, 16)],
    cpu=[(32, 224, 16), (128, 32, 4)],
    cuda=[(256, 224, 16), (1024, 224, 16)],
)


def _chosen(shape: Shape, share: float, device: torch.device) -> Tensor:
    """A share of each image's patches, by place: (B, K) int64."""
    length = (shape["S"] // shape["P"]) ** 2
    return torch.rand(shape["B"], length, device=device).argsort(1)[:, : int(share * length)]


@case("gather-patches", test="tests/kernels/test_patches.py", shapes=_IMAGE_SHAPES)
def patches(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """The visible quarter of the patches, straight from pixels: read once, written once."""
    B, S, P = shape["B"], shape["S"], shape["P"]
    images = torch.rand(B, 3, S, S, device=device).to(dtype)
    ids = _chosen(shape, 1 - _HIDDEN, device)
    chosen = ids.numel() * 3 * P * P * images.element_size()
    return Problem(
        inputs=(images, ids),
        rivals=by_implementation(gather_patches, device, patch=P),
        bytes_moved={"run": 2.0 * chosen + nbytes(ids)},
        items=(B, "images"),
    )


@case("patch-mse", test="tests/kernels/test_patches.py", shapes=_IMAGE_SHAPES)
def patch_error(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """Mean squared error of each hidden patch's prediction; flops and bytes as in `mae`."""
    B, S, P = shape["B"], shape["S"], shape["P"]
    images = torch.rand(B, 3, S, S, device=device).to(dtype)
    ids = _chosen(shape, _HIDDEN, device)
    pred = torch.randn(*ids.shape, 3 * P * P, device=device).to(dtype).requires_grad_()
    read, errors = 2 * nbytes(pred) + nbytes(ids), 4 * ids.numel()
    return Problem(
        inputs=(pred, images, ids),
        rivals=by_implementation(patch_mse, device, patch=P),
        flops={"fwd": 8.0 * pred.numel(), "bwd": 2.0 * pred.numel()},
        bytes_moved={"fwd": read + errors, "bwd": read + errors + nbytes(pred)},
        items=(B, "images"),
    )


_STAGE_SHAPES = {**_IMAGE_SHAPES, **shapes_of("B S P", cpu=[(64, 224, 16), (128, 32, 4)])}
_WIDTHS = {224: 768, 32: 192}  # of the transformers usual at that size


@case(
    "visible-tokens",
    test="tests/models/test_masked_vit.py",
    shapes={
        size: [{**s, "D": _WIDTHS[s["S"]]} for s in shapes]
        for size, shapes in _STAGE_SHAPES.items()
    },
)
def embedded(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """From images to the embedded visible quarter: gathered before a matrix product, or after.

    2 D flops a visible value each way; the weight's gradient alone, images have none.
    """
    B, S, P, D = (shape[letter] for letter in "BSPD")
    images = torch.rand(B, 3, S, S, device=device).to(dtype)
    ids = _chosen(shape, 1 - _HIDDEN, device)
    values = 3 * P * P
    weight = torch.randn(D, 3, P, P, device=device) / values**0.5
    bias = torch.randn(D, device=device)
    weight, bias = (x.to(dtype).requires_grad_() for x in (weight, bias))
    w = torch.randn(*ids.shape, D, device=device).to(dtype)
    rivals = beside(partial(_embed, P), partial(_embed_all, P))
    rivals["timm"] = library("timm.layers", lambda m: partial(_embed_timm, m, P))
    rivals["lightly"] = library("lightly.models.utils", lambda m: partial(_embed_lightly, m, P))
    product = 2.0 * ids.numel() * values * D
    moved = ids.numel() * values * images.element_size() + nbytes(ids, weight, bias, w)
    return Problem(
        inputs=(images, ids, weight, bias, w),
        rivals=weigh(rivals),
        flops={"fwd": product, "bwd": product},
        bytes_moved={"fwd": moved, "bwd": moved},
        items=(B, "images"),
    )


def _embed(patch: int, images: Tensor, ids: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As fastssl.models.MaskedViT does."""
    return F.linear(gather_patches(images, ids, patch), weight.movedim(1, -1).flatten(1), bias)


def _embed_all(patch: int, images: Tensor, ids: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Every patch by a convolution, then the visible ones: facebookresearch/mae and timm."""
    tokens = F.conv2d(images, weight, bias, stride=patch).flatten(2).transpose(1, 2)
    return tokens.gather(1, ids[..., None].expand(-1, -1, tokens.shape[2]))


def _embed_timm(layers, patch: int, images: Tensor, ids: Tensor, *own: Tensor) -> Tensor:
    D, C = own[0].shape[:2]
    with torch.device("meta"):
        module = layers.PatchEmbed(images.shape[-1], patch, C, D)
    weights: dict[str, Tensor] = {"proj.weight": own[0], "proj.bias": own[1]}
    tokens = torch.func.functional_call(module, weights, images)
    return tokens.gather(1, ids[..., None].expand(-1, -1, D))


def _embed_lightly(utils, patch: int, images: Tensor, ids: Tensor, *own: Tensor) -> Tensor:
    tokens = F.conv2d(images, *own, stride=patch).flatten(2).transpose(1, 2)
    return utils.get_at_index(tokens, ids)


@case("prediction-loss", test="tests/losses/test_reconstruction.py", shapes=_STAGE_SHAPES)
def predicted(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """From predictions to MAE's loss: of the hidden patches alone, or of all, as published.

    Each rival gets the predictions of every patch and, as tensors of their own, those of the
    hidden ones; it takes one of the two.  Flops and bytes as in `mae`.
    """
    B, S, P = shape["B"], shape["S"], shape["P"]
    images = torch.rand(B, 3, S, S, device=device).to(dtype)
    ids = _chosen(shape, _HIDDEN, device)
    every = torch.randn(B, (S // P) ** 2, 3 * P * P, device=device).to(dtype)
    mask = torch.zeros(every.shape[:2], device=device, dtype=dtype).scatter_(1, ids, 1.0)
    hidden = every.gather(1, ids[..., None].expand(-1, -1, every.shape[2]))
    inputs = every.requires_grad_(), hidden.requires_grad_(), images, ids, mask
    rivals = beside(partial(_loss_of_hidden, P), partial(_loss_of_all, P))
    rivals["lightly"] = library("lightly.models.utils", lambda m: partial(_loss_lightly, m, P))
    read = 2 * nbytes(hidden) + nbytes(ids)
    return Problem(
        inputs=inputs,
        rivals=rivals,
        flops={"fwd": 8.0 * hidden.numel(), "bwd": 2.0 * hidden.numel()},
        bytes_moved={"fwd": read + 4, "bwd": read + nbytes(hidden)},
        items=(B, "images"),
        check=partial(_loss_is_wrong, P, inputs),
    )


class _Unused(torch.autograd.Function):
    """The loss, with a gradient of zero to what it does not depend on; takes no time."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, other: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = other.shape, other.dtype
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], grads[0].new_zeros((), dtype=ctx.dtype).expand(ctx.shape)


def _loss_of_hidden(patch, every, hidden, images, ids, mask) -> Tensor:
    return _Unused.apply(MAELoss(patch)(hidden, images, ids), every)  # type: ignore[return-value]


def _loss_of_all(patch, every, hidden, images, ids, mask) -> Tensor:
    """As facebookresearch/mae has it: a mask weighs the error of every patch."""
    B, C, S, _ = images.shape
    grid = S // patch
    target = images.reshape(B, C, grid, patch, grid, patch)
    target = torch.einsum("nchpwq->nhwpqc", target).reshape(every.shape)
    mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
    target = (target - mean) / (var + 1e-6) ** 0.5
    error = ((every - target) ** 2).mean(-1)
    return _Unused.apply((error * mask).sum() / mask.sum(), hidden)  # type: ignore[return-value]


def _loss_lightly(utils, patch, every, hidden, images, ids, mask) -> Tensor:
    target = utils.normalize_mean_var(utils.get_at_index(utils.patchify(images, patch), ids))
    return _Unused.apply(F.mse_loss(hidden, target), every)  # type: ignore[return-value]


def _loss_is_wrong(patch: int, inputs: tuple[Tensor, ...], name: str, made: Any) -> str:
    """The gate's own judgement, of the value and of the gradient to the hidden predictions."""
    rival = partial(_loss_of_all, patch)
    wide = [x.detach().double() if x.is_floating_point() else x for x in inputs]
    wide = [x.requires_grad_(y.requires_grad) for x, y in zip(wide, inputs, strict=True)]
    ids, whole = inputs[3], name in (REFERENCE, "compile")
    at = ids[..., None].expand(inputs[1].shape)
    truth, eager = ((v, d.gather(1, at)) for v, d, _ in (step(rival, x) for x in (wide, inputs)))
    mine = made[0], made[1].gather(1, at) if whole else made[2]
    return why_wrong(mine, eager, truth, slack=SLACK_OURS if name == OURS else SLACK_OTHERS)
