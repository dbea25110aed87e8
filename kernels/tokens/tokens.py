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

import torch
from torch import Tensor

from ..common.checks import (
    can_read_values,
    check_ids,
    check_index,
    require_at_least,
    require_float,
    require_tensors,
)
from ..common.dispatch import declare
from .tokens_ops import Gather, GatherPacked, Restore, Scatter
from .tokens_torch import wide


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


def _gather(tokens, ids, impl):
    return Gather.call(tokens[None] if tokens.ndim == 2 else tokens, ids, impl)


_RESTORE = declare("restore_tokens", Restore.call, restore_tokens_reference)
_GATHER = declare("gather_tokens", _gather, gather_tokens_reference)
_SCATTER = declare("scatter_tokens", Scatter.call, scatter_tokens_reference)
_PACKED = declare("gather_packed", GatherPacked.call, gather_packed_reference)


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
    check_index("ids_restore", ids_restore, f"({B}, L)", visible=visible)
    if len(ids_restore) != B or ids_restore.shape[1] < K:
        got = tuple(ids_restore.shape)
        raise ValueError(f"ids_restore must be ({B}, L) with L >= {K}, got {got}")
    if pos is not None:
        require_float(pos=pos)
        if pos.shape != (ids_restore.shape[1], D):
            want = (ids_restore.shape[1], D)
            raise ValueError(f"pos must be {want}, got {tuple(pos.shape)}")
    check_ids(ids_restore, ids_restore.shape[1], "ids_restore")
    inputs = {"visible": visible}
    return _RESTORE(impl, visible, ids_restore, mask_token, pos, inputs=inputs)


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
    require_tensors(tokens=tokens)
    check_index("ids", ids, "(B, K)", tokens=tokens)
    if tokens.ndim != 2 and (tokens.ndim != 3 or len(tokens) != len(ids)):
        got = tuple(tokens.shape)
        raise ValueError(f"tokens must be ({len(ids)}, L, D) or (L, D), got {got}")
    check_ids(ids, tokens.shape[-2], repeats=True)
    return _GATHER(impl, tokens, ids, inputs={"tokens": tokens})


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
    check_index("ids", ids, "(B, K)", tokens=tokens)
    if tokens.ndim != 3 or tokens.shape[:2] != ids.shape:
        want, got = f"({len(ids)}, {ids.shape[1]}, D)", tuple(tokens.shape)
        raise ValueError(f"tokens must be {want} as ids, got {got}")
    require_at_least(0, length=length)
    check_ids(ids, length, repeats=True)
    return _SCATTER(impl, tokens, ids, length, inputs={"tokens": tokens})


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
    check_index("ids", ids, "(T,)", tokens=tokens)
    if tokens.ndim != 3:
        raise ValueError(f"tokens must be (B, L, D), got {tuple(tokens.shape)}")
    require_tensors(cu_seqlens=cu_seqlens)
    if cu_seqlens.shape != (len(tokens) + 1,) or cu_seqlens.dtype != torch.int32:
        got = f"{tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
        raise ValueError(f"cu_seqlens must be ({len(tokens) + 1},) int32, got {got}")
    if can_read_values(cu_seqlens):
        ends = cu_seqlens.tolist()
        if [0, *sorted(ends), len(ids)] != [ends[0], *ends, ends[-1]]:
            raise ValueError(f"cu_seqlens must ascend from 0 to {len(ids)}, got {ends}")
    check_ids(ids, tokens.shape[1], repeats=True)
    rows = torch.arange(len(ids), device=ids.device, dtype=torch.int32)
    owners = torch.searchsorted(cu_seqlens[1:], rows, right=True, out_int32=True)
    owners = owners.clamp_(max=len(tokens) - 1)  # rows past the last end: no foreign memory
    return _PACKED(impl, tokens, ids, owners, inputs={"tokens": tokens})
