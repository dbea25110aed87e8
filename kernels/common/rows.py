"""Rows: of features, and of sequences by their places."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EVEN = 16  # features that a GPU's widest loads divide, in 8 to 32 bits


def evened(x: Tensor) -> Tensor:
    """Rows (N, D) with zeros after their features, so that no load has to go number by number.

    x itself where its rows are such that none has to.  Products of rows stay what they are.
    """
    if x.shape[1] % EVEN:
        return F.pad(x, (0, -x.shape[1] % EVEN))
    return x if x.stride(1) == 1 and x.stride(0) % EVEN == 0 else x.contiguous()


def cut(x: Tensor, features: int) -> Tensor:
    """The features that `evened` rows had, of a gradient to them."""
    return x if x.ndim < 2 or x.shape[1] == features else x[:, :features].contiguous()


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
