"""The classes of the kernels of nested prefixes, and what to try in each.

A class is a dtype, exact float32 being the one whose products are given, and whether the sums are
of rows and columns or, as a rank's of gathered keys, of rows alone.  All are compiled with a rule
on ids: without one they cost less.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch

from ..common.launch import ROWS, configs, launcher, named, random, variant
from ..common.tuning import Config, Variant
from .lse_configs import MASKED
from .masks import exclude_self
from .nested_rows import Nested, Rows

# (BLOCK_M, BLOCK_N, BLOCK_D, warps, stages).  The first is the safe one: its shared memory fits in
# 99 KB, all that a consumer GPU has.
SUMMARIZE = [(64, 64, 64, 8, 3), (64, 64, 32, 8, 4), (128, 64, 64, 8, 3), (128, 64, 32, 8, 4)]
WEIGH = [(64, 64, 64, 8, 3), (64, 64, 64, 8, 4)]
TABLES = {"pairwise_nested_summarize": SUMMARIZE, "pairwise_nested_weigh": WEIGH}
GIVEN = [(32, 32, 16, 4, 1), (64, 64, 16, 4, 1), (32, 128, 16, 4, 1)]  # with products at hand
GATHER = [(32, 128, 4, 1), (64, 64, 8, 1), (16, 256, 4, 1), (64, 128, 8, 1)]
DTYPES = ("bfloat16", "float16", "tf32", "float32")
SIDES = ("both", "rows")
TRIAL_ROWS, DIMS = 8192, (64, 128, 256, 768)

TYPES = named("i32:16", "i0 j0 R C M N x_row y_row") | named("*i64:16", "X_IDS Y_IDS")
TYPES |= named("*fp32:16", "S A_X A_Y B_X B_Y X_SIDE Y_SIDE SCALE FP16_SCALE ROWS COLS")
TYPES |= named(ROWS, "X Y W")

Launch = Callable[..., Any]


def tile_variants(kernel: str, fn: Any, launch: Launch) -> dict[str, Variant]:
    """The classes of a kernel that makes products.  launch: (nested, both sides) -> tensors."""
    variants = {}
    for dtype, sides in product(DTYPES, SIDES):
        name, table = f"{dtype}-{sides}", GIVEN if dtype == "float32" else TABLES[kernel]
        ends = tuple(range(len(DIMS) + 1)) if dtype == "float32" else (0, *DIMS)
        fixed: dict[str, Any] = {**MASKED, "ENDS": ends, "HALF": False}
        fixed |= {"PRECISION": "tf32" if dtype == "tf32" else "ieee", "ONE_SIDED": sides == "rows"}
        absent = [] if dtype == "float16" else ["FP16_SCALE"]
        absent += [] if dtype == "float32" else ["S"]
        absent += ["COLS"] if sides == "rows" and "ONE_SIDED" not in fn.arg_names else []
        candidates = configs("BLOCK_M BLOCK_N BLOCK_D", _of_bits(table, dtype))
        trial = partial(_try, kernel, launch, dtype, sides)
        constants = fixed | dict.fromkeys(absent)
        given = variant(name, fn, TYPES, constants, candidates, trial, dtype != "float32")
        variants[name] = given
    return variants


def gather_variants(kernel: str, fn: Any, launch: Launch) -> dict[str, Variant]:
    """The classes of the sums of weights over prefixes."""
    variants, candidates = {}, configs("BLOCK_M BLOCK_N", GATHER)
    for dtype in ("bfloat16", "float16", "float32"):
        trial = partial(_try, kernel, launch, dtype, "both")
        variants[dtype] = variant(dtype, fn, TYPES, {"P": len(DIMS)}, candidates, trial)
    return variants


def _of_bits(table: list[tuple[int, ...]], dtype: str) -> list[tuple[int, ...]]:
    """Half as many features of 32 bits at a time."""
    return [(m, n, d // 2, *rest) for m, n, d, *rest in table] if dtype == "tf32" else table


def _try(
    kernel: str, launch: Launch, dtype: str, sides: str, config: Config, device: torch.device
) -> Launch:
    """Of a block of unit rows and ids that are positions, in each dtype's own precision."""
    q, k = random(dtype, device, 2, TRIAL_ROWS, DIMS[-1], unit=True)
    mask = exclude_self(torch.arange(TRIAL_ROWS, device=device))
    scale = torch.full((), 10.0, device=device)
    nested = Nested(Rows(q, DIMS, True), Rows(k, DIMS, True), scale, *mask.ids(), mask.key, False)
    return launcher(kernel, config, launch, nested, sides == "both")
