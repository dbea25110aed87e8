"""Attention biases of chosen places in torch, on any device: the functions `bias.py` builds on."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.chunks import row_spans
from ..common.dispatch import accumulator


def picked(bias: Tensor, ids: Tensor) -> Tensor:
    """bias_(h, ids_bi, ids_bj): (B, H, K, K)."""
    (H, L, _), (B, K) = bias.shape, ids.shape
    out, flat = bias.new_empty(B, H, K * K), bias.reshape(H, L * L)
    for i in row_spans(out, H * K * K):
        pairs = _pairs(ids[i], L)[:, None].expand(-1, H, -1)
        out[i] = flat.expand(len(pairs), -1, -1).gather(2, pairs)
    return out.view(B, H, K, K)


def _pairs(ids: Tensor, length: int) -> Tensor:
    """The places of all pairs in a flat table: (B, K * K)."""
    return (ids[:, :, None] * length + ids[:, None, :]).flatten(1)


def unpicked(grad: Tensor, ids: Tensor, length: int) -> Tensor:
    """The gradient of `picked` to the bias: (H, L, L) float32."""
    B, H, K, _ = grad.shape
    total = grad.new_zeros(H, length * length, dtype=accumulator(grad.dtype))
    for i in row_spans(grad, H * K * K):
        pairs = _pairs(ids[i], length).flatten().expand(H, -1)
        total.scatter_add_(1, pairs, grad[i].movedim(1, 0).reshape(H, -1).to(total.dtype))
    return total.view(H, length, length)


def places_of(ids: Tensor, length: int) -> Tensor:
    """Where each of `length` places stands in a row of ids (B, K), -1 if nowhere: (B, length)."""
    order = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return ids.new_full((len(ids), length), -1).scatter_(1, ids, order)
