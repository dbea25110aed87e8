"""What every measure asks of its input before it computes anything."""

import torch
import torch.nn.functional as F
from torch import Tensor


def checked_features(name: str, x: Tensor) -> Tensor:
    """`x` as float32 without gradient; ValueError unless (N >= 2, D >= 1) and finite as such."""
    if x.ndim != 2 or x.shape[1] < 1 or not x.is_floating_point():
        raise ValueError(f"{name} must be a float tensor (N, D), got {x.dtype} {tuple(x.shape)}")
    if x.shape[0] < 2:
        raise ValueError(f"{name} must hold at least 2 samples, got {x.shape[0]}")
    x = x.detach().float()
    broken = int((~torch.isfinite(x)).any(dim=1).sum())
    if broken:
        raise ValueError(f"{name} has non-finite values in {broken} of {x.shape[0]} rows")
    return x


def directions(x: Tensor) -> Tensor:
    """The rows of `x` (N, D) float32 at length 1, however short or long; a row of zeros stays.

    Squares of values below 1e-23 or above 1e19 leave float32, so each row is first divided by its
    largest value.
    """
    largest = x.abs().amax(1, keepdim=True)
    return F.normalize(x / largest.masked_fill(largest == 0, 1.0), dim=1)


def checked_labels(name: str, y: Tensor, x: Tensor) -> Tensor:
    """`y` on the device of `x`; ValueError unless it is int64 with one label a row of `x`."""
    if y.dtype != torch.int64 or y.ndim != 1 or len(y) != len(x):
        raise ValueError(
            f"{name} must be an int64 tensor of {len(x)} labels, got {y.dtype} {tuple(y.shape)}"
        )
    return y.to(x.device)


def same_width(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """ValueError unless both have the same number of feature dimensions."""
    if x.shape[1] != other.shape[1]:
        raise ValueError(
            f"{name} and {other_name} must have the same width, "
            f"got {x.shape[1]} and {other.shape[1]}"
        )
