"""Rows of sequences by their places."""

from __future__ import annotations

import torch
from torch import Tensor


def gather(source: Tensor, ids: Tensor) -> Tensor:
    """source_(b, ids_bk): (B, K, D), of source (B, L, D) or (1, L, D) for all."""
    if len(source) == 1:
        return source[0].index_select(0, ids.flatten()).view(*ids.shape, source.shape[2])
    if not source.is_contiguous():
        return source[torch.arange(len(ids), device=ids.device)[:, None], ids]
    rows = source.flatten(0, 1).index_select(0, rows_of(ids, source.shape[1]))
    return rows.view(*ids.shape, source.shape[2])


def rows_of(ids: Tensor, length: int) -> Tensor:
    """The rows of places ids (B, K) where all sequences, of `length` places, are one: (B * K,)."""
    return (ids + torch.arange(len(ids), device=ids.device)[:, None] * length).flatten()
