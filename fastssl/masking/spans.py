"""Runs of neighbors along a line, and whole times and bands of a spectrogram."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .places import Masking, below, check_keep, grid_of, masking_of, smallest, words


def _spans(seeds: Tensor, length: int, hide: int, span: int, stream: int) -> Tensor:
    """True at hidden places: ceil(hide / span) spans among the others, turned as on a ring.

    The spans, the first of them shortened to leave `hide` in all, and the visible places are
    units in random order; the ring is then cut at a random place.
    """
    count = -(-hide // span)
    units = length - hide + count
    draws = words(seeds, units + 1, stream)
    is_span = smallest(draws[:, :-1], count)
    short = is_span & (is_span.cumsum(1) == 1)
    sizes = torch.where(short, hide - (count - 1) * span, torch.where(is_span, span, 1))
    places = torch.arange(length, device=seeds.device) + below(draws[:, -1:], length)
    unit = torch.searchsorted(sizes.cumsum(1), places % length, right=True)
    return is_span.gather(1, unit)


def span_masking(seeds: Tensor, length: int, keep: int, span: int) -> Masking:
    """Hide runs of `span` neighbors, `length - keep` places in all.

    Runs do not overlap but may touch; one is shorter where span does not divide the hidden count,
    and one may be cut in two by the ends: the sequence is drawn as a ring, so that every place is
    hidden equally often.
    seeds (B,) int64.  Raises ValueError for keep outside 1..length - 1 and span outside
    1..length - keep.
    Source: runs of frames as in Liu et al. 2020, TERA, arXiv:2007.06028, section III.

    >>> span_masking(torch.tensor([7]), length=6, keep=4, span=2).visible.shape
    torch.Size([1, 4])
    """
    check_keep(keep, length - 1)
    if not 1 <= span <= length - keep:
        raise ValueError(f"span must lie between 1 and {length - keep} hidden places, got {span}")
    return masking_of(~_spans(seeds, length, length - keep, span, 9), keep)


def time_frequency_masking(
    seeds: Tensor,
    grid: Sequence[int],
    times: int,
    bands: int,
    *,
    time_span: int | None = None,
    band_span: int | None = None,
) -> Masking:
    """Hide `times` whole times and `bands` whole frequency bands of a spectrogram.

    grid (F, S): F bands (rows) of S times (columns), as an image of a spectrogram has them.
    Hidden: times F + bands S - times bands places, whatever the sample.  Both are runs, as in
    `span_masking`, of time_span and band_span neighbors; None: one run.
    seeds (B,) int64; times in 0..S - 1 and bands in 0..F - 1, not both 0.
    Raises ValueError for counts and spans out of range.
    Source: Liu et al. 2020, TERA, arXiv:2007.06028, section III (time and frequency alteration).

    >>> time_frequency_masking(torch.tensor([7]), (4, 10), times=3, bands=1).masked.shape
    torch.Size([1, 19])
    """
    F, S = grid_of(grid, 2)
    if not (0 <= times < S and 0 <= bands < F and times + bands):
        want = f"times in 0..{S - 1} and bands in 0..{F - 1}, not both 0"
        raise ValueError(f"want {want}, got {times} and {bands}")
    hidden = torch.zeros(len(seeds), F, S, dtype=torch.bool, device=seeds.device)
    axes = [("time_span", times, S, time_span, 1), ("band_span", bands, F, band_span, 2)]
    for name, count, length, span, axis in axes:
        if span is not None and not 1 <= span <= max(count, 1):
            raise ValueError(f"{name} must lie between 1 and {count} hidden, got {span}")
        if count:
            part = _spans(seeds, length, count, span or count, 9 + axis)
            hidden = hidden | part.unsqueeze(axis)
    return masking_of(~hidden.flatten(1), (S - times) * (F - bands))
