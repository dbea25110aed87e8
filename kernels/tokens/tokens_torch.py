"""Tokens in and out of a sequence in torch, on any device: the functions `tokens.py` builds on.

Nothing larger than the result is held: sums that a 16-bit result would round at every step are
taken in float32, a chunk of the batch at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.autograd import accumulator
from ..common.chunks import row_spans
from ..common.rows import gather, rows_of

__all__ = ["gather", "pack", "restore", "restore_grads", "scatter", "scatter_table", "unpack"]


def wide(ids: Tensor, features: int) -> Tensor:
    """ids (..., K) as (..., K, D), without a copy."""
    return ids[..., None].expand(*ids.shape, features)


def restore(visible: Tensor, ids: Tensor, token: Tensor, pos: Tensor | None) -> Tensor:
    """pos_l + (visible_(b, ids_bl) if ids_bl < K, else token): (B, L, D)."""
    K, D = visible.shape[1:]
    places, token = _places(ids, K), token.to(visible.dtype)
    shown, hidden = visible, token.expand(*ids.shape, D)
    if pos is not None:
        added = pos.to(visible.dtype)
        shown, hidden = visible + added[places], (token + added).expand(*ids.shape, D)
    out = hidden.clone(memory_format=torch.contiguous_format)  # else, at one place, the token
    return out.scatter_(1, wide(places, D), shown)


def _places(ids: Tensor, visible: int) -> Tensor:
    """Where each visible token stands: the first of the permutation's inverse, (B, K)."""
    order = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return torch.empty_like(ids).scatter_(1, ids, order)[:, :visible]


def pack(tokens: Tensor, ids: Tensor, owners: Tensor) -> Tensor:
    """tokens_(owners_t, ids_t): (T, D)."""
    return tokens[owners, ids]


def restore_grads(
    grad: Tensor, ids: Tensor, visible: int, need_visible: bool, need_token: bool, need_pos: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `restore`: (B, K, D) as grad, (D,), (L, D) float32; empty if unneeded."""
    (L, D), acc = grad.shape[1:], accumulator(grad.dtype)
    d_token = grad.new_zeros(D if need_token else 0, dtype=acc)
    d_pos = grad.new_zeros((L, D) if need_pos else (0,), dtype=acc)
    for i in row_spans(grad, L * D) if need_token or need_pos else ():
        part = grad[i].to(acc)
        if need_token:
            hidden = (ids[i] >= visible).to(acc)
            d_token += (hidden[:, None] @ part).sum((0, 1))  # a sum of sums rounds less
        if need_pos:
            d_pos += part.sum(0)
    if not need_visible:
        return grad.new_empty(0), d_token, d_pos
    return gather(grad, _places(ids, visible)), d_token, d_pos


def scatter(x: Tensor, ids: Tensor, length: int) -> Tensor:
    """sum of the x_bk with ids_bk = l: (B, length, D) as x."""
    B, _, D = x.shape
    acc = accumulator(x.dtype)
    if not x.numel():
        return x.new_zeros(B, length, D)
    if acc == x.dtype:
        return _sum(x, rows_of(ids, length), B * length).view(B, length, D)
    out = x.new_zeros(B, length, D)
    for i in row_spans(out, length * D):
        sums = _sum(x[i].to(acc), rows_of(ids[i], length), len(out[i]) * length)
        out[i] = sums.view_as(out[i])
    return out


def _sum(x: Tensor, rows: Tensor, length: int) -> Tensor:
    """x's rows added up at their places: (length, D)."""
    flat = x.flatten(0, -2)
    return torch.ops.aten.embedding_dense_backward(flat, rows, length, -1, False)


def scatter_table(x: Tensor, ids: Tensor, length: int) -> Tensor:
    """sum of all the x_bk with ids_bk = l: (length, D) float32."""
    out = x.new_zeros(length, x.shape[2], dtype=accumulator(x.dtype))
    for i in row_spans(x, x[0].numel()) if x.numel() else ():
        out += _sum(x[i].to(out.dtype), ids[i].flatten(), length)
    return out


def unpack(x: Tensor, ids: Tensor, owners: Tensor, sequences: int, length: int) -> Tensor:
    """sum of the x_t with owners_t = b and ids_t = l: (B, length, D) as x (T, D)."""
    places = owners.long() * length + ids
    return scatter(x[None], places[None], sequences * length).view(sequences, length, x.shape[1])
