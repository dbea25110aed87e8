"""Masks of a clip: tubes that hide the same places of every frame, and what the decoder sees.

grid (T, H, W): T frames of tubelets, L = T H W places, row-major, frame by frame
"""

from __future__ import annotations

from collections.abc import Sequence
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
    random_masking,
    ranked,
    smallest,
    words,
)


class Dual(NamedTuple):
    """masking: the encoder's.  decoded (B, decode): hidden places to predict, ascending, int64."""

    masking: Masking
    decoded: Tensor


def _tube(seeds: Tensor, grid: Sequence[int], keep_per_frame: int) -> Tensor:
    T, H, W = grid_of(grid, 3)
    check_keep(keep_per_frame, H * W, "keep_per_frame")
    frame = random_masking(seeds, H * W, keep_per_frame).restore < keep_per_frame
    return frame[:, None].expand(-1, T, -1).flatten(1)


def tube_masking(seeds: Tensor, grid_thw: Sequence[int], keep_per_frame: int) -> Masking:
    """Show the same `keep_per_frame` random places in every frame: T * keep_per_frame of them.

    seeds (B,) int64; grid_thw (T, H, W).  Raises ValueError for keep_per_frame outside 1..H W.
    Source: Tong et al. 2022, VideoMAE, arXiv:2203.12602, section 3 "Tube masking".

    >>> tube_masking(torch.tensor([7]), (2, 2, 2), keep_per_frame=1).visible.diff().tolist()
    [[4]]
    """
    shown = _tube(seeds, grid_thw, keep_per_frame)
    return masking_of(shown, grid_thw[0] * keep_per_frame)


def _turns(seeds: Tensor, grid: Sequence[int]) -> Tensor:
    """When a place's turn comes in its 2 x 2 cell: 0..3, one on at each frame; (B, L)."""
    frames, rows, columns = coordinates(grid_of(grid, 3), seeds.device)
    place = (rows % 2) * 2 + columns % 2
    return (place + frames + below(words(seeds, 1, 7), 4)) % 4


def running_cell_masking(seeds: Tensor, grid_thw: Sequence[int], keep: int) -> Tensor:
    """The `keep` places a decoder sees: cells of 2 x 2 places, seen in turn as frames run.

    Places of a cell are numbered row-major; in frame t those with (place + t + phase) mod 4 least
    are seen, with one random phase a sample.  At keep = L / 2, on even sides, each cell shows two
    in every frame and each place is shown in two of any four frames.  Counts between the quarters
    of L are completed at random.
    seeds (B,) int64; grid_thw (T, H, W).  Returns (B, keep) int64, ascending.
    Raises ValueError for keep outside 1..L.
    Source: Wang et al. 2023, VideoMAE V2, arXiv:2303.16727, section 3.2 "Dual masking".

    >>> running_cell_masking(torch.tensor([7]), (4, 2, 2), keep=8).shape
    torch.Size([1, 8])
    """
    turns = _turns(seeds, grid_thw)
    L = turns.shape[1]
    check_keep(keep, L)
    return ids_of(smallest(ranked(turns, words(seeds, L, 8)), keep), keep)


def dual_masking(seeds: Tensor, grid_thw: Sequence[int], keep_per_frame: int, decode: int) -> Dual:
    """Tubes for the encoder; for the decoder `decode` of the hidden places, by running cell.

    Hidden places are taken in the order of `running_cell_masking`, so that their count is fixed.
    With T a multiple of 4 and decode half of the hidden places, on even sides, they are those of
    running_cell_masking(keep=L / 2) that the encoder does not see.
    seeds (B,) int64; grid_thw (T, H, W).
    Raises ValueError for keep_per_frame outside 1..H W and decode outside 1..hidden places.
    Source: Wang et al. 2023, VideoMAE V2, arXiv:2303.16727, section 3.2 "Dual masking".

    >>> made = dual_masking(torch.tensor([7]), (4, 2, 2), keep_per_frame=1, decode=6)
    >>> made.masking.visible.shape, made.decoded.shape
    (torch.Size([1, 4]), torch.Size([1, 6]))
    """
    shown = _tube(seeds, grid_thw, keep_per_frame)
    L, keep = shown.shape[1], grid_thw[0] * keep_per_frame
    check_keep(decode, L - keep, "decode")
    turns = torch.where(shown, 4, _turns(seeds, grid_thw))
    decoded = ids_of(smallest(ranked(turns, words(seeds, L, 8)), decode), decode)
    return Dual(masking_of(shown, keep), decoded)
