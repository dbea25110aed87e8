"""The primitives over tokens and their losses, beside the formula as written and that compiled.

B sequences of L tokens of D features.  Floors as in losses.py, with every elementwise operation
counted; what only moves data has bytes alone.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.bench.cases.rivals import by_implementation, nbytes, weigh
from fastssl.bench.registry import Problem, Shape, case, shapes_of
from fastssl.kernels import (
    chamfer,
    gather_bias,
    gather_packed,
    gather_tokens,
    restore_tokens,
    scaled_cosine_error,
    scatter_tokens,
)

_HIDDEN = 3 / 4
_TOKEN_SHAPES = shapes_of(
    "B L D", quick=[(8, 196, 512)], cpu=[(32, 196, 512)], cuda=[(256, 196, 512), (1024, 196, 512)]
)
_register = partial(case, test="tests/kernels/test_tokens.py", shapes=_TOKEN_SHAPES)


@_register("restore-tokens")
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
        rivals=weigh(by_implementation(restore_tokens, device)),
        flops={"fwd": 1.0 * w.numel(), "bwd": 1.0 * w.numel()},
        bytes_moved={"fwd": read + nbytes(w), "bwd": read + nbytes(w)},
        items=(B, "images"),
    )


@_register("gather-tokens")
def gathered(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """The hidden three quarters of the tokens of each sequence: read once, written once."""
    tokens, ids, w = _chosen(shape, dtype, device, _HIDDEN)
    return Problem(
        inputs=(tokens, ids, w),
        rivals=weigh(by_implementation(gather_tokens, device)),
        bytes_moved={
            "fwd": nbytes(ids) + 2.0 * nbytes(w),
            "bwd": nbytes(ids, tokens) + 1.0 * nbytes(w),
        },
        items=(shape["B"], "images"),
    )


def _chosen(
    shape: Shape, dtype: torch.dtype, device: torch.device, share: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, the ids of a share of each sequence's, and a gradient for those."""
    B, L, D = shape["B"], shape["L"], shape["D"]
    tokens = torch.randn(B, L, D, device=device).to(dtype).requires_grad_()
    ids = torch.rand(B, L, device=device).argsort(1)[:, : int(L * share)]
    return tokens, ids.contiguous(), torch.randn(*ids.shape, D, device=device).to(dtype)


