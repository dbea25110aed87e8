"""The classes of the pairwise log-sum-exp kernels beside dtype and width, and what to try in each.

The forward has a class with a mask and one without, the backward one for the sides it takes.  A
launch goes to the class that is nearest to it: "full" has a rule on ids, a bias and a scale for
each row, "both" is one tensor with itself, "rows" and "cols" are one side of two tensors, and
"full" both sides of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..common.launch import ROWS, named, random
from ..common.tuning import Config, Variant
from . import masks_triton
from .classes import Table, tile_variants
from .lse_torch import Pairs, weights
from .masks import Masks, TritonRules, exclude_self

# (BLOCK_M, BLOCK_N, warps, stages).  The first is the safe one: its shared memory fits in 99 KB,
# all that a consumer GPU has, and its registers do for "full", which tries no other for any GPU.
FORWARD = {
    "D128": [(64, 64, 4, 3), (128, 64, 4, 2), (128, 64, 8, 3), (128, 128, 8, 2)],
    "D64": [(64, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 4, 2), (128, 128, 8, 3)],
    "D256": [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3), (64, 128, 4, 3)],
    "long": [(64, 64, 4, 3), (64, 128, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3)],
    "float32": [(64, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3)],
    "tf32": [(64, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3)],
    "D128 sm_90": [(128, 128, 4, 2), (256, 128, 8, 2)],
    "D128 sm_100": [(128, 128, 4, 2)],
    "D64 sm_90": [(256, 128, 8, 3)],
    "D256 sm_90": [(128, 128, 8, 2), (256, 64, 8, 2)],
    "long sm_90": [(128, 256, 8, 3), (128, 256, 8, 4)],
    "tf32 sm_90": [(128, 256, 8, 3)],
}
BACKWARD = {
    "D128": [(64, 64, 4, 2), (64, 32, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3)],
    "D64": [(64, 64, 4, 3), (64, 32, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3)],
    "D256": [(64, 32, 8, 2), (64, 32, 8, 3), (64, 64, 8, 2)],
    "long": [(64, 64, 8, 2), (64, 64, 8, 3), (128, 32, 8, 3)],
    "float32": [(64, 16, 4, 2), (32, 32, 4, 2)],
    "tf32": [(64, 32, 8, 2), (64, 64, 8, 2)],
    "D256 sm_90": [(128, 64, 8, 2)],
}
ONE_SIDE = {  # with weights of both sides these spill in one or the other of a launch's kernels
    "D128 sm_90": [(128, 128, 8, 2)],
    "D64 sm_90": [(128, 64, 4, 3), (128, 128, 8, 2)],
    "long sm_90": [(128, 64, 8, 2)],
    "tf32 sm_90": [(128, 64, 8, 2)],
}
BACKWARD_FULL = {
    "D128 sm_90": [(128, 64, 8, 2)],
    "D64 sm_90": [(128, 64, 8, 2)],
    "D256 sm_90": [(64, 64, 8, 2), (128, 64, 8, 2)],
    "tf32 sm_90": [(64, 64, 8, 2)],
}
TRIAL_ROWS = 16384

MASKED = {"RULES": TritonRules([masks_triton.exclude_self]), "PLACES": (0,), "UNEQUAL": (1,)}
PLAIN = {"RULES": TritonRules(), "PLACES": (), "UNEQUAL": (), "X_IDS": None, "Y_IDS": None}
PLAIN |= {"Y_LOW": None, "Y_HIGH": None}

# Sizes and strides are taken to be divisible by 16.
TYPES = named("i32:16", "M N D x_row y_row") | named("*i64:16", "X_IDS Y_IDS Y_LOW Y_HIGH")
TYPES |= named(ROWS, "X Y") | named(
    "*fp32:16", "SCALE BIAS STATS X_SIDE Y_SIDE Y_LEVEL LOW HIGH FP16_SCALE OUT SUMS"
)

Launch = Callable[..., Any]


def forward_variants(fn: Any, launch: Launch) -> dict[str, Variant]:
    """The classes of the forward.  launch: (pairs, transposed, (name, config))."""
    tables = {"masked": FORWARD, "all": FORWARD, "full": _safe(FORWARD)}
    return tile_variants(fn, TYPES, tables, _constants, partial(_try_forward, launch))


def backward_variants(fn: Any, launch: Launch, forward: Launch) -> dict[str, Variant]:
    """The classes of the backward.

    launch: (pairs, sides, transposed, sums, (name, config)).  forward: that of the forward.
    """
    tables: dict[str, Table] = dict.fromkeys(("rows", "cols"), BACKWARD | ONE_SIDE)
    tables |= {"both": BACKWARD, "full": _safe(BACKWARD) | BACKWARD_FULL}
    return tile_variants(fn, TYPES, tables, _constants, partial(_try_backward, launch, forward))


def _safe(table: Table) -> dict[str, list[tuple[int, ...]]]:
    return {width: configs[:1] for width, configs in table.items() if " " not in width}


def _constants(dtype: str, part: str) -> dict[str, Any]:
    absent = {"rows": ["Y_SIDE"], "cols": ["X_SIDE"]}.get(part, [])
    absent += ["Y_LEVEL", "LOW", "HIGH"] if absent else []
    absent += ["MOST"]
    absent += ["share"] if part == "full" else ["share", "BIAS", "SUMS"]
    absent += [] if dtype == "float16" else ["FP16_SCALE"]
    rules = MASKED if part in ("masked", "both", "full") else PLAIN
    flags = {"VECTOR": part == "full", "TRANSPOSED": part in ("cols", "full")}
    return dict.fromkeys(absent) | rules | flags


def _pairs(name: str, part: str, D: int, device: torch.device) -> Pairs:
    """Unit rows and ids that are positions."""
    q, k = random(name.split("-")[0], device, 2, TRIAL_ROWS, D, unit=True)
    scale, bias, mask = torch.full((), 10.0, device=device), None, Masks()
    if part in ("masked", "both", "full"):
        mask = exclude_self(torch.arange(len(q), device=device))
    if part == "full":
        scale, bias = scale.expand(len(q)).contiguous(), scale.new_zeros(len(k))
    same = part in ("masked", "both")
    return Pairs(q, q if same else k, scale, bias, *mask.ids(), mask.key, same)


def _try_forward(
    launch: Launch, name: str, part: str, D: int, config: Config, device: torch.device
) -> Launch:
    pairs = _pairs(name, part, D, device)
    return lambda: launch(pairs, part == "full", (name, config))


def _try_backward(
    launch: Launch, forward: Launch, name: str, part: str, D: int, config: Config,
    device: torch.device,
) -> Launch:  # fmt: skip
    pairs, transposed = _pairs(name, part, D, device), part in ("cols", "full")
    grad = torch.full((), 1 / TRIAL_ROWS, device=device).expand(TRIAL_ROWS)
    rows = weights(forward(pairs), grad) if part != "cols" else None
    cols = weights(forward(pairs, True), grad) if transposed else rows if part == "both" else None
    made = lambda: launch(pairs, [rows, cols], transposed, part == "full", (name, config))  # noqa: E731
    return lambda: [x for x in made() if x is not None]
