"""The classes of the pairwise sigmoid kernels beside dtype and width, and what to try in each.

The tiles have one for each pass, the pass over products one with and one without gradients.  All
are compiled with ids given: positions cost less.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch

from ..common.launch import FLOATS, ROWS, configs, launcher, named, random, variant
from ..common.tuning import Config, Variant
from . import classes, masks_triton
from .masks import TritonRules, same_group
from .sigmoid_torch import Logits

# (BLOCK_M, BLOCK_N, warps, stages).  The first is the safe one: its shared memory fits in 99 KB,
# all that a consumer GPU has.
LOSS = {
    "D64": [(64, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3)],
    "D128": [(64, 64, 4, 3), (128, 64, 4, 2), (128, 64, 8, 3), (128, 128, 8, 2)],
    "D256": [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 3)],
    "long": [(64, 64, 4, 3), (64, 128, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3)],
    "float32": [(64, 64, 4, 2), (128, 64, 8, 2)],
    "tf32": [(64, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3)],
    "D256 sm_90": [(128, 128, 8, 2)],
}
GRADS = {
    "D64": [(64, 64, 4, 3), (64, 64, 4, 2), (128, 64, 8, 2)],
    "D128": [(64, 32, 4, 2), (64, 32, 4, 3)],
    "D256": [(64, 32, 8, 2), (64, 32, 8, 3), (64, 64, 8, 2)],
    "long": [(64, 64, 8, 2), (64, 64, 8, 3), (64, 32, 8, 3)],
    "float32": [(64, 16, 4, 2), (32, 32, 4, 2)],
    "tf32": [(64, 32, 8, 2), (64, 64, 8, 2)],
}
ROWS_ON = {"D128 sm_90": [(64, 64, 4, 2), (128, 64, 8, 2)]}
COLS_ON = ROWS_ON | {"D256 sm_90": [(128, 64, 8, 2)], "tf32 sm_90": [(128, 64, 8, 2)]}
TABLES = {"loss": LOSS, "rows": GRADS | ROWS_ON, "cols": GRADS | COLS_ON}
WEIGH = [(32, 128, 4, 1), (64, 64, 4, 1), (16, 256, 4, 1), (32, 256, 8, 1), (64, 128, 8, 1)]
FP16_SCALES = {"float16": 2.0**15}  # what W is multiplied by before it is rounded; 1 elsewhere
PASSES = {
    "loss": {"TRANSPOSED": False, "TOTAL": True, "GRAD": False},
    "rows": {"TRANSPOSED": False, "TOTAL": True, "GRAD": True},
    "cols": {"TRANSPOSED": True, "TOTAL": False, "GRAD": True},
}
TRIAL_ROWS, TRIAL_BLOCK = 16384, (2048, 4096)


# Sizes, strides and offsets are taken to be divisible by 16.
RULES = {"RULES": TritonRules([masks_triton.same_group]), "PLACES": (0,), "UNEQUAL": (0,)}
TYPES = named("i32:16", "M N D x_row y_row i0 j0 R C")
TYPES |= named("*fp32:16", "SCALE BIAS SUMS OUT P")
TYPES |= named("*i64:16", "X_IDS Y_IDS Y_LOW Y_HIGH ROW_IDS COL_IDS") | named(ROWS, "X Y W")

Launch = Callable[..., Any]


def tile_variants(fn: Any, launch: Launch) -> dict[str, Variant]:
    """The classes of the tiles.  launch: (logits, pass, (name, config)) -> tensors or None."""
    return classes.tile_variants(fn, TYPES, TABLES, _constants, partial(_try_tiles, launch))


def _constants(dtype: str, part: str) -> dict[str, Any]:
    passes = PASSES[part]
    constants = {**RULES, **passes, "share": None}
    constants["FP16_SCALE"] = FP16_SCALES.get(dtype, 1.0)
    absent = [] if passes["GRAD"] else ["OUT"]
    return constants | dict.fromkeys(absent if passes["TOTAL"] else ["SUMS"])


def weigh_variants(fn: Any, launch: Launch) -> dict[str, Variant]:
    """The classes of the pass over products.  launch: (p, logits, i, j, part)."""
    candidates, variants = configs("BLOCK_M BLOCK_N", WEIGH), {}
    for dtype, part in product(FLOATS, ("loss", "grad")):
        name, fp16_scale = f"{dtype}-{part}", FP16_SCALES.get(dtype, 1.0)
        constants = {**RULES, "GRAD": part == "grad", "FP16_SCALE": fp16_scale}
        types = TYPES if part == "grad" else TYPES | {"W": TYPES["P"]}
        trial = partial(_try_weigh, launch, dtype, part)
        variants[name] = variant(name, fn, types, constants, candidates, trial)
    return variants


def _logits(name: str, D: int, device: torch.device) -> Logits:
    """Unit rows and ids that are positions."""
    q, k = random(name.split("-")[0], device, 2, TRIAL_ROWS, D, unit=True)
    scale, bias = (torch.full((), value, device=device) for value in (10.0, -10.0))
    mask = same_group(torch.arange(TRIAL_ROWS, device=device))
    return Logits(q, k, scale, bias, *mask.ids(), mask.key)


def _try_tiles(
    launch: Launch, name: str, part: str, D: int, config: Config, device: torch.device
) -> Launch:
    logits = _logits(name, D, device)
    return lambda: [x for x in launch(logits, part, (name, config)) if x is not None]


def _try_weigh(
    launch: Launch, dtype: str, part: str, config: Config, device: torch.device
) -> Launch:
    logits, (R, C) = _logits(dtype, 64, device), TRIAL_BLOCK
    p = logits.q[:R].float() @ logits.k[:C].float().T
    # float32 products are overwritten: a copy each time.
    run = lambda: launch(p.clone(), logits, slice(0, R), slice(0, C), part)  # noqa: E731
    return launcher("pairwise_sigmoid_weigh", config, lambda: run()[: 2 if part == "grad" else 1])
