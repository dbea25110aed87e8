"""The primitives over patches and tokens, beside the formula as written and that compiled.

B images of S pixels a side in patches of P; L tokens of D features.  Floors as in losses.py, with
every elementwise operation counted; what only moves data has bytes alone.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastssl.bench.registry import Problem, Shape, case
from fastssl.bench.rivals import beside, by_implementation, nbytes, weighed
from fastssl.kernels import gather_patches, gather_tokens, patch_mse, restore_tokens

_HIDDEN = 3 / 4
_IMAGE_SHAPES = {
    "quick": [{"B": 8, "S": 224, "P": 16}],
    "cpu": [{"B": 32, "S": 224, "P": 16}, {"B": 128, "S": 32, "P": 4}],
    "cuda": [{"B": 256, "S": 224, "P": 16}, {"B": 1024, "S": 224, "P": 16}],
}


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
        rivals=by_implementation("gather_patches", partial(_patches, P), device),
        bytes_moved={"run": 2.0 * chosen + nbytes(ids)},
        items=(B, "images"),
    )


def _patches(patch: int, impl: str, images: Tensor, ids: Tensor) -> Tensor:
    return gather_patches(images, ids, patch, impl=impl)


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
        rivals=by_implementation("patch_mse", partial(_patch_mse, P), device),
        flops={"fwd": 8.0 * pred.numel(), "bwd": 2.0 * pred.numel()},
        bytes_moved={"fwd": read + errors, "bwd": read + errors + nbytes(pred)},
        items=(B, "images"),
    )


def _patch_mse(patch: int, impl: str, pred: Tensor, images: Tensor, ids: Tensor) -> Tensor:
    return patch_mse(pred, images, ids, patch, impl=impl)


_TOKEN_SHAPES = {
    "quick": [{"B": 8, "L": 196, "D": 512}],
    "cpu": [{"B": 32, "L": 196, "D": 512}],
    "cuda": [{"B": 256, "L": 196, "D": 512}, {"B": 1024, "L": 196, "D": 512}],
}


@case("restore-tokens", test="tests/kernels/test_tokens.py", shapes=_TOKEN_SHAPES)
def restored(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """A whole sequence from its visible quarter and the mask token, positions added.

    1 flop an element each way: the positions' addition, and the sums of their gradients.
    """
    B, L, D = shape["B"], shape["L"], shape["D"]
    order = torch.rand(B, L, device=device).argsort(1)
    visible = torch.randn(B, int(L * (1 - _HIDDEN)), D, device=device).to(dtype).requires_grad_()
    token, pos = (
        torch.randn(*size, device=device).to(dtype).requires_grad_() for size in ((D,), (L, D))
    )
    w = torch.randn(B, L, D, device=device).to(dtype)
    read = nbytes(visible, order, token, pos)
    return Problem(
        inputs=(visible, order, token, pos, w),
        rivals=weighed(by_implementation("restore_tokens", _restore, device)),
        flops={"fwd": 1.0 * w.numel(), "bwd": 1.0 * w.numel()},
        bytes_moved={"fwd": read + nbytes(w), "bwd": read + nbytes(w)},
        items=(B, "images"),
    )


def _restore(impl: str, visible: Tensor, order: Tensor, token: Tensor, pos: Tensor) -> Tensor:
    return restore_tokens(visible, order, token, pos, impl=impl)


@case("gather-tokens", test="tests/kernels/test_tokens.py", shapes=_TOKEN_SHAPES)
def gathered(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """The hidden three quarters of the tokens of each sequence: read once, written once."""
    B, L, D = shape["B"], shape["L"], shape["D"]
    tokens = torch.randn(B, L, D, device=device).to(dtype).requires_grad_()
    ids = torch.rand(B, L, device=device).argsort(1)[:, : int(L * _HIDDEN)]
    w = torch.randn(*ids.shape, D, device=device).to(dtype)
    return Problem(
        inputs=(tokens, ids, w),
        rivals=weighed(beside(gather_tokens, _gather_reference)),
        bytes_moved={
            "fwd": nbytes(ids) + 2.0 * nbytes(w),
            "bwd": nbytes(ids, tokens) + 1.0 * nbytes(w),
        },
        items=(B, "images"),
    )


def _gather_reference(tokens: Tensor, ids: Tensor) -> Tensor:
    return tokens[torch.arange(len(ids), device=ids.device)[:, None], ids]
