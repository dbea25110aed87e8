"""Which patches a masked method hides, and how many as training goes on."""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.masking import (
    Masking,
    block_masking,
    grid_masking,
    keep_of,
    noise_masking,
    random_masking,
)
from fastssl.models import MaskedViT
from fastssl.schedules.config import at

from .base import Method
from .configs import Kind, Ratio


def draw_mask(kind: Kind, seeds: Tensor, grid: tuple[int, ...], keep: int) -> Masking:
    """Masks that leave `keep` places of the grid visible; seeds (B,) int64.

    Raises ValueError for "grid" where `keep` is not every n-th place along each side, and for
    "block" of a grid without two sides.
    """
    if kind == "random":
        return random_masking(seeds, prod(grid), keep)
    if kind == "block":
        return block_masking(seeds, grid, keep)
    if kind == "noise":
        return noise_masking(seeds, grid, keep)
    every = round((prod(grid) / keep) ** (1 / len(grid)))
    if keep * every ** len(grid) != prod(grid):
        raise ValueError(
            f"masking=grid shows every n-th place along each side, but mask_ratio leaves {keep} of "
            f"{prod(grid)}; with n = 2 it is {1 - 0.5 ** len(grid)}"
        )
    return grid_masking(seeds, grid, every)


class DrawnOnce:
    """What is drawn from a batch's seeds for `encode`, and kept for `targets` of the same batch."""

    def __init__(self, draw: Callable[..., Any]):
        self.draw, self.last = draw, (None, (), None)

    def __call__(self, seeds: Tensor, *others: Any) -> Any:
        before, with_, _ = self.last
        if before is not seeds or with_ != others:
            self.last = seeds, others, self.draw(seeds, *others)
        return self.last[2]


def patch_values(masked: MaskedViT) -> int:
    """prod(patch) C, the numbers in one patch."""
    return prod(masked.patch) * masked.vit.patch_embed.proj.in_channels  # type: ignore


def of_one_size(encoder: nn.Module, method: str) -> MaskedViT:
    """`MaskedViT` for a method whose masks are drawn for the grid of one image size.

    Raises ValueError for an encoder that is to read several.
    """
    masked = MaskedViT(encoder)
    if masked.vit.dynamic_img_size:
        raise ValueError(
            f"method.name={method} hides patches of a fixed image size: give views of one size, "
            "and model.kwargs.dynamic_img_size=false"
        )
    return masked


class MaskedMethod(Method):
    """A method whose encoder is a ViT that reads some patches of an input, or all.

    schedule: how many, as training goes on; the subclass sets it.
    """

    masked: MaskedViT
    schedule: "MaskSchedule"

    def __init__(self, encoder: nn.Module, cfg: Any):
        super().__init__()
        self.cfg, self.masked = cfg, of_one_size(encoder, cfg.name)

    @property
    def encoder(self) -> nn.Module:  # type: ignore[override]
        return self.masked.vit

    def on_step(self, keep: Any, progress: float) -> None:
        self.schedule.progress = progress


class MaskSchedule(nn.Module):
    """`keep`, the visible ones of `length` places, at the `progress` in [0, 1] of training, of
    which `ratio` is the share hidden.

    It has no parameters; the progress is saved with a checkpoint, so that a resumed run goes on
    where it was.
    Raises ValueError, naming method.mask_ratio, for a share that leaves none or all of the places.
    """

    def __init__(self, ratio: Ratio, length: int):
        super().__init__()
        self.ratio, self.length, self.progress = ratio, length, 0.0
        shares = {at(ratio, hundredth / 100) for hundredth in range(101)}
        self.ends = min(shares), max(shares)
        for share in self.ends:
            try:
                keep_of(length, share)
            except ValueError as error:
                raise ValueError(f"method.mask_{error}") from error

    @property
    def keep(self) -> int:
        return keep_of(self.length, at(self.ratio, self.progress))

    def check(self, mask: Callable[[Tensor, int], Any]) -> None:
        """Draw mask(seeds, keep) for every number of visible places there will be.

        What cannot be drawn is found out before the first step.
        """
        ends = [keep_of(self.length, share) for share in self.ends]
        for keep in range(min(ends), max(ends) + 1):
            mask(torch.zeros(1, dtype=torch.int64), keep)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.progress, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.progress = state.item()
