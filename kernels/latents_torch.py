"""The scaled cosine error in torch, on any device: the functions `latents.py` builds on.

A chunk of the batch at a time: no normalised and no gathered copy is larger than that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._chunks import row_spans
from ._dispatch import accumulator
from .tokens_torch import gathered, rows_of

EPS = 1e-12


def _chunk(x: Tensor, ids: Tensor | None, i: slice, acc: torch.dtype) -> Tensor:
    return (x[i] if ids is None else gathered(x[i], ids[i])).to(acc)


def _unit(x: Tensor, norm: Tensor) -> Tensor:
    """Divided, not multiplied by an inverse: a row of one feature becomes exactly 1 or -1."""
    return x / norm.clamp_min(EPS)[..., None]


def errors(pred: Tensor, target: Tensor, ids: Tensor | None, gamma: float) -> tuple[Tensor, Tensor]:
    """(1 - cos)^gamma (B, K) and, for `gradients`, (3, B, K): cos and both norms; float32."""
    shape = pred.shape[:2] if ids is None else ids.shape
    stats = pred.new_empty(3, *shape, dtype=accumulator(pred.dtype))
    for i in row_spans(pred, shape[1] * pred.shape[2]):
        p, t = (_chunk(x, ids, i, stats.dtype) for x in (pred, target))
        stats[1, i], stats[2, i] = (torch.linalg.vector_norm(x, dim=-1) for x in (p, t))
        cos = torch.linalg.vecdot(_unit(p, stats[1, i]), _unit(t, stats[2, i]))
        stats[0, i] = cos + 0 * stats[1, i] + 0 * stats[2, i]  # NaN of a norm past all numbers
    return (1 - stats[0]).clamp_min_(0).pow_(gamma), stats


def gradients(
    grad: Tensor,
    pred: Tensor,
    target: Tensor,
    ids: Tensor | None,
    stats: Tensor,
    gamma: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """The gradients to pred and target, each as its own; empty where `needs` says so."""
    made = [
        torch.zeros_like(x, memory_format=torch.contiguous_format) if need else x.new_empty(0)
        for x, need in zip((pred, target), needs, strict=True)
    ]
    for i in row_spans(pred, stats.shape[2] * pred.shape[2]):
        cos = stats[0, i]
        w = grad[i] * -gamma * (1 - cos).clamp_min(0).pow(gamma - 1)
        sides = [
            _unit(_chunk(x, ids, i, stats.dtype), stats[1 + side, i])
            for side, x in enumerate((pred, target))
        ]
        for side, (x, y) in enumerate((sides, sides[::-1])):
            if not needs[side]:
                continue
            norm = stats[1 + side, i]
            along = torch.where(norm > EPS, cos, 0.0)[..., None]
            d = torch.addcmul(y, x, along, value=-1).mul_((w / norm.clamp_min(EPS))[..., None])
            if ids is None:
                made[side][i] = d
            else:
                rows = made[side][i].flatten(0, 1)
                rows.index_copy_(0, rows_of(ids[i], pred.shape[1]), d.flatten(0, 1).to(rows.dtype))
    return made[0], made[1]
