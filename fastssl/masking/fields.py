"""Masks from random fields over a grid: filtered noise, and groups that grow from seeds.

All arithmetic is on whole numbers, so that a mask is the same bit by bit on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from .places import Masking, check_keep, grid_of, masking_of, smallest, words

_BANDS = {"red": "low", "blue": "high", "green": "band", "purple": "stop"}
_PASSES = {1: (3, 12), 2: (2, 8), 3: (1, 5)}  # of the fine and the coarse blur, by dims


def _blur(field: Tensor, passes: int) -> Tensor:
    """`passes` times the sums with weights 1, 2, 1 along every side of a ring: times 4^dims each.

    A pass adds a variance of 1/2 place^2 to the kernel."""
    for _ in range(passes):
        for side in range(1, field.ndim):
            field = field.roll(1, side) + 2 * field + field.roll(-1, side)
    return field


def noise_masking(seeds: Tensor, grid: Sequence[int], keep: int, band: str = "band") -> Masking:
    """Show the `keep` places where filtered white noise is highest.

    band: "low" ("red": large clumps), "high" ("blue": evenly spread), "band" ("green": clumps of
    a middling size, the best of the paper's) or "stop" ("purple": white less green).
    The blur is a repeated binomial one: of 2-D grids sigma 1 and 2 places; low is the coarse blur,
    high the noise less the fine blur, band their difference, stop the noise less that.  The grid
    is filtered as a ring along each side, which makes every place equally likely.
    seeds (B,) int64; grid: 1 to 3 sides.
    Raises ValueError for keep outside 1..L, more sides and an unknown band.
    Source: Hinojosa et al. 2024, ColorMAE, arXiv:2407.13036, section 3.

    >>> noise_masking(torch.tensor([7]), (14, 14), keep=49, band="green").visible.shape
    torch.Size([1, 49])
    """
    sides = grid_of(grid)
    L, kind = prod(sides), _BANDS.get(band, band)
    check_keep(keep, L)
    if len(sides) > 3 or kind not in _BANDS.values():
        known = [*_BANDS.values(), *_BANDS]
        raise ValueError(f"want 1 to 3 sides and a band of {known}, got {sides} and {band!r}")
    draws = words(seeds, L, 12)
    white = (draws >> 48).view(-1, *sides)  # 16 bits: what follows stays under 2^62
    few, many = _PASSES[len(sides)]
    unit = 4 ** len(sides)  # what one pass multiplies by
    fine = _blur(white, few)
    coarse = _blur(fine, many - few)
    bandpass = fine * unit ** (many - few) - coarse
    field = {
        "low": coarse,
        "high": white * unit**few - fine,
        "band": bandpass,
        "stop": white * unit**many - bandpass,
    }[kind]
    keys = (draws & 0xFFF) - (field.flatten(1) << 12)  # equal values by other bits of their words
    return masking_of(smallest(keys, keep), keep)


def _nearest(times: Tensor) -> Tensor:
    """The least arrival time among each place's neighbors along the sides: (B, *grid)."""
    best = torch.full_like(times, _NEVER)
    for side in range(1, times.ndim):
        n = times.shape[side]
        if n > 1:
            edge = torch.full_like(times.narrow(side, 0, 1), _NEVER)
            before = torch.cat([edge, times.narrow(side, 0, n - 1)], side)
            after = torch.cat([times.narrow(side, 1, n - 1), edge], side)
            best = torch.minimum(best, torch.minimum(before, after))
    return best


_NEVER = 1 << 46  # later than any sum of costs


def connected_masking(seeds: Tensor, grid: Sequence[int], keep: int, *, groups: int = 4) -> Masking:
    """Hide connected groups of places, grown from `groups` random ones until `keep` are left.

    Every place has a random cost; a group reaches a place at the least sum of costs over paths
    from its seed (first-passage growth; paths of more steps than lie between opposite corners are
    not tried), and the earliest reached are hidden.  A place is never hidden before the neighbor
    it was reached from, so each hidden component holds a seed: at most `groups` of them, fewer
    where they meet.  Neighbors share a side.
    Places in the middle of the grid are hidden more often than those at its rim.
    seeds (B,) int64; grid: any number of sides.
    Raises ValueError for keep outside 1..L - 1 and groups outside 1..L - keep.
    Source: groups of connected patches as in Atito et al. 2022, GMML, arXiv:2205.14986, section 3.

    >>> connected_masking(torch.tensor([7]), (6, 6), keep=16, groups=2).masked.shape
    torch.Size([1, 20])
    """
    sides = grid_of(grid)
    L = prod(sides)
    check_keep(keep, L - 1)
    if not 1 <= groups <= L - keep:
        raise ValueError(f"groups must lie between 1 and {L - keep} hidden places, got {groups}")
    start = smallest(words(seeds, L, 13), groups).view(-1, *sides)
    draws = words(seeds, L, 14)
    cost = ((draws >> 48 & 0xFFFF) + 1).view_as(start)
    times = torch.where(start, 0, _NEVER)
    for _ in range(sum(sides) - len(sides)):  # the longest way between two corners
        times = torch.minimum(times, _nearest(times) + cost)
    keys = (times.flatten(1) << 16) + (draws & 0xFFFF)
    return masking_of(~smallest(keys, L - keep), keep)
