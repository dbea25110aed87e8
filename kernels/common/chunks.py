"""How much a streamed implementation works on at a time: a budget of bytes for each device.

On a CPU a chunk should stay in cache, yet not be so small that threads wait for each other more
than they work (measured: 1 to 4 MiB are alike on an idle machine, and 4 MiB waits less on a busy
one); on a GPU it should fill the device and still be small beside its memory.  The budget bounds
the temporaries, whatever the shapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_BYTES = {"cpu": 1 << 22, "cuda": 1 << 27}  # other devices: as cuda


def _elements(x: Tensor) -> int:
    item = torch.finfo(x.dtype).bits // 8 if x.is_floating_point() else 4
    return max(1, CHUNK_BYTES.get(x.device.type, CHUNK_BYTES["cuda"]) // item)


def tile_shape(m: int, n: int, x: Tensor) -> tuple[int, int]:
    """(rows, cols) of the tiles that cover m x n in x's dtype: square, or a side's whole length."""
    area = _elements(x)
    cols = min(n, max(math.isqrt(area), area // max(m, 1)))
    return max(1, min(m, area // max(cols, 1))), max(1, cols)


def square_tile(x: Tensor, tiles: int) -> int:
    """The side of square tiles in x's dtype, so many at a time."""
    return max(1, math.isqrt(_elements(x) // tiles))


def spans(length: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most `step` that cover `length`."""
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def rows_in_budget(x: Tensor, width: int) -> int:
    """How many rows of `width` elements in x's dtype keep to the budget; one at least."""
    return max(1, _elements(x) // max(width, 1))


def row_spans(x: Tensor, width: int, least: int = 1) -> Iterator[slice]:
    """Slices of x's rows such that `width` elements a row, in x's dtype, keep to the budget.

    least: rows that are taken whatever they weigh, as products of a few are slow.
    """
    return spans(x.shape[0], max(least, rows_in_budget(x, width)))
