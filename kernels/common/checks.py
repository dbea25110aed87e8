"""Checks of arguments: dtypes, rows, pairs of tensors, and indices that address places.

Reading a value waits for the device, so values are looked at on a CPU alone, or anywhere where the
environment has FASTSSL_CHECK=1: for debugging.  Elsewhere wrong values are undefined behavior.
"""

from __future__ import annotations

import os
from numbers import Real

import torch
from torch import Tensor

from fastssl.distributed import Group, require_all_even, world_size


def can_read_values(x: Tensor) -> bool:
    """Whether a check may read values of x: on a CPU, elsewhere by FASTSSL_CHECK=1.

    Never where x is traced, and never under torch.func, where it may stand for many.

    >>> can_read_values(torch.zeros(1)), can_read_values(torch.zeros(1, device="meta"))
    (True, False)
    """
    if type(x) is not Tensor or torch.compiler.is_compiling():
        return False
    if torch._C._get_tracing_state() or torch._C._are_functorch_transforms_active():
        return False
    return x.is_cpu or (os.environ.get("FASTSSL_CHECK") == "1" and not x.is_meta)


def require_tensors(**tensors: Tensor) -> None:
    """Raise ValueError, naming the argument, for what is no tensor."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")


def require_float(**tensors: Tensor) -> None:
    """Raise ValueError, naming the argument, for what is no tensor of a floating dtype."""
    require_tensors(**tensors)
    for name, x in tensors.items():
        if not x.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {x.dtype}")


def require_features(**tensors: Tensor) -> None:
    """Raise ValueError, naming the argument, for a tensor whose last dimension is empty."""
    for name, x in tensors.items():
        if x.shape[-1] == 0:
            got = tuple(x.shape)
            raise ValueError(f"{name} must have at least 1 feature (last dimension), got {got}")


def require_at_least(least: float, **numbers: float) -> None:
    """Raise ValueError, naming the argument, for what is no number or is below `least`."""
    for name, x in numbers.items():
        if not isinstance(x, Real) or not x >= least:
            raise ValueError(f"{name} must be >= {least:g}, got {x!r}")


def check_pair(a: Tensor, b: Tensor, names: tuple[str, str] = ("a", "b")) -> None:
    """Refuse two tensors that are not of one floating dtype on one device."""
    require_float(**dict(zip(names, (a, b), strict=True)))
    if a.dtype != b.dtype or a.device != b.device:
        got = f"{a.dtype} on {a.device} and {b.dtype} on {b.device}"
        raise ValueError(f"{' and '.join(names)} must share dtype and device, got {got}")


def check_rows(least: int, group: Group, **tensors: Tensor) -> None:
    """Refuse what is not (N, D) float rows, as many on every rank and at least `least` in all.

    What all ranks refuse together comes first: one that left alone would leave the others waiting.
    """
    require_tensors(**tensors)
    W = world_size(group)
    if W > 1:
        require_all_even(group, **tensors)
    require_float(**tensors)
    for name, x in tensors.items():
        if x.ndim != 2:
            raise ValueError(f"{name} must be (N, D), got {tuple(x.shape)}")
        if x.shape[0] * W < least:
            got = x.shape[0] * W
            raise ValueError(f"{name} must have at least {least} rows in all, got {got}")
    require_features(**tensors)


def check_index(name: str, ids: Tensor, shape: str, **values: Tensor) -> None:
    """Refuse what is no int64 tensor of as many dimensions as `shape`, on the values' device."""
    require_tensors(**{name: ids})
    if ids.ndim != len(shape.strip("()").rstrip(",").split(",")) or ids.dtype != torch.int64:
        raise ValueError(f"{name} must be {shape} int64, got {tuple(ids.shape)} {ids.dtype}")
    for other, x in values.items():
        if ids.device != x.device:
            raise ValueError(f"{name} must be on {x.device} with the {other}, got {ids.device}")


def check_ids(ids: Tensor, length: int, name: str = "ids", repeats: bool = False) -> None:
    """Refuse ids outside 0..length-1 and, without repeats, two equal ones in a row.

    ids (..., K) int64, on any device; `can_read_values` says where they are looked at.  A range is
    two reductions, repeats are counted by marking (..., length) bytes: O(K + length) a row.
    Raises ValueError, with the values seen, calling the argument `name`.

    >>> check_ids(torch.tensor([[0, 2], [1, 0]]), 3)
    >>> check_ids(torch.tensor([[0, 2], [1, 1]]), 3)
    Traceback (most recent call last):
        ...
    ValueError: ids must not repeat within a row, got 1 twice in row 1
    """
    if ids.numel() == 0 or not can_read_values(ids):
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= length:
        raise ValueError(f"{name} must lie in 0..{length - 1}, got {low}..{high}")
    if repeats:
        return
    rows = ids.reshape(-1, ids.shape[-1])
    seen = torch.zeros(len(rows), length, dtype=torch.bool, device=ids.device)
    seen.scatter_(1, rows, True)
    if int(seen.count_nonzero()) < rows.numel():
        row = int((seen.count_nonzero(1) < rows.shape[1]).int().argmax())
        ordered = rows[row].sort().values
        twice = int(ordered[1:][ordered[1:] == ordered[:-1]][0])
        raise ValueError(f"{name} must not repeat within a row, got {twice} twice in row {row}")
