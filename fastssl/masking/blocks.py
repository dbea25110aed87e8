"""Rectangles of a 2-D grid: hidden blocks (BEiT), and context and target blocks (I-JEPA).

    H x W grid, L = H W places, row-major   a block h x w at a random corner (top, left)

Sizes come from tables made on the host and whole-number draws, so that every device cuts the same
blocks.  Where a count must be exact and a rectangle is too large for it, the rectangle is filled
line by line from one of its four sides, drawn at random: no corner is favored.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, exp, log, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from .places import (
    Masking,
    below,
    check_keep,
    coordinates,
    grid_of,
    ids_of,
    masking_of,
    ranked,
    smallest,
    words,
)

_ASPECTS = 256  # aspect ratios of a table, log-uniform between its ends


class Blocks(NamedTuple):
    """context (B, context) and targets (B, blocks, target): places, ascending, int64."""

    context: Tensor
    targets: Tensor


def _aspects(aspect: tuple[float, float]) -> list[float]:
    low, high = aspect
    if not 0 < low <= high:
        raise ValueError(f"aspect must be 0 < low <= high, got {aspect}")
    step = (log(high) - log(low)) / _ASPECTS
    return [exp(log(low) + (i + 0.5) * step) for i in range(_ASPECTS)]


def _line(rows: Tensor, columns: Tensor, grid: tuple[int, int], side: Tensor) -> Tensor:
    """Each place's number when the grid is read line by line from a side: (..., L) int64.

    side (..., 1) in 0..7: row-wise or column-wise, from either end, lines from either end."""
    H, W = grid
    row = torch.where(side & 1 == 1, H - 1 - rows, rows)
    column = torch.where(side & 2 == 2, W - 1 - columns, columns)
    return torch.where(side & 4 == 4, column * H + row, row * W + column)


def _inside(rows: Tensor, columns: Tensor, corner: tuple[Tensor, Tensor], size) -> Tensor:
    (top, left), (h, w) = corner, size
    return (rows >= top) & (rows < top + h) & (columns >= left) & (columns < left + w)


def block_masking(
    seeds: Tensor,
    grid: Sequence[int],
    keep: int,
    *,
    least: int = 16,
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
    tries: int = 0,
) -> Masking:
    """Hide rectangle after rectangle until all but `keep` places are hidden.

    A block's area is uniform between `least` and what is still to be hidden (`least` where that is
    less), its aspect ratio h / w log-uniform in `aspect`, its corner uniform; blocks may overlap.
    The last block hides only as many places as are wanted, line by line from a random side, so
    that exactly `keep` stay visible.  After `tries` blocks what is still wanted is hidden at
    random; 0: 8 ceil(L / keep) of them, at most 48, of which no sample of 2,000 needed more at the
    paper's 40 % on 14 x 14 and one at 75 %; at 90 % one in 17 did, for 0.1 % of its places.
    Places in the middle of the grid are hidden more often than those at its rim, as in BEiT.
    seeds (B,) int64; grid (H, W); least in places, lowered to L - keep.
    Raises ValueError for keep outside 1..L - 1 and sizes, ratios or tries out of range.
    Source: Bao et al. 2021, BEiT, arXiv:2106.08254, algorithm 1.

    >>> block_masking(torch.tensor([7, 8]), (14, 14), keep=118).masked.shape
    torch.Size([2, 78])
    """
    H, W = grid_of(grid, 2)
    check_keep(keep, H * W - 1)
    hide = H * W - keep
    if least < 1 or not 0 <= tries < 128:
        raise ValueError(f"want least >= 1 and tries in 0..127, got {least} and {tries}")
    steps = tries or min(48, 8 * ceil(H * W / keep))
    wanted = torch.full((len(seeds), 1), hide, device=seeds.device)
    step_of, ties = _blocks(seeds, (H, W), wanted, (min(least, hide), hide), aspect, steps)
    return masking_of(~smallest(ranked(step_of, ties), hide), keep)


def some_blocks(
    seeds: Tensor,
    grid: Sequence[int],
    hide: Tensor,
    *,
    areas: tuple[int, int] | None = None,
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
    tries: int = 24,
) -> Tensor:
    """Hide hide[b] places of sample b, in rectangles as `block_masking` draws them: (B, L) bool.

    areas: least and greatest of a rectangle in places; None: 4 and half the grid.  After `tries`
    rectangles what is still wanted is hidden at random.  seeds and hide (B,) int64, hide in 0..L
    (looked at on a CPU only); grid (H, W).
    Raises ValueError for hide or tries out of range, and areas not 1 <= least <= greatest.
    Source: Oquab et al. 2023, DINOv2, arXiv:2304.07193; there a block that hides too many places is
    drawn again, up to ten times, and a mask may come out short: here the last block is cut.

    >>> some_blocks(torch.tensor([7, 8]), (14, 14), torch.tensor([0, 78])).sum(1)
    tensor([ 0, 78])
    """
    H, W = grid_of(grid, 2)
    least, most = areas or (min(4, H * W), max(1, H * W // 2))
    if not 1 <= least <= most:
        raise ValueError(f"areas must be 1 <= least <= greatest, got {areas}")
    if not 1 <= tries < 128:
        raise ValueError(f"want tries in 1..127, got {tries}")
    seen = type(hide) is Tensor and hide.is_cpu and not torch.compiler.is_compiling()
    if seen and len(hide) and not 0 <= int(hide.min()) <= int(hide.max()) <= H * W:
        raise ValueError(f"hide must lie in 0..{H * W}, got {hide.tolist()}")
    wanted = hide[:, None]
    step_of, ties = _blocks(seeds, (H, W), wanted, (least, most), aspect, tries)
    order = ranked(step_of, ties).argsort(dim=1, stable=True)
    places = torch.arange(H * W, device=seeds.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places) < wanted


def _blocks(
    seeds: Tensor,
    grid: tuple[int, int],
    hide: Tensor,
    areas: tuple[int, int],
    aspect: tuple[float, float],
    steps: int,
) -> tuple[Tensor, Tensor]:
    """The number of the rectangle that hides a place first, `steps` for none, and what breaks ties
    among those: (B, L) each.  hide (B, 1)."""
    (H, W), (least, most), device = grid, areas, seeds.device
    rows, columns = coordinates(grid, device)
    draws = words(seeds, 4 * steps + 1, 3)
    ratios = torch.tensor(_aspects(aspect), dtype=torch.float64, device=device)
    step_of = torch.full((len(seeds), H * W), steps, device=device)
    for i in range(steps):
        word = draws[:, 4 * i : 4 * i + 4, None]
        left = hide - (step_of < steps).sum(1, keepdim=True)
        room = (left.clamp(max=most) - least + 1).clamp(min=1)
        area = (least + below(word[:, 0], room)).double()
        ratio = ratios[below(word[:, 1], _ASPECTS)]
        h = (area * ratio).sqrt().round().long().clamp(1, H)
        w = (area / ratio).sqrt().round().long().clamp(1, W)
        corner = below(word[:, 2], H - h + 1), below(word[:, 3], W - w + 1)
        new = _inside(rows, columns, corner, (h, w)) & (left > 0)
        step_of = torch.where(new & (step_of == steps), i, step_of)
    line = _line(rows, columns, grid, below(draws[:, -1:], 8))
    return step_of, torch.where(step_of < steps, line << 8, words(seeds, H * W, 4))


def _targets(word: Tensor, grid: tuple[int, int], target: int, heights: list[int]) -> Tensor:
    """Blocks of exactly `target` places: (B, blocks, L) bool; word (B, blocks, 4)."""
    (H, W), device = grid, word.device
    rows, columns = coordinates(grid, device)
    h = torch.tensor(heights, device=device)[below(word[..., :1], _ASPECTS)]
    w = (target + h - 1) // h
    corner = below(word[..., 1:2], H - h + 1), below(word[..., 2:3], W - w + 1)
    inside = _inside(rows, columns, corner, (h, w))
    line = _line(rows, columns, grid, below(word[..., 3:4], 8))
    keys = torch.where(inside, line, H * W + line)
    return smallest(keys.flatten(0, 1), target).view_as(inside)


def multi_block_masking(
    seeds: Tensor,
    grid: Sequence[int],
    *,
    context: int,
    target: int,
    blocks: int = 4,
    aspect: tuple[float, float] = (0.75, 1.5),
    context_scale: tuple[float, float] = (0.85, 1.0),
) -> Blocks:
    """A context and `blocks` target blocks of it to predict, of fixed counts: I-JEPA's multi-block.

    Each target is a rectangle of aspect ratio h / w log-uniform in `aspect`, of exactly `target`
    places: its size is rounded up and the surplus, less than a line of it, left out at a random
    side.  Targets may overlap one another.  The context is a square block, its share of the grid
    uniform in `context_scale`, minus all targets; of what is left `context` random places are
    kept, and where it is less, random places outside block and targets complete it.  The paper
    draws one size a batch and cuts to the batch's least count; here each sample draws its own.
    seeds (B,) int64; grid (H, W).  The paper's 14 x 14 grid: target 29 to 39 (0.15 to 0.2).
    Raises ValueError where blocks * target + context > H * W, or no rectangle of that aspect fits.
    Source: Assran et al. 2023, I-JEPA, arXiv:2301.08243, section 3 and appendix A.

    >>> made = multi_block_masking(torch.tensor([7, 8]), (14, 14), context=60, target=34)
    >>> made.context.shape, made.targets.shape
    (torch.Size([2, 60]), torch.Size([2, 4, 34]))
    """
    H, W = grid_of(grid, 2)
    L = H * W
    if min(context, target, blocks) < 1 or blocks * target + context > L:
        got = f"{context} + {blocks} x {target}"
        raise ValueError(f"context + blocks * target must be at most {L} places, got {got}")
    low, high = context_scale
    if not 0 < low <= high <= 1:
        raise ValueError(f"context_scale must be 0 < low <= high <= 1, got {context_scale}")
    heights = [max(1, round(sqrt(target * ratio))) for ratio in _aspects(aspect)]
    if max(heights) > H or max(ceil(target / h) for h in heights) > W:
        raise ValueError(f"target={target} with aspect={aspect} does not fit the grid {H} x {W}")
    draws = words(seeds, 4 * blocks + 3, 5)
    word = draws[:, : 4 * blocks].unflatten(1, (blocks, 4))
    chosen = _targets(word, (H, W), target, heights)
    rows, columns = coordinates((H, W), seeds.device)
    scales = [sqrt(low + (high - low) * (i + 0.5) / _ASPECTS) for i in range(_ASPECTS)]
    sizes = torch.tensor([[round(H * s), round(W * s)] for s in scales], device=seeds.device)
    h, w = sizes.clamp(min=1)[below(draws[:, -3], _ASPECTS)].unsqueeze(-1).unbind(1)
    corner = below(draws[:, -2:-1], H - h + 1), below(draws[:, -1:], W - w + 1)
    outside = (~_inside(rows, columns, corner, (h, w))).long()
    keys = torch.where(chosen.any(1), 2, outside)
    kept = smallest(ranked(keys, words(seeds, L, 6)), context)
    return Blocks(ids_of(kept, context), ids_of(chosen, target))
