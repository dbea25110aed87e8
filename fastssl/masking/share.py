"""How many places stay visible of a share that is hidden."""

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
