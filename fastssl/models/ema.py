"""A teacher: the exponential moving mean of a student's parameters."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_HALVES = (torch.bfloat16, torch.float16)


class EMA(nn.Module):
    """A copy of `student` that `update` moves towards it: t <- m t + (1 - m) s.

    The copy computes without gradients, and its parameters ask for none.  Where they have 16 bits
    the mean is kept in float32 beside them: in bfloat16 a step of 1 - m = 0.004 rounds to none.
    Buffers, such as running statistics, are the student's.  Under ZeRO-3 each rank moves the piece
    of every parameter that it holds, without communication: both models are cut alike.
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(student).requires_grad_(False)
        self._means: list[Tensor] = []  # float32, of 16-bit pieces; begun at the first update

    @torch.no_grad()
    def forward(self, *args: Any) -> Any:
        return self.model(*args)

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float) -> None:
        """Move towards `student`, whose structure is the copy's, by 1 - momentum in [0, 1]."""
        pieces = list(zip(_pieces(self.model), _pieces(student), strict=True))
        halves = [mine for mine, _ in pieces if mine.dtype in _HALVES]
        if len(self._means) != len(halves):
            self._means = [piece.float() for piece in halves]
        means = iter(self._means)
        for mine, theirs in pieces:
            if mine.dtype in _HALVES:
                mean = next(means)
                mine.copy_(mean.lerp_(theirs.float(), 1 - momentum))
            else:
                mine.lerp_(theirs, 1 - momentum)
        for mine, theirs in zip(self.model.buffers(), student.buffers(), strict=True):
            mine.copy_(theirs)

    def get_extra_state(self) -> list[Tensor]:
        return self._means

    def set_extra_state(self, state: list[Tensor]) -> None:
        device = next(self.model.parameters()).device
        self._means = [mean.to(device) for mean in state]


def _pieces(model: nn.Module) -> Iterator[Tensor]:
    """What this rank holds of each parameter: all of it, or under ZeRO-3 its piece.

    ZeRO-3 keeps small parameters whole beside their pieces: then both.
    """
    for parameter in model.parameters():
        piece = getattr(parameter, "ds_tensor", None)
        if piece is not None:
            yield piece.data
        if parameter.data.numel() == getattr(parameter, "ds_numel", parameter.numel()):
            yield parameter.data
