"""The shape classes of the correlation kernels, and what is worth trying in each.

Tiles are for 16 bits: "pair", the Grams of two tensors; "one", that of one; "columns", the
covariance of one.  The pass over products has a class for one and for two matrices, of general and
of symmetric ones ("mirror"); the gradient's last pass one for Grams ("rows", with a term from their
diagonal) and one for covariances ("across").
Every candidate compiles without spills for sm_80, sm_90 and sm_100 (bench/aot.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.tuning import Config, Variant
from .gram_torch import Matrix

# (BLOCK, BLOCK_K, CORNER, warps, stages): the first is the safe one, its shared memory fits in
# 99 KB, all that a consumer GPU has.
TILES = {
    "pair": [(64, 64, 64, 4, 3), (128, 64, 64, 8, 3), (128, 64, 128, 8, 3), (128, 32, 64, 8, 5)],
    "one": [(64, 64, 64, 4, 3), (128, 64, 64, 8, 3), (128, 64, 64, 8, 4), (128, 64, 128, 8, 3)],
    "columns": [(64, 64, 64, 4, 3), (128, 64, 64, 8, 3), (128, 64, 128, 8, 3)],
}
SETTLE = [(64, 64, 8), (32, 64, 4), (32, 128, 8), (64, 128, 8)]  # BLOCK_M, BLOCK_N, warps
FINISH = [(4, 512, 4), (8, 512, 8), (2, 2048, 8), (16, 128, 4)]
TRITON = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
SETTLED = ("one", "pair", "one-mirror", "pair-mirror")

TRIAL_TILES = {"pair": (2048, 8192), "one": (2048, 8192), "columns": (8192, 4096)}  # rows, features
TRIAL_STRIP = (2048, 4096)  # of a matrix, and of a gradient

# "x" stands for the inputs' type.  Sizes and strides are taken to be divisible by 16.
SIZES = ("M", "N", "K", "L", "R", "C", "D", "i0", "j0", "shift")
SIZES += ("a_row", "b_row", "mine_row", "other_row")
TYPES: dict[str, str] = dict.fromkeys(SIZES, "i32:16")
TYPES |= dict.fromkeys(("A", "B", "A_OUT", "B_OUT", "MINE", "OTHER", "OUT"), "x")
FLOATS = ("A_DIAGONAL", "A_SCALE", "B_DIAGONAL", "B_SCALE", "PARTS", "S", "T")
FLOATS += ("P", "FP16_SCALE", "DIAGONAL", "COEF", "FACTOR")
TYPES |= dict.fromkeys(FLOATS, "*fp32:16")
B_SIDE = ("B", "T", "B_OUT", "B_DIAGONAL", "B_SCALE")

Launch = Callable[..., Any]


class Terms(NamedTuple):
    """What a gradient has beside its product; gram_torch.gradient says what they are."""

    mine: Tensor | None
    other: Tensor | None
    coef: Tensor | None
    factor: Tensor


def shape_class(x: Tensor, part: str) -> str:
    """The name of x's class; part: one of TILES or SETTLED, or "rows" or "across".

    >>> shape_class(torch.empty(2, 3, dtype=torch.bfloat16), "pair")
    'bfloat16-pair'
    """
    return f"{str(x.dtype).removeprefix('torch.')}-{part}"


def tile_variants(fn: Any, launch: Launch) -> dict[str, Variant]:
    """launch: makes all of (sides, columns, choice)."""
    variants = {}
    for dtype in ("bfloat16", "float16"):
        for part, table in TILES.items():
            constants: dict[str, Any] = {"COLUMNS": part == "columns", "PRECISION": "ieee"}
            absent = [] if part == "pair" else B_SIDE
            name = f"{dtype}-{part}"
            configs = tuple(
                Config({"BLOCK": m, "BLOCK_K": k, "CORNER": corner}, warps, stages)
                for m, k, corner, warps, stages in table
            )
            trial = partial(_try_tiles, launch, name)
            variants[name] = _variant(fn, name, constants, absent, configs, trial, True)
    return variants


def settle_variants(fn: Any, launch: Launch) -> dict[str, Variant]:
    """launch: makes all of (strips, dtype, mirror, choice)."""
    variants = {}
    configs = tuple(Config({"BLOCK_M": m, "BLOCK_N": n}, warps, 1) for m, n, warps in SETTLE)
    for dtype in TRITON:
        for part in SETTLED:
            name, absent = f"{dtype}-{part}", () if "pair" in part else B_SIDE
            constants = {"PART": "upper" if part.endswith("mirror") else "any"}
            trial = partial(_try_settle, launch, name)
            variants[name] = _variant(fn, name, constants, absent, configs, trial, False)
    return variants


def finish_variants(fn: Any, launch: Launch) -> dict[str, Variant]:
    """launch: makes the gradient of (product, matrix, terms, choice)."""
    variants = {}
    configs = tuple(Config({"BLOCK_M": m, "BLOCK_N": n}, warps, 1) for m, n, warps in FINISH)
    for dtype in TRITON:
        for part, absent in (("rows", ()), ("across", ("DIAGONAL", "MINE"))):
            name = f"{dtype}-{part}"
            trial = partial(_try_finish, launch, name)
            variants[name] = _variant(fn, name, {}, absent, configs, trial, False)
    return variants


def _variant(
    fn: Any,
    name: str,
    constants: dict[str, Any],
    absent: Any,
    configs: tuple[Config, ...],
    trial: Any,
    product: bool,
) -> Variant:
    dtype, names = name.split("-")[0], fn.arg_names
    scales = () if dtype == "float16" else ("FP16_SCALE", "A_SCALE", "B_SCALE")
    constants = constants | {key: None for key in (*absent, *scales) if key in names}
    signature = {
        key: TYPES[key].replace("x", f"*{TRITON[dtype]}:16") if TYPES[key] == "x" else TYPES[key]
        for key in names
        if key not in constants and key not in configs[0].blocks
    }
    return Variant(name, signature, constants, product, configs, configs[0], trial)


def _rows(name: str, device: torch.device, *shapes: tuple[int, int]) -> list[Tensor]:
    """Unit rows, the same at each call."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, name.split("-")[0])
    rows = [torch.randn(shape, generator=generator, device=device) for shape in shapes]
    return [torch.nn.functional.normalize(x).to(dtype) for x in rows]


def _try_tiles(launch: Launch, name: str, config: Config, device: torch.device) -> Launch:
    part = name.split("-")[1]
    sides = _rows(name, device, *(TRIAL_TILES[part],) * (2 if part == "pair" else 1))
    return lambda: launch(sides, part == "columns", (name, config))


def _try_settle(launch: Launch, name: str, config: Config, device: torch.device) -> Launch:
    R, C = TRIAL_STRIP
    strips = _rows("float32", device, *((R, C),) * (2 if "pair" in name else 1))
    dtype, mirror = getattr(torch, name.split("-")[0]), name.endswith("mirror")
    return lambda: launch(strips, dtype, mirror, (name, config))


def _try_finish(launch: Launch, name: str, config: Config, device: torch.device) -> Launch:
    R, D = TRIAL_STRIP
    mine, other = _rows(name, device, (R, D), (R, D))
    (p,) = _rows("float32", device, (R, D))
    diagonal, coef = (torch.linspace(0.5, 1.5, n, device=device) for n in (R, D))
    one, rows = torch.ones((), device=device), name.endswith("rows")
    scale = one if name.startswith("float16") else None
    matrix = Matrix(mine, diagonal if rows else None, scale)
    terms = Terms(mine if rows else None, other, coef, one)
    return lambda: launch(p, matrix, terms, (name, config))
