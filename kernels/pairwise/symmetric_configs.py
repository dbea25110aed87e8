"""The classes of the symmetric log-sum-exp's kernel, and what to try in each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..common.launch import ROWS, named, random, variant
from ..common.tuning import Config, Variant
from .classes import WIDTHS, candidates
from .lse_configs import MASKED
from .lse_torch import Pairs
from .masks import exclude_self

# (BLOCK, warps, stages) of square tiles.  The first is the safe one: its shared memory fits in
# 99 KB, all that a consumer GPU has.
TILES = {
    "D64": [(64, 4, 3), (128, 4, 2), (128, 8, 3)],
    "D128": [(64, 4, 3), (128, 4, 2), (128, 8, 2)],
    "D256": [(64, 8, 2), (64, 8, 3)],
    "D256 sm_90": [(128, 8, 2)],
}
MOST_FEATURES = max(WIDTHS.values())
TRIAL_ROWS = 32768

# Sizes and strides are taken to be divisible by 16.
TYPES = named("i32:16", "N D x_row") | named("i32", "first stop share")
TYPES |= named("*i64:16", "IDS LOW HIGH") | named("*fp32:16", "SCALE MOST ROWS COLS")
TYPES |= named(ROWS, "X")

Launch = Callable[..., Any]


def variants(fn: Any, launch: Launch) -> dict[str, Variant]:
    """The classes.  launch: (pairs, the most a score is, (name, config)) -> sums."""
    made, names = {}, "BLOCK_M BLOCK_N BLOCK_D"
    for dtype in ("bfloat16", "float16"):
        for width, features in WIDTHS.items():
            name = f"{dtype}-{width}-half"
            row = lambda block, *rest, d=features: (block, block, d, *rest)  # noqa: E731
            tried = candidates(TILES, width, row, names)
            constants = MASKED | {"PRECISION": "ieee"}
            trial = partial(_try, launch, name, features)
            made[name] = variant(name, fn, TYPES, constants, tried, trial, product=True)
    return made


def _try(launch: Launch, name: str, D: int, config: Config, device: torch.device) -> Launch:
    """Unit rows at a temperature of 0.1, each without itself."""
    x = random(name.split("-")[0], device, TRIAL_ROWS, D, unit=True)
    mask, scale = exclude_self(torch.arange(len(x), device=device)), x.new_tensor(10.0).float()
    pairs = Pairs(x, x, scale, None, *mask.ids(), mask.key, True)
    most = scale.clone()
    return lambda: launch(pairs, most, (name, config))
