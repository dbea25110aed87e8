"""The shape classes of the top-n kernel, and what is worth trying in each.

A class is the inputs' type and how many places a row has in registers (SLOTS): the n asked for, or
the next more.  16-bit inputs of at most 128 or 256 features (WIDTH) are classes of their own, where
a BLOCK_D as wide has a program keep its rows and read columns alone; elsewhere D goes by chunks of
BLOCK_D.  The safe one goes by chunks everywhere: Triton 3.6 has no kept rows on sm_100.
Every candidate compiles without spills for sm_80, sm_90 and sm_100 (bench/aot.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common.launch import ROWS, configs, named, random, variant
from ..common.tuning import Config, Variant
from .classes import dtype_class
from .masks import TritonRules

SLOTS = {"n16": 16, "n64": 64, "n256": 256}
MOST = 256  # the largest n
MOST_FEATURES = 1 << 30  # which no block holds

# (BLOCK_M, BLOCK_N, BLOCK_D, warps, stages).  The first is the safe one: its shared memory fits in
# 99 KB, all that a consumer GPU has.
HALF = {
    "n16": [(64, 64, 64, 4, 3), (64, 64, 32, 4, 4), (64, 128, 64, 8, 3), (128, 64, 64, 8, 3)],
    "n64": [(64, 64, 64, 4, 3), (64, 64, 32, 4, 4), (128, 64, 64, 8, 3)],
    "n256": [(32, 64, 64, 8, 3), (32, 64, 64, 4, 3), (32, 128, 64, 8, 3)],
}
# With a BLOCK_D of all features a program keeps its rows: a column's bytes are read once for them.
HELD = {
    "D128-n16": [HALF["n16"][0], (128, 64, 128, 8, 3)],
    "D128-n64": [HALF["n64"][0], (128, 64, 128, 8, 3)],
    "D128-n256": [HALF["n256"][0], (32, 64, 128, 8, 3)],
    "D256-n16": [HALF["n16"][0], (128, 64, 256, 8, 2)],
    "D256-n64": [HALF["n64"][0], (128, 32, 256, 8, 2)],
    "D256-n256": [HALF["n256"][0], (32, 64, 256, 8, 2)],
}
FULL = {
    "n16": [(64, 64, 16, 4, 2), (64, 32, 16, 4, 2), (128, 64, 16, 8, 3)],
    "n64": [(64, 64, 16, 8, 2), (32, 64, 32, 4, 2)],
    "n256": [(32, 64, 16, 8, 2), (32, 32, 32, 8, 2)],
}
TF32 = {
    "n16": [(64, 64, 32, 4, 3), (128, 64, 32, 8, 3)],
    "n64": [(64, 64, 32, 4, 3), (128, 64, 32, 8, 3)],
    "n256": [(32, 64, 32, 8, 3), (32, 64, 32, 4, 3)],
}
TABLES = {"bfloat16": HALF | HELD, "float16": HALF | HELD, "tf32": TF32, "float32": FULL}
TRIAL = (8192, 65_536)  # M, N

# Sizes and strides are taken to be divisible by 16, and ids to be given: positions cost less.
TYPES = named("i32:16", "M N D share q_row k_row") | named("i32", "n")
TYPES |= named("*i64:16", "ROW_IDS COL_IDS KEYS") | named(ROWS, "Q K")

Launch = Callable[..., Any]


def shape_class(q: Tensor, n: int) -> str:
    """The name of the class: float32 is "tf32" where torch allows it.

    >>> shape_class(torch.empty(2, 3, dtype=torch.bfloat16), 20)
    'bfloat16-D128-n64'
    """
    slots = next(name for name, slots in SLOTS.items() if n <= slots)
    if q.dtype == torch.float32 or q.shape[1] > 256:
        return f"{dtype_class(q)}-{slots}"
    return f"{dtype_class(q)}-D{128 if q.shape[1] <= 128 else 256}-{slots}"


def variants(fn: Any, rule: Any, launch: Launch) -> dict[str, Variant]:
    """The classes.  rule: the Triton rule to compile with.  launch: that of topk_triton.topk."""
    classes = {}
    parts = ((dtype, *part) for dtype, table in TABLES.items() for part in table.items())
    for dtype, part, table in parts:
        name, candidates = f"{dtype}-{part}", configs("BLOCK_M BLOCK_N BLOCK_D", table)
        constants = {"RULES": TritonRules([rule]), "PLACES": (0,)}
        constants["WIDTH"] = int(part.split("-")[0][1:]) if part in HELD else MOST_FEATURES
        constants["SLOTS"] = SLOTS[part.rpartition("-")[2]]
        constants["PRECISION"] = "tf32" if dtype == "tf32" else "ieee"
        trial, product = partial(_try, launch, name), dtype != "float32"
        classes[name] = variant(name, fn, TYPES, constants, candidates, trial, product)
    return classes


def _try(launch: Launch, name: str, config: Config, device: torch.device) -> Launch:
    """The scores of unit rows' neighbors; of near equals two configurations may pick another."""
    dtype, *widths, slots = name.split("-")
    M, N = TRIAL
    D = int(widths[0][1:]) if widths else 128 if "32" in dtype else 1024
    x = random(dtype, device, M + N, D, unit=True)
    arguments = x[:M], x[M:], SLOTS[slots], None, None, ""
    return lambda: launch(*arguments, (name, config))[0]
