"""The shape classes of the correlation kernels, and what is worth trying in each.

Tiles are for 16 bits: "pair", the Grams of two tensors; "one", that of one; "columns", the
covariance of one.  The pass over products has a class for one and for two matrices, of general and
of symmetric ones ("mirror"); the gradient's last pass one for Grams ("rows", with a term from their
diagonal) and one for covariances ("across").
Every candidate compiles without spills for sm_80, sm_90 and sm_100 (bench/aot.py).
"""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.launch import FLOATS, ROWS, Trial, configs, dtype_name, random, variant
from ..common.tuning import Variant

# (BLOCK, BLOCK_K, CORNER, warps, stages): the first is the safe one, its shared memory fits in
# 99 KB, all that a consumer GPU has.
TILES = {
    "pair": [(64, 64, 64, 4, 3), (128, 64, 64, 8, 3), (128, 64, 128, 8, 3), (128, 32, 64, 8, 5)],
    "one": [(64, 64, 64, 4, 3), (128, 64, 64, 8, 3), (128, 64, 64, 8, 4), (128, 64, 128, 8, 3)],
    "columns": [(64, 64, 64, 4, 3), (128, 64, 64, 8, 3), (128, 64, 128, 8, 3)],
}
# (BLOCK_M, BLOCK_N, warps, stages)
SETTLE = [(64, 64, 8, 1), (32, 64, 4, 1), (32, 128, 8, 1), (64, 128, 8, 1)]
FINISH = [(4, 512, 4, 1), (8, 512, 8, 1), (2, 2048, 8, 1), (16, 128, 4, 1)]
SETTLED = ("one", "pair", "one-mirror", "pair-mirror")
FINISHED: dict[str, tuple[str, ...]] = {"rows": (), "across": ("DIAGONAL", "MINE")}  # not given

TRIAL_TILES = {"pair": (2048, 8192), "one": (2048, 8192), "columns": (8192, 4096)}  # rows, features
TRIAL_STRIP = (2048, 4096)  # of a matrix, and of a gradient

# Sizes and strides are taken to be divisible by 16.
SCALES = ("FP16_SCALE", "A_SCALE", "B_SCALE")
TYPES = dict.fromkeys("M N K L R C D i0 j0 shift a_row b_row mine_row other_row".split(), "i32:16")
TYPES |= dict.fromkeys("A_DIAGONAL B_DIAGONAL PARTS S T P DIAGONAL COEF FACTOR".split(), "*fp32:16")
TYPES |= dict.fromkeys(SCALES, "*fp32:16") | dict.fromkeys("A B MINE OTHER OUT".split(), ROWS)
TYPES |= {"A_OUT": ROWS, "B_OUT": ROWS}
B_SIDE = ("B", "T", "B_OUT", "B_DIAGONAL", "B_SCALE")


class Terms(NamedTuple):
    """What a gradient has beside its product; gram_torch.gradient says what they are."""

    mine: Tensor | None
    other: Tensor | None
    coef: Tensor | None
    factor: Tensor


def shape_class(x: Tensor, part: str) -> str:
    """The name of x's class; part: one of TILES or SETTLED, or "rows" or "across".

    >>> shape_class(torch.empty(2, 3, dtype=torch.bfloat16), "pair")
    'bfloat16-pair'
    """
    return f"{dtype_name(x)}-{part}"


def tile_variants(fn: Any, trial: Trial) -> dict[str, Variant]:
    """The classes of the tiles; trial: of a dtype, a part, a configuration and a device."""
    return {
        f"{dtype}-{part}": _variant(
            fn, dtype, part, {"COLUMNS": part == "columns", "PRECISION": "ieee"},
            () if part == "pair" else B_SIDE, "BLOCK BLOCK_K CORNER", table, trial, True,
        )
        for dtype, (part, table) in product(FLOATS[:2], TILES.items())
    }  # fmt: skip


def settle_variants(fn: Any, trial: Trial) -> dict[str, Variant]:
    """The classes of the pass over products."""
    return {
        f"{dtype}-{part}": _variant(
            fn, dtype, part, {"PART": "upper" if part.endswith("mirror") else "any"},
            () if "pair" in part else B_SIDE, "BLOCK_M BLOCK_N", SETTLE, trial,
        )
        for dtype, part in product(FLOATS, SETTLED)
    }  # fmt: skip


def finish_variants(fn: Any, trial: Trial) -> dict[str, Variant]:
    """The classes of the gradient's last pass."""
    return {
        f"{dtype}-{part}": _variant(fn, dtype, part, {}, absent, "BLOCK_M BLOCK_N", FINISH, trial)
        for dtype, (part, absent) in product(FLOATS, FINISHED.items())
    }


def _variant(
    fn: Any, dtype: str, part: str, constants: dict[str, Any], absent: tuple[str, ...],
    blocks: str, table: Any, trial: Trial, product: bool = False,
) -> Variant:  # fmt: skip
    scales = () if dtype == "float16" else SCALES
    constants = constants | dict.fromkeys((*absent, *scales))
    candidates, trial = configs(blocks, table), partial(trial, dtype, part)
    return variant(f"{dtype}-{part}", fn, TYPES, constants, candidates, trial, product)


def trial_rows(dtype: str, device: torch.device, *shape: int) -> list[Tensor]:
    """Several matrices (N, D) of unit rows."""
    return list(
        torch.nn.functional.normalize(random(device, *shape), dim=2).to(getattr(torch, dtype))
    )
