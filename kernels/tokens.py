"""Tokens in and out of a masked sequence.

    restore_tokens_bl = pos_l + (visible_b,r  if r = ids_restore_bl < K,  else mask_token)
    gather_tokens_bk = tokens_b,ids_bk

B sequences of L places, K of them visible, D features.  ids_restore is the inverse of the order
(visible, masked): place l takes token ids_restore_bl of that joined sequence.
Why: eager joins visible and L - K copies of the mask token to a (B, L, D) tensor, gathers from it
into a second and adds the positions into a third.  Here the result is written once and visible
tokens are scattered into it; backward gathers theirs, each being there exactly once, and sums the
rest for the mask token in float32, without atomics: deterministic.
Traffic: K / L of a read, one write; backward one read, K / L of a write.  Memory-bound.
Memory: the result.  In place: nothing.
Source: He et al. 2021, MAE, arXiv:2111.06377, section 3 "Simple implementation".
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._chunks import row_spans
from ._dispatch import accumulator, declare, finished, first_order, require_float


def restore_tokens_reference(visible, ids_restore, mask_token, pos):
    """The formula, eager, in visible's dtype: join, gather, add."""
    B, K, D = visible.shape
    L = ids_restore.shape[1]
    masks = mask_token.to(visible.dtype).expand(B, L - K, D)
    out = torch.cat([visible, masks], 1).gather(1, _wide(ids_restore, D))
    return out if pos is None else out + pos.to(visible.dtype)


def _wide(ids: Tensor, features: int) -> Tensor:
    return ids[..., None].expand(*ids.shape, features)


class _RestoreTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, visible, ids_restore, mask_token, pos):
        B, K, D = visible.shape
        token = mask_token.to(visible.dtype)
        places = ids_restore.argsort(1)[:, :K]  # where each visible token stands
        shown, hidden = visible, token.expand(*ids_restore.shape, D)
        if pos is not None:
            added = pos.to(visible.dtype)
            shown, hidden = visible + added[places], (token + added).expand(B, -1, -1)
        out = hidden.clone(memory_format=torch.contiguous_format)  # else, at one place, mask_token
        out.scatter_(1, _wide(places, D), shown)
        ctx.save_for_backward(places, ids_restore)
        ctx.dtypes = mask_token.dtype, None if pos is None else pos.dtype
        return finished(out)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad):
        places, ids_restore = ctx.saved_tensors
        K, (L, D) = places.shape[1], grad.shape[1:]
        need_visible, _, need_token, need_pos = ctx.needs_input_grad
        acc = accumulator(grad.dtype)
        d_visible = grad.gather(1, _wide(places, D)) if need_visible else None
        d_token = grad.new_zeros(D, dtype=acc) if need_token else None
        d_pos = grad.new_zeros(L, D, dtype=acc) if need_pos else None
        for i in row_spans(grad, L * D):
            part = grad[i].to(acc)
            if d_token is not None:
                hidden = (ids_restore[i] >= K).to(acc)
                d_token += (hidden[:, None] @ part).sum((0, 1))  # a sum of sums rounds less
            if d_pos is not None:
                d_pos += part.sum(0)
        token_dtype, pos_dtype = ctx.dtypes
        d_token = None if d_token is None else d_token.to(token_dtype)
        return d_visible, None, d_token, None if d_pos is None else d_pos.to(pos_dtype)


_RESTORE = declare("restore_tokens", torch=_RestoreTokens.apply, reference=restore_tokens_reference)


def restore_tokens(
    visible: Tensor,
    ids_restore: Tensor,
    mask_token: Tensor,
    pos: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """The whole sequence for a decoder, hidden places holding the mask token: (B, L, D).

    visible (B, K, D), mask_token (D,), pos (L, D) or None: float; the result has visible's dtype.
    ids_restore (B, L) int64, K <= L: each row a permutation (unchecked: looking would wait for the
    device).  Gradients to visible, mask_token and pos, the sums in float32; first order only.
    impl: "auto", "torch" or "reference" (joins and gathers).
    Raises ValueError for shapes or dtypes that disagree and an unknown impl.

    >>> token = torch.tensor([0.0])
    >>> restore_tokens(torch.tensor([[[5.0]]]), torch.tensor([[1, 0]]), token).flatten().tolist()
    [0.0, 5.0]
    """
    require_float(visible=visible, mask_token=mask_token)
    if visible.ndim != 3 or mask_token.shape != visible.shape[2:]:
        got = f"{tuple(visible.shape)} and {tuple(mask_token.shape)}"
        raise ValueError(f"visible and mask_token must be (B, K, D) and (D,), got {got}")
    B, K, D = visible.shape
    if ids_restore.ndim != 2 or len(ids_restore) != B or ids_restore.shape[1] < K:
        got = tuple(ids_restore.shape)
        raise ValueError(f"ids_restore must be ({B}, L) with L >= {K}, got {got}")
    if ids_restore.dtype != torch.int64:
        raise ValueError(f"ids_restore must be int64, got {ids_restore.dtype}")
    if pos is not None:
        require_float(pos=pos)
        if pos.shape != (ids_restore.shape[1], D):
            want = (ids_restore.shape[1], D)
            raise ValueError(f"pos must be {want}, got {tuple(pos.shape)}")
    return _RESTORE(impl, visible.device, visible, ids_restore, mask_token, pos)


def gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """The chosen tokens: (B, K, D), in tokens' dtype, differentiable.

    tokens (B, L, D), or (L, D) shared by all sequences; ids (B, K) int64 in 0..L-1.
    Raises ValueError for shapes or dtypes that disagree.

    >>> gather_tokens(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[2, 0]])).tolist()
    [[[3.0], [1.0]]]
    """
    if ids.ndim != 2 or ids.dtype != torch.int64:
        raise ValueError(f"ids must be (B, K) int64, got {tuple(ids.shape)} {ids.dtype}")
    if tokens.ndim == 2:
        return F.embedding(ids, tokens)
    if tokens.ndim != 3 or len(tokens) != len(ids):
        got = tuple(tokens.shape)
        raise ValueError(f"tokens must be ({len(ids)}, L, D) or (L, D), got {got}")
    return tokens.gather(1, _wide(ids, tokens.shape[2]))
