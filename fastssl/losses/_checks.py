"""What losses refuse alike: numbers out of range, and batches that do not fit together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral

import torch
from torch import Tensor

from fastssl.distributed import Group, require_all_even, world_size

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_positive(**numbers: float) -> None:
    """Raise ValueError, naming the first of them, unless all numbers are > 0 and finite."""
    for name, value in numbers.items():
        if not (is_finite(value) and value > 0):
            raise ValueError(f"{name} must be > 0 and finite, got {value}")


def check_temperature(temperature: float, name: str = "temperature") -> None:
    """Raise ValueError unless temperature is finite, and 1 / temperature a number to work with."""
    check_positive(**{name: temperature})
    if temperature < 1e-8:
        raise ValueError(f"{name} must be at least 1e-8, got {temperature}")


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


def check_batch(
    group: Group,
    axes: str = "B, D",
    *,
    ids: Mapping[str, Tensor | None] | None = None,
    least: int = 1,
    **views: Tensor,
) -> int:
    """The images of the joined batch, of which every rank has one of each view.

    Raises ValueError unless the ranks have the same shapes and dtypes, the views pass
    `check_embeddings` and the ids, those that are not None, `check_ids`, and the images are at
    least `least`.
    """
    first, W = next(iter(views.values())), world_size(group)
    # First what all ranks refuse together: one that left alone would leave the others waiting.
    if W > 1:
        require_all_even(group, **views, **(ids or {}))
    check_embeddings(axes, **views)
    for name, x in (ids or {}).items():
        if x is not None:
            check_ids(name, x, first)
    images = len(first) * W
    if images < least:
        raise ValueError(f"the joined batch must have at least {least} images, got {images}")
    return images


def check_embeddings(axes: str = "B, D", **views: Tensor) -> None:
    """Raise ValueError unless all have one shape, with the axes named, none of them empty, and
    one floating dtype and device."""
    first, many = next(iter(views.values())), "..." in axes
    shape, dtype, device = first.shape, first.dtype, first.device
    least = axes.count(",") + 1 - many
    fits = 0 not in shape and (len(shape) >= least if many else len(shape) == least)
    alike = dtype.is_floating_point
    for x in views.values():
        fits = fits and x.shape == shape
        alike = alike and x.dtype == dtype and x.device == device
    if fits and alike:  # every step asks, and only a mistake wants words
        return
    names = " and ".join(views)
    if not fits:
        shapes = " and ".join(str(tuple(x.shape)) for x in views.values())
        both = {1: "", 2: "both "}.get(len(views), "all ")
        raise ValueError(f"{names} must {both}be ({axes}), none of them empty, got {shapes}")
    kinds = " and ".join(f"{x.dtype} on {x.device}" for x in views.values())
    if not all(x.is_floating_point() for x in views.values()):
        raise ValueError(f"{names} must be floating-point, got {kinds}")
    raise ValueError(f"{names} must share dtype and device, got {kinds}")


def check_ids(name: str, ids: Tensor, z: Tensor, axes: int = 1) -> None:
    """Raise ValueError unless ids are integers on the embeddings' device, one for each place that
    the first `axes` axes of z have."""
    want = z.shape[:axes]
    if ids.shape != want or ids.dtype not in INTEGERS or ids.device != z.device:
        got = f"{tuple(ids.shape)} {ids.dtype} on {ids.device}"
        raise ValueError(f"{name} must be {tuple(want)} integers on {z.device}, got {got}")
