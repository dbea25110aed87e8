"""Tokens in and out of a masked sequence.

    restore_tokens_bl = pos_l + (visible_b,r  if r = ids_restore_bl < K,  else mask_token)
    gather_tokens_bk = tokens_b,ids_bk
    scatter_tokens_bl = sum of the tokens_bk with ids_bk = l
    gather_packed_t = tokens_b,ids_t  for cu_b <= t < cu_(b + 1)

B sequences of L places, K of them visible, D features; T rows of all sequences, packed.
ids_restore is the inverse of the order (visible, masked): place l takes token ids_restore_bl of
that joined sequence.  Gathering and scattering are each other's gradients.
Why: eager joins visible and L - K copies of the mask token to a (B, L, D) tensor, gathers from it
into a second and adds the positions into a third.  Here the result is written once; backward
gathers the visible tokens' gradients, each being there exactly once, and sums the rest for the mask
token and the positions in float32.  No atomics in Triton, none on a CPU: the same bits each run.
Traffic: K / L of a read, one write; backward one read, K / L of a write.  Memory-bound.
Memory: the result.  In place: nothing.
Source: He et al. 2021, MAE, arXiv:2111.06377, section 3 "Simple implementation".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.checks import check_ids, looks_at
from ..common.dispatch import declare, finished, first_order, require_float
from ..correlation.moments import by_engine, implementation
from ..pairwise.masks import twins
from . import tokens_torch
from .tokens_torch import wide

engines: dict[str, Any] = {"torch": tokens_torch}
if twins is not None:
    from . import tokens_ops

    engines["triton"] = tokens_ops


def restore_tokens_reference(visible, ids_restore, mask_token, pos):
    """The formula, eager, in visible's dtype: join, gather, add."""
    B, K, D = visible.shape
    L = ids_restore.shape[1]
    masks = mask_token.to(visible.dtype).expand(B, L - K, D)
    out = torch.cat([visible, masks], 1).gather(1, wide(ids_restore, D))
    return out if pos is None else out + pos.to(visible.dtype)


def gather_tokens_reference(tokens, ids):
    """The formula, eager: an index for each sequence."""
    if tokens.ndim == 2:
        return tokens[ids]
    return tokens[torch.arange(len(ids), device=ids.device)[:, None], ids]


def scatter_tokens_reference(tokens, ids, length):
    """The formula, eager: a one-hot matrix of places, and a product with it."""
    return (ids[..., None] == torch.arange(length, device=ids.device)).to(tokens).mT @ tokens


def gather_packed_reference(tokens, ids, owners):
    """The formula, eager: an index for each row."""
    return tokens[owners.long(), ids]


class _Restore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, visible, ids, token, pos, impl):
        ctx.save_for_backward(ids)
        ctx.visible, ctx.impl = visible.shape[1], impl
        ctx.dtypes = token.dtype, None if pos is None else pos.dtype
        return finished(engines[impl].restored(visible, ids, token, pos))

    @staticmethod
    @first_order
    def backward(ctx: Any, grad):
        need_visible, _, *needs = ctx.needs_input_grad[:4]
        unrestored = engines[ctx.impl].unrestored
        visible, *sums = unrestored(grad, *ctx.saved_tensors, ctx.visible, need_visible, *needs)
        sums = (s.to(t) if n else None for s, t, n in zip(sums, ctx.dtypes, needs, strict=True))
        return visible if need_visible else None, None, *sums, None


class _Gather(torch.autograd.Function):
    """Of tokens (B, L, D), or (1, L, D) for all."""

    @staticmethod
    def forward(ctx: Any, tokens, ids, impl):
        ctx.save_for_backward(ids)
        ctx.shape, ctx.dtype, ctx.impl = tokens.shape, tokens.dtype, impl
        return engines[impl].gathered(tokens, ids)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad):
        (ids,), engine = ctx.saved_tensors, engines[ctx.impl]
        if ctx.shape[0] == 1 and len(ids) != 1:
            return engine.tabled(grad, ids, ctx.shape[1]).to(ctx.dtype)[None], None, None
        return engine.scattered(grad, ids, ctx.shape[1]), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens, ids, length, impl):
        ctx.save_for_backward(ids)
        ctx.impl = impl
        return finished(engines[impl].scattered(tokens, ids, length))

    @staticmethod
    @first_order
    def backward(ctx: Any, grad):
        return engines[ctx.impl].gathered(grad, *ctx.saved_tensors), None, None, None


class _GatherPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens, ids, owners, impl):
        ctx.save_for_backward(ids, owners)
        ctx.shape, ctx.impl = tokens.shape[:2], impl
        return engines[impl].packed(tokens, ids, owners)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad):
        return engines[ctx.impl].unpacked(grad, *ctx.saved_tensors, *ctx.shape), None, None, None


def _gather(tokens, ids, impl):
    whole = tokens[None] if tokens.ndim == 2 else tokens
    return _Gather.apply(whole, ids, impl)


_RESTORE = declare("restore_tokens", **by_engine(_Restore.apply, restore_tokens_reference))
_GATHER = declare("gather_tokens", **by_engine(_gather, gather_tokens_reference))
_SCATTER = declare("scatter_tokens", **by_engine(_Scatter.apply, scatter_tokens_reference))
_PACKED = declare("gather_packed", **by_engine(_GatherPacked.apply, gather_packed_reference))


