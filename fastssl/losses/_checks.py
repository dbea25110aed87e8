"""What losses refuse alike: numbers out of range, and embeddings that do not fit together."""

from __future__ import annotations

import math
from numbers import Integral

import torch
from torch import Tensor

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_positive(**numbers: float) -> None:
    """Raise ValueError, naming the first of them, unless all numbers are > 0 and finite."""
    for name, value in numbers.items():
        if not (is_finite(value) and value > 0):
            raise ValueError(f"{name} must be > 0 and finite, got {value}")


def check_not_negative(**numbers: float) -> None:
    """Raise ValueError, naming the first of them, unless all numbers are >= 0 and finite."""
    for name, value in numbers.items():
        if not (is_finite(value) and value >= 0):
            raise ValueError(f"{name} must be >= 0 and finite, got {value}")


def check_within(low: float, high: float, **numbers: float) -> None:
    """Raise ValueError, naming the first of them, unless all numbers lie in [low, high]."""
    for name, value in numbers.items():
        if not (is_finite(value) and low <= value <= high):
            raise ValueError(f"{name} must lie in [{low}, {high}], got {value}")


def check_counts(least: int = 1, **counts: int) -> None:
    """Raise ValueError, naming the first of them, unless all are integers of at least `least`."""
    for name, count in counts.items():
        if not isinstance(count, Integral) or count < least:  # type: ignore[operator]
            raise ValueError(f"{name} must be at least {least} and an integer, got {count}")


def is_finite(value: float) -> bool:
    """Whether value is a number, and a finite one."""
    try:
        return math.isfinite(value)
    except (TypeError, ValueError, OverflowError):  # no number, or an integer past every float
        return False


def check_embeddings(shape: str = "B, D", **given: Tensor) -> None:
    """Raise ValueError unless all have one shape, with the axes named, none of them empty, and
    one floating dtype and device."""
    first, names = next(iter(given.values())), " and ".join(given)
    axes = len(shape.split(","))
    if any(x.ndim != axes or x.shape != first.shape or 0 in x.shape for x in given.values()):
        shapes = " and ".join(str(tuple(x.shape)) for x in given.values())
        both = "both " if len(given) == 2 else ""
        raise ValueError(f"{names} must {both}be ({shape}), none of them empty, got {shapes}")
    if any(not x.is_floating_point() for x in given.values()):
        seen = " and ".join(str(x.dtype) for x in given.values())
        raise ValueError(f"{names} must be floating-point, got {seen}")
    if any(x.dtype != first.dtype or x.device != first.device for x in given.values()):
        seen = " and ".join(f"{x.dtype} on {x.device}" for x in given.values())
        raise ValueError(f"{names} must share dtype and device, got {seen}")


def check_ids(name: str, ids: Tensor, z: Tensor) -> None:
    """Raise ValueError unless ids are integers, one for each image, on the embeddings' device."""
    if ids.shape != z.shape[:1] or ids.dtype not in INTEGERS or ids.device != z.device:
        got = f"{tuple(ids.shape)} {ids.dtype} on {ids.device}"
        raise ValueError(f"{name} must be ({len(z)},) integers on {z.device}, got {got}")
