"""The check of indices that address places of a sequence: in range, and each place once.

ids (..., K) address 0..L-1.  A range is two reductions; repeats are counted by marking (..., L)
bytes, so a check costs O(K + L) a row: a few hundredths of the gather that follows it.
On a CPU it is always made.  Elsewhere looking at values waits for the device, so it is made only
where the environment has FASTSSL_CHECK=1: for debugging; else wrong ids are undefined behaviour.
Never while torch.compile traces: traced ids have no values.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor


def looks_at(x: Tensor) -> bool:
    """Whether a check may read values of x: on a CPU, elsewhere by FASTSSL_CHECK=1, never traced.

    >>> looks_at(torch.zeros(1)), looks_at(torch.zeros(1, device="meta"))
    (True, False)
    """
    if type(x) is not Tensor or x.device.type == "meta" or torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" or os.environ.get("FASTSSL_CHECK") == "1"


def check_ids(ids: Tensor, length: int, name: str = "ids", repeats: bool = False) -> None:
    """Refuse ids outside 0..length-1 and, without repeats, two equal ones in a row.

    ids (..., K) int64, on any device; `looks_at` says where they are looked at.
    Raises ValueError, with the values seen, calling the argument `name`.

    >>> check_ids(torch.tensor([[0, 2], [1, 0]]), 3)
    >>> check_ids(torch.tensor([[0, 2], [1, 1]]), 3)
    Traceback (most recent call last):
        ...
    ValueError: ids must not repeat within a row, got 1 twice in row 1
    """
    if ids.numel() == 0 or not looks_at(ids):
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