def _check_list(ids: Tensor, like: Tensor, packed: bool = False) -> None:
    """Refuse ids that are not int64, of their shape, on the device of the tokens."""
    shape = "(T,)" if packed else "(B, K)"
    if ids.ndim != 2 - packed or ids.dtype != torch.int64:
        raise ValueError(f"ids must be {shape} int64, got {tuple(ids.shape)} {ids.dtype}")
    if ids.device != like.device:
        raise ValueError(f"ids must be on {like.device} with the tokens, got {ids.device}")


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
    ids_restore (B, L) int64, K <= L: each row a permutation of 0..L-1.
    Gradients to visible, mask_token and pos, the sums in float32; first order only.
    impl: "auto", "triton", "torch" or "reference" (joins and gathers).
    Raises ValueError for shapes or dtypes that disagree, a row that is no permutation (looked at on
    a CPU, elsewhere with FASTSSL_CHECK=1) and an unknown impl.

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
    check_ids(ids_restore, ids_restore.shape[1], "ids_restore")
    impl = implementation(impl, "visible", visible)
    return _RESTORE(impl, visible.device, visible, ids_restore, mask_token, pos)


def gather_tokens(tokens: Tensor, ids: Tensor, *, impl: str = "auto") -> Tensor:
    """The chosen tokens: (B, K, D), in tokens' dtype.

    tokens (B, L, D), or (L, D) shared by all sequences: any dtype; one that is not a float is for
    torch.  ids (B, K) int64 in 0..L-1, repeats allowed: their gradients add up in float32, those of
    a shared table over the batch; first order only.
    impl: "auto", "triton", "torch" or "reference".
    Raises ValueError for shapes or dtypes that disagree, an id out of range (looked at on a CPU,
    elsewhere with FASTSSL_CHECK=1) and an unknown impl.

    >>> gather_tokens(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[2, 0]])).tolist()
    [[[3.0], [1.0]]]
    """
    _check_list(ids, tokens)
    if tokens.ndim != 2 and (tokens.ndim != 3 or len(tokens) != len(ids)):
        got = tuple(tokens.shape)
        raise ValueError(f"tokens must be ({len(ids)}, L, D) or (L, D), got {got}")
    check_ids(ids, tokens.shape[-2], repeats=True)
    impl = implementation(impl, "tokens", tokens)
    if impl == "auto" and not tokens.is_floating_point():
        impl = "torch"
    return _GATHER(impl, tokens.device, tokens, ids)


def scatter_tokens(tokens: Tensor, ids: Tensor, length: int, *, impl: str = "auto") -> Tensor:
    """Tokens put back to their places, zeros elsewhere: (B, length, D), in tokens' dtype.

    tokens (B, K, D) float; ids (B, K) int64 in 0..length-1; where they repeat, tokens add up in
    float32.  The gradient is a gather; first order only.
    impl: "auto", "triton", "torch" or "reference" (a product with a one-hot matrix).
    Raises ValueError for shapes or dtypes that disagree, an id out of range (looked at on a CPU,
    elsewhere with FASTSSL_CHECK=1) and an unknown impl.

    >>> scatter_tokens(torch.tensor([[[5.0], [7.0]]]), torch.tensor([[2, 0]]), 3).flatten().tolist()
    [7.0, 0.0, 5.0]
    """
    require_float(tokens=tokens)
    _check_list(ids, tokens)
    if tokens.ndim != 3 or tokens.shape[:2] != ids.shape:
        want, got = f"({len(ids)}, {ids.shape[1]}, D)", tuple(tokens.shape)
        raise ValueError(f"tokens must be {want} as ids, got {got}")
    check_ids(ids, length, repeats=True)
    return _SCATTER(implementation(impl, "tokens", tokens), tokens.device, tokens, ids, length)


def gather_packed(tokens: Tensor, ids: Tensor, cu_seqlens: Tensor, *, impl: str = "auto") -> Tensor:
    """The chosen tokens of all sequences, one sequence after another: (T, D), in tokens' dtype.

    tokens (B, L, D) float; ids (T,) int64 in 0..L-1, repeats allowed; cu_seqlens (B + 1,) int32,
    from 0 to T: sequence b has the rows cu_seqlens[b] to cu_seqlens[b + 1] - 1, possibly none, as
    variable-length attention takes them.  The gradient adds repeats up in float32; first order
    only.  No row waits for the host: each finds its sequence on the device.
    impl: "auto", "triton", "torch" or "reference".
    Raises ValueError for shapes or dtypes that disagree, an id out of range or cu_seqlens that do
    not ascend from 0 to T (both looked at on a CPU, elsewhere with FASTSSL_CHECK=1) and an unknown
    impl.

    >>> ids, cu = torch.tensor([1, 1, 0]), torch.tensor([0, 2, 3], dtype=torch.int32)
    >>> gather_packed(torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]), ids, cu).flatten().tolist()
    [2.0, 2.0, 3.0]
    """
    require_float(tokens=tokens)
    _check_list(ids, tokens, packed=True)
    if tokens.ndim != 3:
        raise ValueError(f"tokens must be (B, L, D), got {tuple(tokens.shape)}")
    if cu_seqlens.shape != (len(tokens) + 1,) or cu_seqlens.dtype != torch.int32:
        got = f"{tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
        raise ValueError(f"cu_seqlens must be ({len(tokens) + 1},) int32, got {got}")
    if looks_at(cu_seqlens):
        ends = cu_seqlens.tolist()
        if [0, *sorted(ends), len(ids)] != [ends[0], *ends, ends[-1]]:
            raise ValueError(f"cu_seqlens must ascend from 0 to {len(ids)}, got {ends}")
    check_ids(ids, tokens.shape[1], repeats=True)
    rows = torch.arange(len(ids), device=ids.device, dtype=torch.int32)
    owners = torch.searchsorted(cu_seqlens[1:], rows, right=True, out_int32=True)
    owners = owners.clamp_(max=len(tokens) - 1)  # rows past the last end: no foreign memory
    impl = implementation(impl, "tokens", tokens)
    return _PACKED(impl, tokens.device, tokens, ids, owners)
