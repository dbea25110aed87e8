"""The shape classes that the kernels of pairs share: a dtype, a width of rows, and a part.

16-bit inputs come in classes of D.  Up to 256 features a tile holds them all (FITS_BLOCK), so that
a tile of y is read once for both products of the backward; above, and in 32 bits, D goes by
chunks.  float32 is "tf32" where torch allows that.
Every candidate compiles without spills for sm_80, sm_90 and sm_100, or for the one of them that it
is for (bench/aot.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..common.gpu import gpu_of, on_gpu
from ..common.launch import Trial, configs, dtype_name, variant
from ..common.matmul import allows_tf32
from ..common.tuning import Config, Kernel, Variant, config_for

WIDTHS = {"D64": 64, "D128": 128, "D256": 256}  # the FITS_BLOCK classes: the most features, BLOCK_D
CHUNKS = {"long": (64, 256), "float32": (16, 128), "tf32": (32, 128)}  # BLOCK_D, BLOCK_O
ARCHS = ("sm_90", "sm_100")  # that have candidates of their own
CLASSES = [*product(("bfloat16", "float16"), (*WIDTHS, "long"))]
CLASSES += [("tf32", "tf32"), ("float32", "float32")]  # 32 bits come in one width

Choice = tuple[str, Config]  # of a class by name, and of the configuration in it
# (BLOCK_M, BLOCK_N, warps, stages) of a width, "D128", and more for one GPU, "D128 sm_90".
Table = Mapping[str, list[tuple[int, ...]]]


# Which schedule a pass takes: tiles up to so many features, products above.  "rows": forward of one
# side; "sides": forward of both, or of a tensor with itself, where the products have half the work
# that the tiles have; "grads": the backward.
# From others' measurements on Hopper: above 256 a program can no longer keep a row of gradient in
# registers.  Reckoned for an H200, to be measured (bench/results/2026-11-30-reckoned-sm_90): its
# tiles of 128 x 256 take rows alone through 512 features in less time than scores go through
# memory.  Exact float32 has no matrix instructions: reckoned from its machine code, Triton's
# products have a third to a half of cuBLAS's speed.
STEPS = {"rows": 256, "sides": 256, "grads": 256}
STEPS_ON = {"sm_90": {"rows": 512}}  # of 16 bits
EXACT_UP_TO = 31


def schedule(x: Tensor, step: str) -> str:
    """Triton's schedule for a step of rows like x: "tiles" or "products"."""
    arch = gpu_of(x.device).arch if on_gpu(x.device) else ""
    limits = STEPS | (STEPS_ON.get(arch, {}) if x.dtype != torch.float32 else {})
    limit = EXACT_UP_TO if dtype_class(x) == "float32" else limits[step]
    return "products" if x.shape[1] > limit else "tiles"


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


def candidates(
    table: Table, width: str, row: Callable[..., tuple[int, ...]], names: str
) -> tuple[Config, ...]:
    """Those of a width: for any GPU, then for one.  row: the sizes by `names` of a table's row."""
    found = configs(names, [row(*sizes) for sizes in table[width]])
    for arch in ARCHS:
        tiles = table.get(f"{width} {arch}", [])
        found += configs(names, [row(*sizes) for sizes in tiles], arch)
    return found


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
        names = " ".join(["BLOCK_M BLOCK_N", *sizes])
        row = lambda m, n, *rest, s=sizes: (m, n, *s.values(), *rest)  # noqa: E731
        tried = candidates(table, width, row, names)
        fixed = {"FITS_BLOCK": width in WIDTHS, "PRECISION": "tf32" if dtype == "tf32" else "ieee"}
        D = WIDTHS.get(width, 1024 if width == "long" else 128)
        run, products = partial(trial, name, part, D), dtype != "float32"
        fixed |= constants(dtype, part)
        variants[name] = variant(name, fn, types, fixed, tried, run, products)
    return variants
