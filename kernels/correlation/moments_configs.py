"""The shape classes of the column statistics' kernels, and what is worth trying in each.

A class is a dtype and a part: "N256" and so on, where one block holds as many rows and all of them,
in registers; "whole", where a program measures and applies but goes over its rows twice; and a
part for each phase that is a launch of its own.
A row of a block is 32 bytes or more: what HBM and L2 move at least.  STAGES loads are under way at
once, in a loop of blocks; held rows are loaded at once.
Every candidate compiles without spills for sm_80, sm_90 and sm_100 (bench/aot.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common.tuning import Config, Variant

# (BLOCK_N, BLOCK_D, warps, STAGES) for 16-bit numbers; the first is the safe one.
LOOPS = [(128, 32, 8, 4), (64, 32, 4, 4), (256, 32, 16, 3), (128, 64, 16, 3), (256, 16, 8, 4)]
TILES = [(32, 128, 4, 2), (16, 256, 4, 2), (64, 128, 8, 2), (32, 256, 8, 3), (64, 64, 4, 3)]
HELD = {
    "N256": [(256, 32, 8, 1), (256, 16, 4, 1), (256, 32, 4, 1), (256, 64, 8, 1)],
    "N512": [(512, 16, 8, 1), (512, 16, 4, 1), (512, 32, 16, 1)],
    "N1024": [(1024, 16, 16, 1), (1024, 16, 8, 1), (1024, 32, 16, 1)],
    "N2048": [(2048, 16, 16, 1), (2048, 16, 8, 1)],
}
BOTH_HELD = {  # two tensors' rows
    "N256": [(256, 32, 8, 1), (256, 16, 4, 1), (256, 32, 4, 1)],
    "N512": [(512, 16, 8, 1), (512, 32, 16, 1), (512, 16, 4, 1)],
    "N1024": [(1024, 16, 16, 1), (1024, 16, 8, 1)],
}
FORWARD = {**HELD, "whole": LOOPS, "measure": LOOPS, "apply": TILES, "affine": TILES}
BACKWARD = {**BOTH_HELD, "whole": LOOPS, "sums": LOOPS, "apply": TILES}
JOIN = [(16, 64, 4, 1), (16, 128, 4, 1), (32, 32, 4, 1)]
TRITON = {"bfloat16": "*bf16:16", "float16": "*fp16:16", "float32": "*fp32:16"}
PHASES = {"measure": (True, False), "sums": (True, False), "apply": (False, True)}
PHASES["affine"] = PHASES["apply"]

# What a part is not given; sizes and strides are taken to be divisible by 16.
ABSENT = {
    "measure": ("OUT", "SHIFT", "REST", "SCALE", "OFFSET"),
    "apply": ("PARTS", "OFFSET", "SUMS"),
    "affine": ("PARTS",),
    "sums": ("DZ", "INV_STD", "G_MEAN", "G_OUT"),
}
BOTH = ("PARTS", "SHIFT", "REST", "OFFSET", "SUMS", "G_MEAN", "G_OUT")
ROWS = ("Z", "OUT", "G", "DZ")
SIZES = ("N", "D", "z_row", "g_row", "out_row", "share")
TRIAL = (4096, 8192)  # rows, but of held ones as many as are held; columns

Trial = Callable[[str, str, Config, torch.device], Callable[[], Any]]  # of a dtype and a part


def shape_class(classes: Collection[str], x: Tensor, part: str) -> str:
    """The name of the class; "whole" becomes that of held rows, where they fit.

    >>> shape_class(["float32-N256", "float32-whole"], torch.empty(100, 3), "whole")
    'float32-N256'
    """
    dtype = str(x.dtype).removeprefix("torch.")
    if part == "whole":
        fits = (n for n in HELD if len(x) <= int(n[1:]) and f"{dtype}-{n}" in classes)
        part = next(fits, part)
    return f"{dtype}-{part}"


def variants(fn: Any, parts: Mapping[str, Any], trial: Trial) -> dict[str, Variant]:
    """The classes of the forward or the backward kernel, with these parts."""
    classes = {}
    for dtype in TRITON:
        for part, table in parts.items():
            name, phases = f"{dtype}-{part}", PHASES.get(part, (True, True))
            absent = [n for n in ABSENT.get(part, BOTH) if n in fn.arg_names]
            flags = {"MEASURE": phases[0], "APPLY": phases[1], "HELD": part in HELD}
            constants = {**dict.fromkeys(absent), **flags}
            blocks = ("BLOCK_N", "BLOCK_D", "STAGES")
            names = [n for n in fn.arg_names if n not in constants and n not in blocks]
            types = {n: _type(n, dtype) for n in names}
            configs = tuple(_config(dtype, *sizes) for sizes in table)
            classes[name] = Variant(
                name, types, constants, False, configs, configs[0], partial(trial, dtype, part)
            )
    return classes


def _config(dtype: str, rows: int, columns: int, warps: int, stages: int) -> Config:
    """Half as many columns of 32 bits, so that a block's row has as many bytes."""
    if dtype == "float32":
        columns //= 2
    return Config({"BLOCK_N": rows, "BLOCK_D": columns, "STAGES": stages}, warps, stages)


def _type(name: str, dtype: str) -> str:
    if name in SIZES:
        return "i32:16"
    if name in ROWS:
        return TRITON[dtype]
    return "fp32" if name in ("eps", "divisor") else "*fp32:16"


def join_variants(trial: Any) -> dict[str, Variant]:
    """The one class of `join`."""
    types = {"PARTS": "*fp32:16", "OUT": "*fp32:16", "P": "i32", "D": "i32:16"}
    types |= {"share": "i32:16", "N": "i32:16", "eps": "fp32", "divisor": "fp32"}
    configs = tuple(Config({"BLOCK_P": p, "BLOCK_D": d}, w, s) for p, d, w, s in JOIN)
    return {"join": Variant("join", types, {"ROOT": True}, False, configs, configs[0], trial)}


def trial_rows(dtype: str, part: str, device: torch.device, tensors: int = 1) -> list[Tensor]:
    """(N, D) of a deviation of 1 about a mean of 3, the same at each call."""
    N, D = TRIAL
    N = min(N, int(part[1:])) if part in HELD else N
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(tensors, N, D, generator=generator, device=device) + 3
    return list(x.to(getattr(torch, dtype)))
