"""How many places stay visible: from a share, and over training."""

from __future__ import annotations


def keep_of(length: int, ratio: float) -> int:
    """The places visible when the share `ratio` of `length` is hidden, rounded.

    Raises ValueError where that leaves none or all of them, and for ratios not between 0 and 1.

    >>> keep_of(196, 0.75)
    49
    """
    if not 0 < ratio < 1:
        raise ValueError(f"ratio must lie between 0 and 1, got {ratio}")
    keep = round((1 - ratio) * length)
    if not 0 < keep < length:
        raise ValueError(f"ratio={ratio} leaves {keep} of {length} places visible")
    return keep


def ratio_schedule(progress: float, first: float, last: float, steps: int | None = None) -> float:
    """The share hidden at `progress` in 0..1 of training: linear from first to last.

    steps: that many equal stages, each of one share, so that few shapes are met (None: smooth).
    Raises ValueError for progress outside 0..1, shares outside 0..1 and steps < 2.

    >>> [ratio_schedule(p, 0.5, 0.9, steps=3) for p in (0.0, 0.4, 1.0)]
    [0.5, 0.7, 0.9]
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress must lie in 0..1, got {progress}")
    if not (0 < first < 1 and 0 < last < 1):
        raise ValueError(f"first and last must lie between 0 and 1, got {first} and {last}")
    if steps is not None:
        if steps < 2:
            raise ValueError(f"steps must be at least 2, got {steps}")
        progress = min(int(progress * steps), steps - 1) / (steps - 1)
    return first + (last - first) * progress


def keep_at(
    progress: float, length: int, *, first: float, last: float, steps: int | None = None
) -> int:
    """The places visible at `progress` in 0..1: `keep_of` the `ratio_schedule`.

    Raises ValueError as those do.

    >>> [keep_at(p, 100, first=0.5, last=0.9) for p in (0, 0.5, 1)]
    [50, 30, 10]
    """
    return keep_of(length, ratio_schedule(progress, first, last, steps))
