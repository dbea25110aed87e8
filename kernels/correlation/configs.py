"""The shape classes of the correlation kernels, and what is worth trying in each.

Tiles are for 16 bits: "pair", the Grams of two tensors; "one", that of one; "columns", the
covariance of one.  The pass over products has a class for one and for two matrices, of general and
of symmetric ones ("mirror"); the gradient's last pass one for Grams ("rows", with a term from their
diagonal) and one for covariances ("across").
Every candidate compiles without spills for sm_80, sm_90 and sm_100 (bench/aot.py).
"""

from __future__ import annotations

from typing import Any

import torch

from ..common.launch import ROWS, Part, configs, dtype_name, named

# Sizes and strides are taken to be divisible by 16.
TYPES = named("i32:16", "M N K L R C D i0 j0 shift a_row b_row mine_row other_row")
TYPES |= named("*fp32:16", "A_DIAGONAL A_SCALE B_DIAGONAL B_SCALE FP16_SCALE PARTS S T P")
TYPES |= named("*fp32:16", "DIAGONAL COEF FACTOR") | named(ROWS, "A B A_OUT B_OUT MINE OTHER OUT")
ONE = dict.fromkeys(("B", "T", "B_OUT", "B_DIAGONAL", "B_SCALE"))  # no second matrix

# Of each the first is the safe one: its shared memory fits in 99 KB, all that a consumer GPU has.
PAIR = [(64, 64, 64, 4, 3), (128, 64, 64, 8, 3), (128, 64, 128, 8, 3), (128, 32, 64, 8, 5)]
SELF = [(64, 64, 64, 4, 3), (128, 64, 64, 8, 3), (128, 64, 64, 8, 4), (128, 64, 128, 8, 3)]
COLUMNS = [(64, 64, 64, 4, 3), (128, 64, 64, 8, 3), (128, 64, 128, 8, 3)]
STRIPS = [(64, 64, 8, 1), (32, 64, 4, 1), (32, 128, 8, 1), (64, 128, 8, 1)]
WIDE = [(4, 512, 4, 1), (8, 512, 8, 1), (2, 2048, 8, 1), (16, 128, 4, 1)]


def _part(table: list[tuple[int, ...]], **constants: Any) -> Part:
    blocks = "BLOCK BLOCK_K CORNER" if len(table[0]) == 5 else "BLOCK_M BLOCK_N"
    return Part({**constants, "PRECISION": "ieee"}, configs(blocks, table))


TILES = {
    "pair": _part(PAIR, COLUMNS=False),
    "one": _part(SELF, COLUMNS=False, **ONE),
    "columns": _part(COLUMNS, COLUMNS=True, **ONE),
}
SETTLE = {
    "one": _part(STRIPS, PART="any", **ONE),
    "pair": _part(STRIPS, PART="any"),
    "one-mirror": _part(STRIPS, PART="upper", **ONE),
    "pair-mirror": _part(STRIPS, PART="upper"),
}
FINISH = {"rows": _part(WIDE), "across": _part(WIDE, DIAGONAL=None, MINE=None)}

TRIAL_TILES = {"pair": (2048, 8192), "one": (2048, 8192), "columns": (8192, 4096)}  # rows, features
TRIAL_STRIP = (2048, 4096)  # of a matrix, and of a gradient


def shape_class(x: torch.Tensor, part: str) -> str:
    """The name of x's class; part: one of TILES, SETTLE or FINISH.

    >>> shape_class(torch.empty(2, 3, dtype=torch.bfloat16), "pair")
    'bfloat16-pair'
    """
    return f"{dtype_name(x)}-{part}"
