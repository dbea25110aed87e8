"""The shape classes of the column statistics' kernels, and what is worth trying in each.

A class is a dtype and a part: "N256" and so on, where one block holds as many rows and all of them,
in registers; "whole", where a program measures and applies but goes over its rows twice; and a
part for each phase that is a launch of its own.
A row of a block is 32 bytes or more: what HBM and L2 move at least.  STAGES loads are under way at
once, in a loop of blocks; held rows are loaded at once.
Every candidate compiles without spills for sm_80, sm_90 and sm_100 (bench/aot.py).
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ..common.launch import ROWS, Part, configs, dtype_name, named, random
from ..common.rows import EVEN

# (BLOCK_N, BLOCK_D, warps, STAGES) for 16-bit numbers; the first is the safe one.
LOOPS = [(128, 32, 8, 4), (64, 32, 4, 4), (256, 32, 16, 3), (128, 64, 16, 3), (256, 16, 8, 4)]
TILES = [(32, 128, 4, 2), (16, 256, 4, 2), (64, 128, 8, 2), (32, 256, 8, 3), (64, 64, 4, 3)]
HELD = {
    "N256": [(256, 32, 8, 1), (256, 16, 4, 1), (256, 32, 4, 1), (256, 64, 8, 1)],
    "N512": [(512, 16, 4, 1), (512, 16, 8, 1), (512, 32, 16, 1)],
    "N1024": [(1024, 16, 8, 1), (1024, 16, 16, 1), (1024, 32, 16, 1)],
    "N2048": [(2048, 16, 8, 1), (2048, 16, 16, 1)],
}
BOTH_HELD = {  # two tensors' rows
    "N256": [(256, 32, 8, 1), (256, 16, 4, 1), (256, 32, 4, 1)],
    "N512": [(512, 16, 8, 1), (512, 32, 16, 1), (512, 16, 4, 1)],
    "N1024": [(1024, 16, 16, 1), (1024, 16, 8, 1)],
}
FORWARD = HELD | {"whole": LOOPS, "measure": LOOPS, "apply": TILES, "affine": TILES}
BACKWARD = BOTH_HELD | {"whole": LOOPS, "sums": LOOPS, "apply": TILES}
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
TYPES = named("*fp32:16", "PARTS SHIFT REST SCALE OFFSET SUMS INV_STD G_MEAN G_OUT")
TYPES |= named("i32:16", "N D z_row g_row out_row share") | named("fp32", "eps divisor")
TYPES |= named(ROWS, "Z OUT G DZ")
TRIAL = (4096, 8192)  # rows, but of held ones as many as are held; columns


def parts(tables: dict[str, list[tuple[int, int, int, int]]]) -> dict[str, Part]:
    """The parts of the forward or the backward kernel."""
    made = {}
    for name, table in tables.items():
        measure, apply = PHASES.get(name, (True, True))
        flags = {"MEASURE": measure, "APPLY": apply, "HELD": name in HELD}
        sizes = [(rows, columns, stages, warps, stages) for rows, columns, warps, stages in table]
        candidates = configs("BLOCK_N BLOCK_D STAGES", sizes)
        made[name] = Part(dict.fromkeys(ABSENT.get(name, BOTH)) | flags, candidates)
    return made


JOIN = Part(
    {"ROOT": True},
    configs("BLOCK_P BLOCK_D", [(16, 64, 4, 1), (16, 128, 4, 1), (32, 32, 4, 1)]),
    {"OUT": "*fp32:16", "P": "i32"},
)


def shape_class(classes: Collection[str], x: Tensor, part: str) -> str:
    """The name of the class; "whole" becomes that of held rows, where they fit.

    More than 256 rows that no wide load divides would spill, loaded number by number (Triton 3.6).

    >>> shape_class(["float32-N256", "float32-whole"], torch.empty(100, 3), "whole")
    'float32-N256'
    """
    dtype = dtype_name(x)
    if part == "whole":
        most = 2048 if x.stride(0) % EVEN == 0 else 256
        held = (n for n in HELD if int(n[1:]) <= most)
        fits = (n for n in held if len(x) <= int(n[1:]) and f"{dtype}-{n}" in classes)
        part = next(fits, part)
    return f"{dtype}-{part}"


def trial_rows(dtype: str, part: str, device: torch.device, tensors: int = 1) -> list[Tensor]:
    """(N, D) of a deviation of 1 about a mean of 3."""
    N, D = TRIAL
    N = min(N, int(part[1:])) if part in HELD else N
    return list(random(dtype, device, tensors, N, D) + 3)
