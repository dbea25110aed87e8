"""The shape classes of the pairwise log-sum-exp kernels, and what is worth trying in each.

16-bit inputs come in classes of D.  Up to 256 features a tile holds them all (FITS_BLOCK), so
that a tile of y is read once for both products of the backward; above, and in 32 bits, D goes by
chunks.
The forward has a class with a mask and one without, the backward one for the sides it takes.
Every candidate compiles without spills for sm_80, sm_90 and sm_100 (bench/aot.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common.tuning import Config, Variant
from . import masks_triton
from .lse_torch import Pairs, weights
from .masks import Masks, exclude_self

# (BLOCK_M, BLOCK_N, warps, stages).  The first is the safe one: its shared memory fits in 99 KB,
# all that a consumer GPU has, and its registers do for "full", which tries no other.
FORWARD = {
    "D128": [(64, 64, 4, 3), (128, 64, 4, 2), (128, 64, 8, 3), (128, 128, 4, 2), (128, 128, 8, 2)],
    "D64": [(64, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 4, 2), (128, 128, 8, 3)],
    "D256": [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3), (64, 128, 4, 3)],
    "long": [(64, 64, 4, 3), (64, 128, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3)],
    "float32": [(64, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3)],
    "tf32": [(64, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3)],
}
BACKWARD = {
    "D128": [(64, 64, 4, 2), (64, 32, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3)],
    "D64": [(64, 64, 4, 3), (64, 32, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3)],
    "D256": [(64, 32, 8, 2), (64, 32, 8, 3), (64, 64, 8, 2)],
    "long": [(64, 64, 8, 2), (64, 64, 8, 3), (128, 32, 8, 3)],
    "float32": [(64, 16, 4, 2), (32, 32, 4, 2)],
    "tf32": [(64, 32, 8, 2), (64, 64, 8, 2)],
}
WIDTHS = {"D64": 64, "D128": 128, "D256": 256}  # the FITS_BLOCK classes: the most features, BLOCK_D
CHUNKS = {"long": (64, 256), "float32": (16, 128), "tf32": (32, 128)}  # BLOCK_D, BLOCK_O
TRITON = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "tf32": "fp32"}
CLASSES = [(dtype, width) for dtype in ("bfloat16", "float16") for width in (*FORWARD,)[:4]]
CLASSES += [("tf32", ""), ("float32", "")]
SIDES = {"both": (True, True), "rows": (True, False), "cols": (False, True)}  # ROWS, COLS
TRIAL_ROWS = 16384

# What each class is compiled with beside its dtype and width.  A launch goes to the class that is
# nearest to it: "full" has a rule on ids, a bias and a scale for each row, "both" is one tensor
# with itself, "rows" and "cols" are one side of two tensors, and "full" both sides of them.
FORWARD_PARTS = ("masked", "all", "full")
BACKWARD_PARTS = ("both", "rows", "cols", "full")
MASKED = {"RULES": (masks_triton.exclude_self,), "PLACES": (0,)}
PLAIN = {"RULES": (), "PLACES": (), "X_IDS": None, "Y_IDS": None}

# "x" stands for the inputs' type.  Sizes and strides are taken to be divisible by 16.
SIZES = {key: "i32:16" for key in ("M", "N", "D", "x_row", "y_row")}
FLOATS = ("SCALE", "BIAS", "STATS", "X_SIDE", "Y_SIDE", "FP16_SCALE", "OUT", "SUMS")
TYPES = {"X": "x", "Y": "x", "X_IDS": "*i64:16", "Y_IDS": "*i64:16", **SIZES}
TYPES |= {key: "*fp32:16" for key in FLOATS}
FORWARD_NAMES = ("X", "Y", "SCALE", "BIAS", "X_IDS", "Y_IDS", "STATS", *SIZES)
BACKWARD_NAMES = (*FORWARD_NAMES[:6], "X_SIDE", "Y_SIDE", "FP16_SCALE", "OUT", "SUMS", *SIZES)

Launch = Callable[..., Any]


def shape_class(x: Tensor, part: str) -> str:
    """The name of x's class; part: one of FORWARD_PARTS or BACKWARD_PARTS.

    float32 is "tf32" where torch.set_float32_matmul_precision allows that.

    >>> shape_class(torch.empty(2, 100, dtype=torch.bfloat16), "both")
    'bfloat16-D128-both'
    """
    if x.dtype == torch.float32:
        exact = torch.get_float32_matmul_precision() == "highest"
        return _name("float32" if exact else "tf32", "", part)
    width = next((name for name, most in WIDTHS.items() if x.shape[1] <= most), "long")
    return _name(str(x.dtype).removeprefix("torch."), width, part)


def forward_variants(launch: Launch) -> dict[str, Variant]:
    """The classes of the forward.  launch: (pairs, transposed, (name, config))."""
    variants = {}
    for dtype, width in CLASSES:
        for part in FORWARD_PARTS:
            name = _name(dtype, width, part)
            trial = partial(_try_forward, launch, name)
            constants = _constants(dtype, width, part)
            variants[name] = _variant(name, FORWARD_NAMES, constants, FORWARD, trial)
    return variants


def backward_variants(launch: Launch, forward: Launch) -> dict[str, Variant]:
    """The classes of the backward.

    launch: (pairs, sides, transposed, sums, (name, config)).  forward: that of the forward.
    """
    variants = {}
    for dtype, width in CLASSES:
        for part in BACKWARD_PARTS:
            name, constants = _name(dtype, width, part), _constants(dtype, width, part)
            absent = {"rows": ["Y_SIDE"], "cols": ["X_SIDE"]}.get(part, [])
            absent += [] if part == "full" else ["SUMS"]
            absent += [] if dtype == "float16" else ["FP16_SCALE"]
            constants |= dict.fromkeys(absent)
            trial = partial(_try_backward, launch, forward, name)
            variants[name] = _variant(name, BACKWARD_NAMES, constants, BACKWARD, trial)
    return variants


def _name(dtype: str, width: str, part: str) -> str:
    return "-".join(filter(None, (dtype, width, part)))


def _constants(dtype: str, width: str, part: str) -> dict[str, Any]:
    constants = {"FITS_BLOCK": width in WIDTHS, "PRECISION": "tf32" if dtype == "tf32" else "ieee"}
    constants["VECTOR"], constants["TRANSPOSED"] = part == "full", part in ("cols", "full")
    constants |= MASKED if part in ("masked", "both", "full") else PLAIN
    return constants if part == "full" else {**constants, "BIAS": None}


def _variant(
    name: str, arguments: tuple[str, ...], constants: dict[str, Any], table: dict, trial: Launch
) -> Variant:
    dtype, width = name.split("-")[0], name.split("-")[-2]  # without a width, the dtype again
    d, o = CHUNKS.get(width) or (WIDTHS[width], WIDTHS[width])
    chunks = {"BLOCK_D": d} if table is FORWARD else {"BLOCK_D": d, "BLOCK_O": o}
    configs = tuple(
        Config({"BLOCK_M": m, "BLOCK_N": n, **chunks}, warps, stages)
        for m, n, warps, stages in table[width][: 1 if name.endswith("full") else None]
    )
    signature = {
        key: TYPES[key].replace("x", f"*{TRITON[dtype]}:16")
        for key in arguments
        if key not in constants
    }
    return Variant(name, signature, constants, dtype != "float32", configs, configs[0], trial)


def _pairs(name: str, device: torch.device) -> Pairs:
    """Unit rows and ids that are positions, the same at each call."""
    dtype, part = name.split("-")[0], name.split("-")[-1]
    width = name.split("-")[-2]
    D = WIDTHS.get(width, 1024 if width == "long" else 128)
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(2, TRIAL_ROWS, D, generator=generator, device=device)
    q, k = torch.nn.functional.normalize(x, dim=2).to(getattr(torch, dtype, torch.float32))
    scale, bias, mask = torch.full((), 10.0, device=device), None, Masks()
    if part in ("masked", "both", "full"):
        mask = exclude_self(torch.arange(len(q), device=device))
    if part == "full":
        scale, bias = scale.expand(len(q)).contiguous(), x.new_zeros(len(k))
    same = part in ("masked", "both")
    return Pairs(q, q if same else k, scale, bias, *mask.ids(), mask.key, same)


def _try_forward(launch: Launch, name: str, config: Config, device: torch.device) -> Launch:
    pairs, transposed = _pairs(name, device), name.endswith("full")
    return lambda: launch(pairs, transposed, (name, config))


def _try_backward(
    launch: Launch, forward: Launch, name: str, config: Config, device: torch.device
) -> Launch:
    pairs, part = _pairs(name, device), name.split("-")[-1]
    grad = torch.full((), 1 / TRIAL_ROWS, device=device).expand(TRIAL_ROWS)
    rows = weights(forward(pairs), grad) if part != "cols" else None
    cols = {"both": rows, "rows": None}.get(part, rows)
    if part in ("cols", "full"):
        cols = weights(forward(pairs, True), grad)
    transposed = part in ("cols", "full")
    made = lambda: launch(pairs, [rows, cols], transposed, part == "full", (name, config))  # noqa: E731
    return lambda: [x for x in made() if x is not None]
