"""The shape classes of the tokens' kernels, and what is worth trying in each.

A class is a dtype and a part: what a kernel is given beside its rows.  Blocks are 8 to 32 rows of
256 to 1024 bytes: whole lines of L2, and enough of them under way at once.
Every candidate compiles without spills for sm_80, sm_90 and sm_100 (bench/aot.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..common.launch import FLOATS, ROWS, Trial, configs, dtype_name, random, variant
from ..common.tuning import Variant

# (BLOCK_R, BLOCK_D, warps, stages) for 16-bit numbers; the first is the safe one.
MOVES = [(16, 256, 4, 2), (8, 512, 4, 2)]
SUMS = [(8, 128, 4, 2), (8, 256, 8, 2)]
TRIAL = (256, 196, 768)  # sequences, places, features; a quarter of the places is visible

# What a part is not given.  Sizes and strides are taken to be divisible by 16, features adjacent.
GATHER = {
    "rows": {"OWNERS": None, "TOKEN": None, "POS": None},
    "restore": {"OWNERS": None},
    "packed": {"TOKEN": None, "POS": None},
}
RESTORE = {"restore": {}}
SCATTER = {"rows": {}, "table": {}}
ADJACENT = {"s_d": 1, "g_d": 1, "x_d": 1}
TYPES = dict.fromkeys("SOURCE TOKEN POS OUT G VISIBLE X".split(), ROWS)
TYPES |= {"IDS": "*i64:16", "ORDER": "*i64:16", "STARTS": "*i64:16", "OWNERS": "*i32:16"}
TYPES |= dict.fromkeys("R n D limit s_b s_r B L K g_b g_r start_b x_b x_r".split(), "i32:16")
TYPES |= {"share": "i32", "TOKENS": "*fp32:16"}


def shape_class(x: Tensor, part: str) -> str:
    """The name of the class.

    >>> shape_class(torch.empty(0, dtype=torch.bfloat16), "rows")
    'bfloat16-rows'
    """
    return f"{dtype_name(x)}-{part}"


def variants(
    fn: Any, parts: Mapping[str, Mapping[str, Any]], table: Any, trial: Trial
) -> dict[str, Variant]:
    """The classes of a kernel with these parts."""
    classes = {}
    for dtype, (part, absent) in product(FLOATS, parts.items()):
        name, types = f"{dtype}-{part}", dict(TYPES)
        if "G" in fn.arg_names:
            types["POS"] = types["TOKENS"]
        if part == "table":
            types["OUT"] = types["TOKENS"]
        # Half as many columns of 32 bits, so that a block's row has as many bytes.
        sizes = [(r, d // 2 if dtype == "float32" else d, *rest) for r, d, *rest in table]
        candidates, run = configs("BLOCK_R BLOCK_D", sizes), partial(trial, dtype, part)
        classes[name] = variant(name, fn, types, {**absent, **ADJACENT}, candidates, run)
    return classes


def trial_tokens(dtype: str, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Tokens (B, L, D), each sequence's places in random order (B, L), and how many are visible."""
    B, L, D = TRIAL
    x = random(device, B, L, D).to(getattr(torch, dtype))
    return x, random(device, B, L, seed=1).argsort(1), max(1, L // 4)
