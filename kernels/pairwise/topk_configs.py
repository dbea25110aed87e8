"""The shape classes of the top-n kernel, and what is worth trying in each.

A class is the inputs' type and how many places a row has in registers (SLOTS): the n asked for, or
the next more.  D goes by chunks of BLOCK_D whatever its size.
Every candidate compiles without spills for sm_80, sm_90 and sm_100 (bench/aot.py).
"""

from __future__ import annotations

import itertools
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

# (BLOCK_M, BLOCK_N, BLOCK_D, warps, stages).  The first is the safe one: its shared memory fits in
# 99 KB, all that a consumer GPU has.
HALF = {
    "n16": [(64, 64, 64, 4, 3), (64, 64, 32, 4, 4), (64, 128, 64, 8, 3), (128, 64, 64, 8, 3)],
    "n64": [(64, 64, 64, 4, 3), (64, 64, 32, 4, 4), (128, 64, 64, 8, 3)],
    "n256": [(32, 64, 64, 8, 3), (32, 64, 64, 4, 3), (32, 128, 64, 8, 3)],
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
TABLES = {"bfloat16": HALF, "float16": HALF, "tf32": TF32, "float32": FULL}
TRIAL = (8192, 65_536, 128)  # M, N, D

# Sizes and strides are taken to be divisible by 16, and ids to be given: positions cost less.
TYPES = named("i32:16", "M N D share q_row k_row") | named("i32", "n")
TYPES |= named("*i64:16", "ROW_IDS COL_IDS KEYS") | named(ROWS, "Q K")

Launch = Callable[..., Any]


def shape_class(q: Tensor, n: int) -> str:
    """The name of the class: float32 is "tf32" where torch allows it.

    >>> shape_class(torch.empty(2, 3, dtype=torch.bfloat16), 20)
    'bfloat16-n64'
    """
    return f"{dtype_class(q)}-{next(name for name, slots in SLOTS.items() if n <= slots)}"


def variants(fn: Any, rule: Any, launch: Launch) -> dict[str, Variant]:
    """The classes.  rule: the Triton rule to compile with.  launch: that of topk_triton.topk."""
    classes = {}
    for dtype, (width, slots) in itertools.product(TABLES, SLOTS.items()):
        name, table = f"{dtype}-{width}", TABLES[dtype][width]
        candidates = configs("BLOCK_M BLOCK_N BLOCK_D", table)
        constants = {"RULES": TritonRules([rule]), "PLACES": (0,), "SLOTS": slots}
        constants["PRECISION"] = "tf32" if dtype == "tf32" else "ieee"
        trial, product = partial(_try, launch, name), dtype != "float32"
        classes[name] = variant(name, fn, TYPES, constants, candidates, trial, product)
    return classes


def _try(launch: Launch, name: str, config: Config, device: torch.device) -> Launch:
    """The scores of unit rows' neighbors; of near equals two configurations may pick another."""
    dtype, width = name.split("-")
    M, N, D = TRIAL
    x = random(dtype, device, M + N, D, unit=True)
    arguments = x[:M], x[M:], SLOTS[width], None, None, ""
    return lambda: launch(*arguments, (name, config))[0]
