"""What every masking is made of: places, seeds, and a fixed count of them chosen without a loop.

    B samples   L places of a sample   K visible ones   seeds (B,) int64, one a sample

A generator gives each place a whole number and shows (or hides) the smallest: the count is then
exact whatever the sample, so that no batch is ragged.  Ties are broken by hashed words.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.random import hashes

# Streams of one seed start this far apart: odd, and no multiple of SplitMix64's own step.
_STRIDE = 0xD1B54A32D192ED03


class Masking(NamedTuple):
    """visible (B, keep) and masked (B, L - keep): places, ascending.  restore (B, L): place l is
    token restore[b, l] of the joined sequence (visible, masked).  All int64."""

    visible: Tensor
    masked: Tensor
    restore: Tensor


def words(seeds: Tensor, length: int, stream: int = 0) -> Tensor:
    """(B, length) hashed int64 words of each seed; another `stream`, other words."""
    if seeds.ndim != 1 or seeds.dtype != torch.int64:
        raise ValueError(f"seeds must be (B,) int64, got {tuple(seeds.shape)} {seeds.dtype}")
    offset = stream * _STRIDE & (1 << 64) - 1
    return hashes(seeds + (offset - (1 << 64) if offset >> 63 else offset), length)


def below(word: Tensor, bound: Tensor | int) -> Tensor:
    """A whole number in 0..bound - 1 of each hashed word; bound < 2^31, uniform to 2^-32."""
    return ((word >> 32 & 0xFFFFFFFF) * bound) >> 32


def grid_of(grid: Sequence[int], dims: int | None = None) -> tuple[int, ...]:
    """`grid` as a tuple, after refusing sides below 1 and another number of them than `dims`."""
    sides = tuple(int(side) for side in grid)
    if not sides or min(sides) < 1 or dims not in (None, len(sides)):
        want = "sides" if dims is None else f"{dims} sides"
        raise ValueError(f"grid must be {want} of at least 1, got {grid}")
    return sides


def check_keep(keep: int, length: int, name: str = "keep") -> None:
    if not 1 <= keep <= length:
        raise ValueError(f"{name} must lie between 1 and length = {length}, got {keep}")


def coordinates(grid: Sequence[int], device: torch.device) -> tuple[Tensor, ...]:
    """The coordinate of each place along each side: one (L,) int64 tensor a side, row-major."""
    axes = [torch.arange(side, device=device) for side in grid]
    return tuple(c.flatten() for c in torch.meshgrid(*axes, indexing="ij"))


def ranked(kind: Tensor, ties: Tensor) -> Tensor:
    """Keys in the order of `kind`, whole numbers in 0..127, then of hashed words: (B, L)."""
    return (kind << 56) + (ties >> 8)


def smallest(keys: Tensor, count: int) -> Tensor:
    """True at the `count` smallest keys of each row, the earlier of equal ones: (B, L) bool."""
    chosen = keys.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(keys, dtype=torch.bool).scatter_(1, chosen, True)


def ids_of(chosen: Tensor, count: int) -> Tensor:
    """Places where `chosen` (..., L) bool is True, ascending: (..., count) int64.

    Every row must have `count` of them."""
    ids = masking_of(chosen.flatten(0, -2), count).visible
    return ids.reshape(*chosen.shape[:-1], count)


def masking_of(shown: Tensor, keep: int) -> Masking:
    """The Masking whose visible places are `shown` (B, L) bool, `keep` in every row."""
    before = shown.cumsum(1)  # visible places up to each, itself counted
    places = torch.arange(shown.shape[1], device=shown.device).expand_as(before)
    restore = torch.where(shown, before - 1, keep + places - before)
    order = torch.empty_like(restore).scatter_(1, restore, places)
    return Masking(order[:, :keep], order[:, keep:], restore)


def random_masking(seeds: Tensor, length: int, keep: int) -> Masking:
    """Keep `keep` of `length` places of each sample, every subset equally likely.

    seeds (B,) int64, one a sample, any values.  Returns Masking on the seeds' device.
    Raises ValueError for other seeds, and keep outside 1..length.
    Source: He et al. 2021, MAE, arXiv:2111.06377, section 3 "Masking".

    >>> mask = random_masking(torch.tensor([7]), length=4, keep=1)
    >>> torch.cat([mask.visible, mask.masked], 1).gather(1, mask.restore).tolist()
    [[0, 1, 2, 3]]
    """
    check_keep(keep, length)
    return masking_of(smallest(words(seeds, length), keep), keep)


def unit_masking(seeds: Tensor, grid: Sequence[int], unit: int, keep: int) -> Masking:
    """Keep `keep` units of `unit` places a side, every subset of units equally likely.

    seeds (B,) int64; grid: sides of any number of dims.  Visible: keep * unit^dims places.
    Raises ValueError for a unit that does not divide the sides and keep outside 1..units.
    Source: Xie et al. 2021, SimMIM, arXiv:2111.09886, section 3.2 (masked patch size).

    >>> unit_masking(torch.tensor([7]), (4, 4), unit=2, keep=1).visible.diff().tolist()
    [[1, 3, 1]]
    """
    sides = grid_of(grid)
    if unit < 1 or any(side % unit for side in sides):
        raise ValueError(f"unit must divide the grid {sides}, got {unit}")
    coarse = [side // unit for side in sides]
    drawn = random_masking(seeds, prod(coarse), keep)
    place = torch.zeros((), dtype=torch.int64, device=seeds.device)
    for side, at in zip(coarse, coordinates(sides, seeds.device), strict=True):
        place = place * side + at // unit
    return masking_of(drawn.restore[:, place] < keep, keep * unit ** len(sides))


def column_masking(seeds: Tensor, columns: int, keep: int) -> Masking:
    """Keep `keep` of a table's `columns` in each row, every subset equally likely.

    A row is a sample and a column one token, so this is `random_masking` with the table's words.
    seeds (B,) int64.  Raises ValueError for keep outside 1..columns.
    Source: Thimonier et al. 2024, T-JEPA, arXiv:2410.05016.

    >>> column_masking(torch.tensor([7, 8]), columns=12, keep=5).masked.shape
    torch.Size([2, 7])
    """
    return random_masking(seeds, columns, keep)


def weighted_masking(seeds: Tensor, weights: Tensor, keep: int) -> Masking:
    """Keep `keep` places drawn one after another without replacement, in proportion to `weights`.

    The first is l with probability w_l / sum w, the next so among the rest; places of weight 0
    come last, in random order.  To hide by weight, ask for L - n and swap visible and masked.
    Keys are E_l / w_l with E exponential (the smallest win), in float64, whose logarithm differs
    by an ulp between devices: two masks part only where two keys are that close.
    seeds (B,) int64; weights (B, L) float, >= 0 and finite (looked at on a CPU only).
    Raises ValueError for weights of another shape, negative or not finite, and keep outside 1..L.
    Source: Efraimidis & Spirakis 2006, Weighted random sampling with a reservoir, algorithm A.

    >>> weights = torch.tensor([[0.0, 1.0, 0.0, 2.0]])
    >>> weighted_masking(torch.tensor([7]), weights, keep=2).visible.tolist()
    [[1, 3]]
    """
    draws = words(seeds, weights.shape[-1], 1)
    if weights.ndim != 2 or len(weights) != len(seeds) or not weights.is_floating_point():
        got = f"{tuple(weights.shape)} {weights.dtype}"
        raise ValueError(f"weights must be ({len(seeds)}, L) float, got {got}")
    check_keep(keep, weights.shape[1])
    seen = weights.device.type == "cpu" and not torch.compiler.is_compiling()
    if seen and not bool(((weights >= 0) & (weights < torch.inf)).all()):
        raise ValueError("weights must be >= 0 and finite")
    uniform = ((draws >> 11 & (1 << 53) - 1).double() + 0.5) * 2.0**-53
    keys = -uniform.log() / weights.double()
    order = draws.argsort(dim=1, stable=True)  # of equal keys, which are infinite, the least word
    order = order.gather(1, keys.gather(1, order).argsort(dim=1, stable=True))
    shown = torch.zeros_like(keys, dtype=torch.bool).scatter_(1, order[:, :keep], True)
    return masking_of(shown, keep)


def grid_masking(seeds: Tensor, grid: Sequence[int], every: int | Sequence[int]) -> Masking:
    """Show every n-th place along each side, from a random first one: L / prod(every) places.

    seeds (B,) int64; grid: sides of any number of dims; every: one step, or one a side.
    Raises ValueError where a step does not divide its side, or all steps are 1.
    Source: He et al. 2021, MAE, arXiv:2111.06377, section 4.1 "Mask sampling" (grid-wise).

    >>> grid_masking(torch.tensor([7]), (2, 4), 2).visible.shape
    torch.Size([1, 2])
    """
    sides = grid_of(grid)
    steps = (every,) * len(sides) if isinstance(every, int) else tuple(every)
    fits = len(steps) == len(sides) and min(steps) > 0
    if not fits or any(s % n for n, s in zip(steps, sides, strict=True)) or prod(steps) == 1:
        raise ValueError(f"every must divide the grid {sides} and hide something, got {every}")
    phases = words(seeds, len(sides), 2)
    shown = torch.ones(len(seeds), prod(sides), dtype=torch.bool, device=seeds.device)
    for d, (axis, step) in enumerate(zip(coordinates(sides, seeds.device), steps, strict=True)):
        shown = shown & (axis % step == below(phases[:, d : d + 1], step))
    return masking_of(shown, prod(sides) // prod(steps))
