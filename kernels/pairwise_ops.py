"""The Triton log-sum-exp as operators of torch: with a fake, a gradient, and masks by key.

torch.compile keeps an operator whole in its graph, and an operator takes tensors, numbers and
strings; so a pair mask, which is a function, goes by a key that was given when it was made.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from ._dispatch import first_order
from .pairwise_fused import BWD, INTERPRETED, backward, choose, forward

_masks: dict[str, Any] = {"": None}


def enrol(name: str, mask: Any) -> str:
    """A key by which the operators find a pair mask's @triton.jit function.

    Raises ValueError when it is none.
    """
    if not isinstance(mask, triton.KernelInterface):
        raise ValueError(
            f"triton must be a @triton.jit function of (row_ids, col_ids) in mask {name!r}, "
            f"got {mask!r}"
        )
    key = name if name not in _masks else f"{name}#{len(_masks)}"
    _masks[key] = mask
    return key


def _given(row_ids: Tensor | None, col_ids: Tensor | None) -> list[Tensor]:
    return [] if row_ids is None or col_ids is None else [row_ids, col_ids]


@torch.library.custom_op("fastssl::pairwise_lse", mutates_args=())
def _lse(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    mask: str,
    same: bool,
) -> tuple[Tensor, Tensor]:
    return forward(q, k, scale, _given(row_ids, col_ids), _masks[mask])


@_lse.register_fake
def _(q, k, scale, row_ids, col_ids, mask, same):
    return scale.new_empty(q.shape[0]), scale.new_empty(2, q.shape[0])


@torch.library.custom_op("fastssl::pairwise_lse_grad", mutates_args=())
def _grad(
    pair: list[Tensor], scale: Tensor, stats: Tensor, grad: Tensor, mask: str, side: str, wide: bool
) -> Tensor:
    return backward(pair, scale, stats, grad, _masks[mask], wide, choose(BWD, pair[0], side))


@_grad.register_fake
def _(pair, scale, stats, grad, mask, side, wide):
    return pair[0].new_empty(pair[0].shape, dtype=torch.float32 if wide else pair[0].dtype)


def _save(ctx, inputs, output):
    *tensors, ctx.mask, ctx.same = inputs
    ctx.save_for_backward(*tensors, output[1])


def _side(pair, scale, stats, grad, mask: str, side: str, dot: bool):
    """The gradient of x, and x . u if asked for."""
    out = _grad(pair, scale, stats, grad, mask, side, dot)
    return ((out * scale).to(pair[0].dtype), (pair[0] * out).sum()) if dot else (out, None)


@first_order
def _backward(ctx, grad, _):
    q, k, scale, row_ids, col_ids, stats = ctx.saved_tensors
    need_q, need_k, need_scale = ctx.needs_input_grad[:3]
    ids = _given(row_ids, col_ids)
    saved, rest = (scale, stats, grad, ctx.mask), (None,) * 4
    if ctx.same:
        dq, dot = _side([q, q, *ids], *saved, "both", need_scale)
        return dq, None, None if dot is None else dot / 2, *rest  # each pair was met twice
    dq = dk = dot = None
    by_row = need_q or not need_k  # the gradient of scale is read off one side, whichever it is
    if by_row:
        dq, dot = _side([q, k, *ids], *saved, "rows", need_scale)
    if need_k:
        dk, seen = _side([k, q, *ids[::-1]], *saved, "cols", need_scale and not by_row)
        dot = dot if by_row else seen
    return dq, dk, dot, *rest


_lse.register_autograd(_backward, setup_context=_save)


def lse(q: Tensor, k: Tensor, scale: Tensor, ids: list[Tensor], mask: str, same: bool) -> Tensor:
    """Row log-sum-exp (M,) float32.

    scale: 0-d float32.  ids: of rows and columns, int64; none for the positions.
    mask: a key that `enrol` gave, or "".
    same: q is k with the same ids, and the mask symmetric.
    Raises ValueError for float64, and off CUDA unless Triton interprets its kernels.
    """
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"impl='triton' is for float32, bfloat16 and float16, got q in {q.dtype}")
    if q.device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"impl='triton' needs CUDA tensors, got q on {q.device}; "
            "TRITON_INTERPRET=1 set before the import runs it there, slowly"
        )
    row_ids, col_ids = [x.contiguous() for x in ids] or (None, None)
    return _lse(q, k, scale, row_ids, col_ids, mask, same)[0]