@_register("gather-table")
def looked_up(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """The visible quarter's rows of a table of positions; its gradient sums over the batch."""
    _, ids, w = _chosen(shape, dtype, device, 1 - _HIDDEN)
    table = torch.randn(shape["L"], shape["D"], device=device).to(dtype).requires_grad_()
    moved = nbytes(ids, table, w)
    return Problem(
        inputs=(table, ids, w),
        rivals=weigh(by_implementation(gather_tokens, device)),
        bytes_moved={"fwd": moved, "bwd": moved},
        items=(shape["B"], "images"),
    )


@_register("scatter-tokens")
def scattered(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """The visible quarter back to its places among zeros: read once, the whole written once."""
    whole, ids, visible = _chosen(shape, dtype, device, 1 - _HIDDEN)
    w = torch.randn_like(whole)
    return Problem(
        inputs=(visible.requires_grad_(), ids, w),
        rivals=weigh(by_implementation(scatter_tokens, device, length=shape["L"])),
        bytes_moved={"fwd": nbytes(ids, visible, w), "bwd": nbytes(ids) + 2.0 * nbytes(visible)},
        items=(shape["B"], "images"),
    )


@_register("gather-packed")
def packed(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """From a quarter to all of each sequence's tokens, one sequence after another."""
    tokens, ids, _ = _chosen(shape, dtype, device, 1.0)
    B, L, D = tokens.shape
    lengths = [L // 4 + b * (L - L // 4) // B for b in range(B)]
    some = torch.cat([row[:n] for row, n in zip(ids, lengths, strict=True)])
    ends = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
    w = torch.randn(len(some), D, device=device).to(dtype)
    return Problem(
        inputs=(tokens, some, ends, w),
        rivals=weigh(by_implementation(gather_packed, device)),
        bytes_moved={
            "fwd": nbytes(some, ends) + 2.0 * nbytes(w),
            "bwd": nbytes(some, ends, tokens, w),
        },
        items=(B, "images"),
    )


_BIAS_SHAPES = shapes_of(
    "B L H", quick=[(8, 196, 6)], cpu=[(32, 196, 12)], cuda=[(256, 196, 12), (64, 784, 12)]
)


@case("gather-bias", test="tests/kernels/test_bias.py", shapes=_BIAS_SHAPES)
def biases(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """The attention bias of the visible quarter's pairs."""
    B, L, H = shape["B"], shape["L"], shape["H"]
    bias = torch.randn(H, L, L, device=device).to(dtype).requires_grad_()
    ids = torch.rand(B, L, device=device).argsort(1)[:, : L // 4].contiguous()
    w = torch.randn(B, H, L // 4, L // 4, device=device).to(dtype)
    moved = nbytes(bias, ids, w)
    return Problem(
        inputs=(bias, ids, w),
        rivals=weigh(by_implementation(gather_bias, device)),
        bytes_moved={"fwd": moved, "bwd": moved},
        items=(B, "images"),
    )


@case("scaled-cosine", test="tests/kernels/test_scaled_cosine.py", shapes=_TOKEN_SHAPES)
def cosines(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """The scaled cosine error of the hidden three quarters' latents; the target has no gradient.

    6 flops an element forward, for three dots; 6 backward.
    """
    pred, ids, _ = _chosen(shape, dtype, device, _HIDDEN)
    target = (pred + torch.randn_like(pred)).detach()
    chosen = ids.numel() * pred.shape[2]
    read = 2 * chosen * pred.element_size() + nbytes(ids) + 4 * ids.numel()
    rivals = by_implementation(scaled_cosine_error, device)
    rivals["torch cosine_similarity"] = _cosine_similarity
    return Problem(
        inputs=(pred, target, ids),
        rivals=rivals,
        flops={"fwd": 6.0 * chosen, "bwd": 6.0 * chosen},
        bytes_moved={"fwd": read, "bwd": read + nbytes(pred)},
        items=(shape["B"], "images"),
    )


def _cosine_similarity(pred: Tensor, target: Tensor, ids: Tensor) -> Tensor:
    pred, target = (gather_tokens(x, ids, impl="reference") for x in (pred, target))
    return (1 - F.cosine_similarity(pred, target, dim=-1)).square()


@case(
    "chamfer",
    test="tests/kernels/test_chamfer.py",
    shapes=shapes_of(
        "G N",
        quick=[(64, 32), (2, 512)],
        cpu=[(1024, 32), (8, 1024)],
        cuda=[(4992, 32), (64, 2048), (8, 16384)],
    ),
    gate_shape={"G": 9, "N": 130},
    dtypes=("float32",),
)
def clouds(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """Chamfer distance of G pairs of clouds of N points in space: squares, both ways.

    Forward 9 flops a pair, one distance serving both ways; backward 6 a coordinate of each point.
    """
    G, N = shape["G"], shape["N"]
    pred, target = (torch.randn(G, N, 3, device=device).to(dtype) for _ in range(2))
    rivals = by_implementation(chamfer, device)
    rivals["torch cdist"] = _cdist
    return Problem(
        inputs=(pred.requires_grad_(), target),
        rivals=rivals,
        flops={"fwd": 9.0 * G * N * N, "bwd": 12.0 * pred.numel()},
        bytes_moved={"fwd": nbytes(pred, target) + 4 * G, "bwd": 1.0 * nbytes(pred, target, pred)},
        items=(G, "clouds"),
    )


def _cdist(pred: Tensor, target: Tensor) -> Tensor:
    far = torch.cdist(pred, target, compute_mode="donot_use_mm_for_euclid_dist")
    return sum(far.min(axis).values.square().mean(1) for axis in (1, 2))  # type: ignore[return-value]
