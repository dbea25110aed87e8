"""The shape classes of the patches' kernels, and what is worth trying in each.

A class is what is read and written, and a part.  "float32" and "bfloat16" are images and results of
32 and of 16 bits, "uint8-float32" and "uint8-bfloat16" bytes read and those written; images and
results of other widths take the class of the images'.  Parts by a patch's values: "P64" to "P4096"
are held in registers, "long" is not; what needs no moments is "narrow", "wide" or "long".
A warp for a patch has nothing to wait for: its sums stay in it, and where a patch ends is known to
the compiler.  Candidates of two warps have half as many registers.
Every candidate compiles without spills for sm_80, sm_90 and sm_100 (bench/aot.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..common.launch import POINTERS, Trial, named, random, variant
from ..common.tuning import Config, Variant

# (BLOCK_N, BLOCK_P, STEPS, warps); the first is the safe one.
MOVES = {
    "narrow": [(16, 64, 4, 4)],
    "wide": [(1, 1024, 4, 1), (1, 1024, 4, 2)],
    "long": [(1, 512, 4, 1), (1, 1024, 4, 2)],
}
SPREAD = {"narrow": [(16, 64, 1, 4)], "wide": [(4, 256, 1, 4)], "long": [(4, 256, 1, 4)]}
HELD = {
    "P64": [(16, 64, 4, 4)],
    "P256": [(1, 256, 8, 1), (4, 256, 4, 2)],
    "P1024": [(1, 1024, 4, 1), (1, 1024, 4, 2)],
    "P4096": [(1, 4096, 4, 8)],
}
LONG = {"long": [(1, 2048, 1, 8)]}
SIDES = {"narrow": 4, "wide": 16, "P64": 4, "P256": 8, "P1024": 16, "P4096": 32, "long": 56}
LOOKED_AT = 64  # ids at a time
BLOCKS = ("BLOCK_N", "BLOCK_P", "STEPS", "BLOCK_K")

READ = {"float32": "float32", "bfloat16": "bfloat16", "uint8-float32": "uint8"}
READ |= {"uint8-bfloat16": "uint8"}
TRIAL = (128, 224)  # images, pixels a side: three channels

# What is adjacent; other sizes and strides are taken to be divisible by 16, or named here.
CONSTANTS = {"s_w": 1, "p_p": 1, "g_p": 1, "C": 3, "PT": 1, "WIDE": False, "KIND": 0}
CONSTANTS |= {"NORM_PIX": True, "NORM": None, "FLAT": True}
TYPES = named("i32:16", "N P s_b s_c s_t s_h g_b g_k p_b p_k") | named("i32", "gh gw K L")
TYPES |= named("*fp32:16", "NORM LOSS STATS") | {"IDS": "*i64:16", "eps": "fp32"}


def shape_class(images: torch.dtype, result: torch.dtype, part: str) -> str:
    """The name of the class.

    >>> shape_class(torch.uint8, torch.float16, "wide")
    'uint8-bfloat16-wide'
    """
    width = "float32" if result.itemsize == 4 else "bfloat16"
    if images == torch.uint8:
        return f"uint8-{width}-{part}"
    return f"{'float32' if images.itemsize == 4 else 'bfloat16'}-{part}"


def moved(P: int) -> str:
    """The part of kernels that only move P values a patch."""
    return "narrow" if P <= 64 else "wide" if P <= 1024 else "long"


def measured(P: int) -> str:
    """The part of a kernel that measures P values a patch.

    >>> measured(768), measured(5000)
    ('P1024', 'long')
    """
    return next((part for part in HELD if int(part[1:]) >= P), "long")


def variants(fn: Any, parts: Mapping[str, Any], trial: Trial) -> dict[str, Variant]:
    """The classes of a kernel with these parts."""
    classes, names = {}, fn.arg_names
    for (dtypes, read), (part, table) in product(READ.items(), parts.items()):
        if read == "uint8" and "IMAGES" not in names:
            continue
        name, side, result = f"{dtypes}-{part}", SIDES[part], POINTERS[dtypes.rpartition("-")[2]]
        types = TYPES | dict.fromkeys(("PRED", "D_PRED", "OUT", "G"), result)
        types["IMAGES"] = POINTERS[read]
        if "PRED" in names:  # G is the loss's
            types["G"] = POINTERS["float32"]
        constants, run = CONSTANTS | {"PH": side, "PW": side}, partial(trial, dtypes, part)
        candidates = tuple(
            Config({name: size for name, size in known.items() if name in names}, warps, 1)
            for *sizes, warps in table
            for known in [dict(zip(BLOCKS, (*sizes, LOOKED_AT), strict=True))]
        )
        classes[name] = variant(name, fn, types, constants, candidates, run)
    return classes


def trial_images(dtypes: str, part: str, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Images, three quarters of their patches, and a patch's side; the same at each call."""
    B, S = TRIAL
    side = min(SIDES[part], S)
    images = 255 * random("float32", device, B, 3, S, S).sigmoid()
    order = random("float32", device, B, (S // side) ** 2, seed=1).argsort(1)
    ids = order[:, : max(1, 3 * order.shape[1] // 4)].contiguous()
    return images.to(getattr(torch, READ[dtypes])), ids, side
