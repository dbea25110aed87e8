"""A teacher: the exponential moving mean of a student's parameters."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fastssl import pieces

from .frozen import frozen_in, shared_copies

_HALVES = (torch.bfloat16, torch.float16)
_AT_ONCE = 64  # 16-bit tensors whose float32 copies are there at one time


class EMA(nn.Module):
    """A copy of `student` that `update` moves towards it: t <- m t + (1 - m) s.

    The copy computes without gradients, and its parameters ask for none.  Where they have 16 bits
    the mean is kept in float32 beside them, and saved with them: in bfloat16 a step of
    1 - m = 0.004 rounds to none.  Buffers, such as running statistics, are the student's, and so
    is a frozen network, of which there is no copy.
    Where an engine cuts parameters each rank moves the pieces that it holds, without communication:
    both models are cut alike.
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(student, shared_copies(student)).requires_grad_(False)
        self._means: list[Tensor] = []  # float32, of 16-bit pieces; begun at the first update

    @torch.no_grad()
    def forward(self, *args: Any) -> Any:
        return self.model(*args)

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float) -> None:
        """Move towards `student`, whose structure is the copy's, by 1 - momentum in [0, 1].

        Raises ValueError for another momentum.
        """
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must lie in [0, 1], got {momentum}")
        pairs = zip(self.model.parameters(), student.parameters(), strict=True)
        moving = [(mine, theirs) for mine, theirs in pairs if mine is not theirs]
        parts = [(pieces.piece(mine), pieces.piece(theirs)) for mine, theirs in moving]
        halves = [(mine, theirs) for mine, theirs in parts if mine.dtype in _HALVES]
        whole = [(mine, theirs) for mine, theirs in parts if mine.dtype not in _HALVES]
        if not self._means:
            self._means = [mine.float() for mine, _ in halves]
        for n in range(0, len(halves), _AT_ONCE):
            some, means = halves[n : n + _AT_ONCE], self._means[n : n + _AT_ONCE]
            torch._foreach_lerp_(means, [theirs.float() for _, theirs in some], 1 - momentum)
            torch._foreach_copy_([mine for mine, _ in some], means)
        if whole:
            torch._foreach_lerp_([mine for mine, _ in whole], [s for _, s in whole], 1 - momentum)
        for mine, theirs in zip(self.model.buffers(), student.buffers(), strict=True):
            mine.copy_(theirs)
        pieces.renew([mine for mine, _ in moving])

    def float32_masters(self, *, begin: bool = False) -> dict[nn.Parameter, Tensor]:
        """The float32 mean of each piece here that has 16 bits, by its parameter.

        Before the first update there are none, unless they are to `begin`.
        """
        shared = {id(p) for network in frozen_in(self.model) for p in network.parameters()}
        own = [p for p in self.model.parameters() if id(p) not in shared]
        halves = [p for p in own if pieces.piece(p).dtype in _HALVES]
        if begin and not self._means:
            self._means = [pieces.piece(p).float() for p in halves]
        return dict(zip(halves, self._means, strict=True)) if self._means else {}

    def get_extra_state(self) -> list[Tensor]:
        return self._means

    def set_extra_state(self, state: list[Tensor]) -> None:
        device = next(self.model.parameters()).device
        self._means = [mean.to(device, copy=True) for mean in state]
