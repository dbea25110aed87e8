"""The shape classes of the tokens' kernels, and what is worth trying in each.

A class is a dtype and a part: what a kernel is given beside its rows.  Blocks are 8 to 32 rows of
256 to 1024 bytes: whole lines of L2, and enough of them under way at once.
Every candidate compiles without spills for sm_80, sm_90 and sm_100 (bench/aot.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common.tuning import Config, Variant

# (BLOCK_R, BLOCK_D, warps, stages) for 16-bit numbers; the first is the safe one.
MOVES = [(16, 256, 4, 2), (8, 512, 4, 2)]
SUMS = [(8, 128, 4, 2), (8, 256, 8, 2)]
TRITON = {"bfloat16": "*bf16:16", "float16": "*fp16:16", "float32": "*fp32:16"}
TRIAL = (256, 196, 768)  # sequences, places, features; a quarter of the places is visible

# What a part is not given.  Sizes and strides are taken to be divisible by 16, features adjacent.
GATHER = {
    "rows": {"OWNERS": None, "TOKEN": None, "POS": None},
    "restore": {"OWNERS": None},
    "packed": {"TOKEN": None, "POS": None},
}
RESTORE = {"restore": {}}
SCATTER = {"rows": {}, "table": {}}
COLUMNS = ("s_d", "g_d", "x_d")
ROWS = ("SOURCE", "TOKEN", "POS", "OUT", "G", "VISIBLE", "X")
TYPES = {"IDS": "*i64:16", "ORDER": "*i64:16", "STARTS": "*i64:16", "OWNERS": "*i32:16"}
FLOATS = {"restore": ("TOKENS", "POS"), "table": ("OUT",)}  # float32 whatever the rows are

Trial = Callable[[str, str, Config, torch.device], Callable[[], Any]]  # of a dtype and a part


def shape_class(x: Tensor, part: str) -> str:
    """The name of the class.

    >>> shape_class(torch.empty(0, dtype=torch.bfloat16), "rows")
    'bfloat16-rows'
    """
    return f"{x.dtype}-{part}".removeprefix("torch.")


def variants(
    fn: Any, parts: Mapping[str, Mapping[str, Any]], table: Any, trial: Trial
) -> dict[str, Variant]:
    """The classes of a kernel with these parts."""
    classes = {}
    for dtype in TRITON:
        for part, absent in parts.items():
            name = f"{dtype}-{part}"
            constants = {**absent, **{c: 1 for c in COLUMNS if c in fn.arg_names}}
            named = [n for n in fn.arg_names if n not in constants and not n.startswith("BLOCK")]
            sums = FLOATS.get(part, ()) if "G" in fn.arg_names or part == "table" else ()
            types = {n: "*fp32:16" if n in sums else _type(n, dtype) for n in named}
            configs = tuple(_config(dtype, *sizes) for sizes in table)
            classes[name] = Variant(
                name, types, constants, False, configs, configs[0], partial(trial, dtype, part)
            )
    return classes


def _type(name: str, dtype: str) -> str:
    if name in ROWS:
        return TRITON[dtype]
    return TYPES.get(name, "i32:16" if name != "share" else "i32")


def _config(dtype: str, rows: int, columns: int, warps: int, stages: int) -> Config:
    """Half as many columns of 32 bits, so that a block's row has as many bytes."""
    columns = columns // 2 if dtype == "float32" else columns
    return Config({"BLOCK_R": rows, "BLOCK_D": columns}, warps, stages)


def trial_tokens(dtype: str, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Tokens (B, L, D), each sequence's places in a random order (B, L), and how many are visible.

    The same at each call.
    """
    B, L, D = TRIAL
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(B, L, D, generator=generator, device=device).to(getattr(torch, dtype))
    return x, torch.rand(B, L, generator=generator, device=device).argsort(1), max(1, L // 4)
