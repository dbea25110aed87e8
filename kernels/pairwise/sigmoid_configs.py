"""The shape classes of the pairwise sigmoid kernels, and what is worth trying in each.

The tiles' classes are a dtype, a width and a pass.  16-bit inputs come in classes of D: up to 256
features a tile holds them all (FITS_BLOCK), so that a tile of y is read once for both products;
above, and in 32 bits, D goes by chunks.  The pass over products has a class for each dtype, with
and without gradients.  All are compiled with ids given: positions cost less.
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
from .masks import same_group
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
}
GRADS = {
    "D64": [(64, 64, 4, 3), (64, 64, 4, 2), (128, 64, 8, 2)],
    "D128": [(64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 3)],
    "D256": [(64, 32, 8, 2), (64, 32, 8, 3), (64, 64, 8, 2)],
    "long": [(64, 64, 8, 2), (64, 64, 8, 3), (64, 32, 8, 3)],
    "float32": [(64, 16, 4, 2), (32, 32, 4, 2)],
    "tf32": [(64, 32, 8, 2), (64, 64, 8, 2)],
}
WEIGH = [(32, 128, 4), (64, 64, 4), (16, 256, 4), (32, 256, 8), (64, 128, 8)]
WIDTHS = {"D64": 64, "D128": 128, "D256": 256}  # the FITS_BLOCK classes: the most features, BLOCK_D
CHUNKS = {"long": (64, 256), "float32": (16, 128), "tf32": (32, 128)}  # BLOCK_D, BLOCK_O
TRITON = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "tf32": "fp32"}
FP16_SCALES = {"float16": 2.0**15}  # what W is multiplied by before it is rounded; 1 elsewhere
PASSES = {
    "loss": {"TRANSPOSED": False, "TOTAL": True, "GRAD": False},
    "rows": {"TRANSPOSED": False, "TOTAL": True, "GRAD": True},
    "cols": {"TRANSPOSED": True, "TOTAL": False, "GRAD": True},
}
TRIAL_ROWS, TRIAL_BLOCK = 16384, (2048, 4096)

# "x" stands for the inputs' type.  Sizes, strides and offsets are taken to be divisible by 16.
RULES = {"RULES": (masks_triton.same_group,), "PLACES": (0,)}
SIZES = ("M", "N", "D", "x_row", "y_row", "i0", "j0", "R", "C")
TYPES: dict[str, str] = {**dict.fromkeys(SIZES, "i32:16"), "X": "x", "Y": "x", "W": "x"}
TYPES |= dict.fromkeys(("SCALE", "BIAS", "SUMS", "OUT", "P"), "*fp32:16")
TYPES |= dict.fromkeys(("X_IDS", "Y_IDS", "ROW_IDS", "COL_IDS"), "*i64:16")
TILE_NAMES = ("X", "Y", "SCALE", "BIAS", "X_IDS", "Y_IDS", "SUMS", "OUT", *SIZES[:5])
WEIGH_NAMES = ("P", "SCALE", "BIAS", "ROW_IDS", "COL_IDS", "W", "SUMS", *SIZES[5:], "M", "N")

Launch = Callable[..., Any]


def shape_class(x: Tensor, part: str) -> str:
    """The name of x's class; part: one of PASSES.

    float32 is "tf32" where torch.set_float32_matmul_precision allows that.

    >>> shape_class(torch.empty(2, 100, dtype=torch.bfloat16), "rows")
    'bfloat16-D128-rows'
    """
    if x.dtype == torch.float32:
        exact = torch.get_float32_matmul_precision() == "highest"
        return f"{'float32' if exact else 'tf32'}-{part}"
    width = next((name for name, most in WIDTHS.items() if x.shape[1] <= most), "long")
    return f"{str(x.dtype).removeprefix('torch.')}-{width}-{part}"


def tile_variants(launch: Launch) -> dict[str, Variant]:
    """The classes of the tiles.  launch: (logits, pass, (name, config)) -> tensors or None."""
    widths = [
        (f"{dtype}-", width) for dtype in FP16_SCALES | {"bfloat16": 1} for width in (*LOSS,)[:4]
    ]
    variants = {}
    for start, width in [*widths, ("", "tf32"), ("", "float32")]:
        d, o = CHUNKS.get(width) or (WIDTHS[width], WIDTHS[width])
        for part, passes in PASSES.items():
            name, table = f"{start}{width}-{part}", GRADS if passes["GRAD"] else LOSS
            dtype = name.split("-")[0]
            configs = tuple(
                Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": d, "BLOCK_O": o}, warps, stages)
                for m, n, warps, stages in table[width]
            )
            constants = {**RULES, **passes, "FP16_SCALE": FP16_SCALES.get(dtype, 1.0)}
            constants["FITS_BLOCK"] = width in WIDTHS
            constants["PRECISION"] = "tf32" if dtype == "tf32" else "ieee"
            constants |= {} if passes["GRAD"] else {"OUT": None}
            constants |= {} if passes["TOTAL"] else {"SUMS": None}
            types, trial = _types(TILE_NAMES, dtype, constants), partial(_try_tiles, launch, name)
            product = dtype != "float32"
            variants[name] = Variant(name, types, constants, product, configs, configs[0], trial)
    return variants


def weigh_variants(launch: Launch) -> dict[str, Variant]:
    """The classes of the pass over products.  launch: (p, logits, i, j, part, (name, config))."""
    configs = tuple(Config({"BLOCK_M": m, "BLOCK_N": n}, warps, 1) for m, n, warps in WEIGH)
    variants = {}
    for dtype in ("bfloat16", "float16", "float32"):
        for part in ("loss", "grad"):
            name = f"{dtype}-{part}"
            unit = FP16_SCALES.get(dtype, 1.0)
            constants = {**RULES, "GRAD": part == "grad", "FP16_SCALE": unit}
            stored = dtype if part == "grad" else "float32"
            types, trial = _types(WEIGH_NAMES, stored, constants), partial(_try_weigh, launch, name)
            variants[name] = Variant(name, types, constants, False, configs, configs[0], trial)
    return variants


def _types(names: tuple[str, ...], dtype: str, constants: dict[str, Any]) -> dict[str, str]:
    named = (name for name in names if name not in constants)
    return {name: TYPES[name].replace("x", f"*{TRITON[dtype]}:16") for name in named}


def _logits(dtype: str, D: int, device: torch.device) -> Logits:
    """Unit rows and ids that are positions, the same at each call."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(2, TRIAL_ROWS, D, generator=generator, device=device)
    q, k = torch.nn.functional.normalize(x, dim=2).to(getattr(torch, dtype, torch.float32))
    scale, bias = (torch.full((), value, device=device) for value in (10.0, -10.0))
    mask = same_group(torch.arange(TRIAL_ROWS, device=device))
    return Logits(q, k, scale, bias, *mask.ids(), mask.key)


def _try_tiles(launch: Launch, name: str, config: Config, device: torch.device) -> Launch:
    dtype, *width, part = name.split("-")
    D = WIDTHS.get(width[0], 1024) if width else 128
    logits = _logits(dtype, D, device)
    made = lambda: launch(logits, part, (name, config))  # noqa: E731
    return lambda: [x for x in made() if x is not None]


def _try_weigh(launch: Launch, name: str, config: Config, device: torch.device) -> Launch:
    dtype, part = name.split("-")
    logits, (R, C) = _logits(dtype, 64, device), TRIAL_BLOCK
    p = logits.q[:R].float() @ logits.k[:C].float().T
    # float32 products are overwritten: a copy each time.
    run = lambda: launch(p.clone(), logits, slice(0, R), slice(0, C), part, (name, config))  # noqa: E731
    return lambda: run()[: 2 if part == "grad" else 1]
