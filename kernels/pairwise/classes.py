"""The shape classes that the kernels of pairs share: a dtype, a width of rows, and a part.

16-bit inputs come in classes of D.  Up to 256 features a tile holds them all (FITS_BLOCK), so that
a tile of y is read once for both products of the backward; above, and in 32 bits, D goes by
chunks.  float32 is "tf32" where torch allows that.
Every candidate compiles without spills for sm_80, sm_90 and sm_100 (bench/aot.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..common.launch import Trial, configs, dtype_name, variant
from ..common.matmul import allows_tf32
from ..common.tuning import Config, Kernel, Variant, config_for

WIDTHS = {"D64": 64, "D128": 128, "D256": 256}  # the FITS_BLOCK classes: the most features, BLOCK_D
CHUNKS = {"long": (64, 256), "float32": (16, 128), "tf32": (32, 128)}  # BLOCK_D, BLOCK_O
CLASSES = [*product(("bfloat16", "float16"), (*WIDTHS, "long"))]
CLASSES += [("tf32", "tf32"), ("float32", "float32")]  # 32 bits come in one width

Choice = tuple[str, Config]  # of a class by name, and of the configuration in it
Table = Mapping[str, list[tuple[int, ...]]]  # of a width: (BLOCK_M, BLOCK_N, warps, stages)


# Features that fused tiles are for.  From others' measurements on Hopper: above, a program can no
# longer keep a row of gradient in registers.  Exact float32 has no matrix instructions: reckoned
# from its machine code, Triton's products have a third to a half of cuBLAS's speed.
FUSED_UP_TO, EXACT_UP_TO = 256, 31


def schedule(x: Tensor) -> str:
    """Triton's schedule for rows like x: "tiles" or "products"."""
    exact = dtype_class(x) == "float32"
    return "products" if x.shape[1] > (EXACT_UP_TO if exact else FUSED_UP_TO) else "tiles"


def dtype_class(x: Tensor) -> str:
    """The name of x's dtype, "tf32" where float32 may be multiplied so."""
    return "tf32" if x.dtype == torch.float32 and allows_tf32() else dtype_name(x)


def shape_class(x: Tensor, part: str) -> str:
    """The name of x's class, of one of the kernel's parts.

    >>> shape_class(torch.empty(2, 100, dtype=torch.bfloat16), "rows")
    'bfloat16-D128-rows'
    """
    width = next((name for name, most in WIDTHS.items() if x.shape[1] <= most), "long")
    return _name(dtype_class(x), dtype_class(x) if x.dtype == torch.float32 else width, part)


def choose(kernel: Kernel, x: Tensor, part: str) -> Choice:
    """The shape class of a launch and the configuration to make it with."""
    name = shape_class(x, part)
    return name, config_for(kernel, name, x.device)


def _name(dtype: str, width: str, part: str) -> str:
    return f"{dtype}-{part}" if width == dtype else f"{dtype}-{width}-{part}"


def tile_variants(
    fn: Any,
    types: Mapping[str, str],
    tables: Mapping[str, Table],
    constants: Callable[[str, str], dict[str, Any]],
    trial: Trial,
) -> dict[str, Variant]:
    """The classes of a kernel that keeps a tile of x and streams y.

    tables: of each part.  constants: of a dtype and a part.
    trial: of a class's name, part, features, configuration and device.
    """
    variants = {}
    for (dtype, width), (part, table) in product(CLASSES, tables.items()):
        name, (d, o) = _name(dtype, width, part), CHUNKS.get(width) or (WIDTHS[width],) * 2
        sizes = {"BLOCK_D": d, "BLOCK_O": o} if "BLOCK_O" in fn.arg_names else {"BLOCK_D": d}
        rows = [(*tile[:2], *sizes.values(), *tile[2:]) for tile in table[width]]
        candidates = configs(" ".join(["BLOCK_M BLOCK_N", *sizes]), rows)
        fixed = {"FITS_BLOCK": width in WIDTHS, "PRECISION": "tf32" if dtype == "tf32" else "ieee"}
        D = WIDTHS.get(width, 1024 if width == "long" else 128)
        run, products = partial(trial, name, part, D), dtype != "float32"
        fixed |= constants(dtype, part)
        variants[name] = variant(name, fn, types, fixed, candidates, run, products)
    return variants
