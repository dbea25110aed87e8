"""The shape classes of the top-n kernel, and what is worth trying in each.

A class is the inputs' type and how many places a row has in registers (SLOTS): the n asked for, or
the next more.  D goes by chunks of BLOCK_D whatever its size.
Every candidate compiles without spills for sm_80, sm_90 and sm_100 (bench/aot.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common.tuning import Config, Variant

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
TRITON = {"bfloat16": "*bf16:16", "float16": "*fp16:16", "float32": "*fp32:16", "tf32": "*fp32:16"}
TRIAL = (8192, 65_536, 128)  # M, N, D

# Sizes and strides are taken to be divisible by 16, and ids to be given: positions cost less.
SIGNATURE = {
    **{"ROW_IDS": "*i64:16", "COL_IDS": "*i64:16", "KEYS": "*i64:16", "M": "i32:16"},
    **{"N": "i32:16", "D": "i32:16", "n": "i32", "share": "i32:16"},
    **{"q_row": "i32:16", "k_row": "i32:16"},
}

Launch = Callable[..., Any]


def shape_class(q: Tensor, n: int) -> str:
    """The name of the class: float32 is "tf32" where torch.set_float32_matmul_precision allows it.

    >>> shape_class(torch.empty(2, 3, dtype=torch.bfloat16), 20)
    'bfloat16-n64'
    """
    dtype = str(q.dtype).removeprefix("torch.")
    if dtype == "float32" and torch.get_float32_matmul_precision() != "highest":
        dtype = "tf32"
    return f"{dtype}-{next(name for name, slots in SLOTS.items() if n <= slots)}"


def variants(rule: Any, launch: Launch) -> dict[str, Variant]:
    """The classes.  rule: the Triton rule to compile with.  launch: that of topk_triton.topk."""
    return {
        (name := f"{dtype}-{width}"): _variant(name, rule, launch)
        for dtype in TABLES
        for width in SLOTS
    }


def _variant(name: str, rule: Any, launch: Launch) -> Variant:
    dtype, width = name.split("-")
    configs = tuple(
        Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": d}, warps, stages)
        for m, n, d, warps, stages in TABLES[dtype][width]
    )
    constants = {
        **{"RULES": (rule,), "PLACES": (0,), "SLOTS": SLOTS[width]},
        **{"PRECISION": "tf32" if dtype == "tf32" else "ieee"},
    }
    signature = {"Q": TRITON[dtype], "K": TRITON[dtype], **SIGNATURE}
    trial = partial(_try, launch, name)
    return Variant(name, signature, constants, dtype != "float32", configs, configs[0], trial)


def _try(launch: Launch, name: str, config: Config, device: torch.device) -> Launch:
    """The scores of unit rows' neighbors; of near equals two configurations may pick another."""
    dtype, width = name.split("-")
    (M, N, D), generator = TRIAL, torch.Generator(device).manual_seed(0)
    x = torch.randn(M + N, D, generator=generator, device=device)
    x = torch.nn.functional.normalize(x).to(getattr(torch, dtype, torch.float32))
    arguments = x[:M], x[M:], SLOTS[width], None, None, ""
    return lambda: launch(*arguments, (name, config))[0]
