"""The shape classes of the pairwise log-sum-exp kernels, and what is worth trying in each.

16-bit inputs come in classes of D.  Up to 256 features a tile holds them all (WHOLE), so that a
tile of y is read once for both products of the backward; above, and in 32 bits, D goes by chunks.
The forward has a class with a mask and one without, the backward one for the sides it takes.
Every candidate compiles without spills for sm_80, sm_90 and sm_100 (bench/aot.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._tuning import Config, Variant

# (BLOCK_M, BLOCK_N, warps, stages).  The first is the safe one: its shared memory fits in 99 KB,
# all that a consumer GPU has.
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
    "D256": [(64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 8, 2)],
    "long": [(64, 64, 8, 2), (64, 64, 8, 3), (128, 32, 8, 3)],
    "float32": [(64, 16, 4, 2), (64, 32, 8, 2)],
    "tf32": [(64, 32, 8, 2), (64, 64, 8, 2)],
}
WIDTHS = {"D64": 64, "D128": 128, "D256": 256}  # the WHOLE classes: the most features, BLOCK_D
CHUNKS = {"long": (64, 256), "float32": (16, 128), "tf32": (32, 128)}  # BLOCK_D, BLOCK_O
TRITON = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "tf32": "fp32"}
CLASSES = [(dtype, width) for dtype in ("bfloat16", "float16") for width in (*FORWARD,)[:4]]
CLASSES += [("tf32", ""), ("float32", "")]
SIDES = {"both": (True, True), "rows": (True, False), "cols": (False, True)}  # ROWS, COLS
TRIAL_ROWS = 16384

# "x" stands for the inputs' type.  Sizes and strides are taken to be divisible by 16, and ids to
# be given: positions, which the trials have, cost less.
SIZES = {"M": "i32:16", "N": "i32:16", "D": "i32:16"}
FORWARD_TYPES = {
    **{"Q": "x", "K": "x", "SCALE": "*fp32:16", "ROW_IDS": "*i64:16", "COL_IDS": "*i64:16"},
    **{"LSE": "*fp32:16", "STATS": "*fp32:16", **SIZES, "q_row": "i32:16", "k_row": "i32:16"},
}
BACKWARD_TYPES = {
    **{"X": "x", "Y": "x", "SCALE": "*fp32:16", "X_IDS": "*i64:16", "Y_IDS": "*i64:16"},
    **{"MAXIMA": "*fp32:16", "WEIGHTS": "*fp32:16", "UNIT": "*fp32:16", "OUT": "x"},
    **{**SIZES, "x_row": "i32:16", "y_row": "i32:16"},
}

Launch = Callable[..., Any]


def shape_class(x: Tensor, part: str) -> str:
    """The name of x's class; part: "masked", "all" (forward), "both", "rows", "cols" (backward).

    float32 is "tf32" where torch.set_float32_matmul_precision allows that.

    >>> shape_class(torch.empty(2, 100, dtype=torch.bfloat16), "both")
    'bfloat16-D128-both'
    """
    if x.dtype == torch.float32:
        exact = torch.get_float32_matmul_precision() == "highest"
        return _name("float32" if exact else "tf32", "", part)
    width = next((name for name, most in WIDTHS.items() if x.shape[1] <= most), "long")
    return _name(str(x.dtype).removeprefix("torch."), width, part)


def forward_variants(mask: Any, launch: Launch) -> dict[str, Variant]:
    """The classes of the forward.

    mask: the Triton mask to compile with.  launch: (q, k, scale, ids, mask, (name, config)).
    """
    found = {}
    for dtype, width in CLASSES:
        for part, keep in (("masked", mask), ("all", None)):
            name = _name(dtype, width, part)
            constants = {**_constants(dtype, width), "MASK": keep}
            trial = partial(_try_forward, launch, name, keep)
            found[name] = _variant(name, FORWARD_TYPES, constants, FORWARD, trial)
    return found


def backward_variants(mask: Any, launch: Launch, forward: Launch) -> dict[str, Variant]:
    """The classes of the backward: both sides with a mask, either side alone without.

    launch: (pair, scale, stats, grad, mask, wide, (name, config)).  forward: that of the forward.
    """
    found = {}
    for dtype, width in CLASSES:
        for part, (rows, cols) in SIDES.items():
            name, keep = _name(dtype, width, part), mask if part == "both" else None
            constants = {**_constants(dtype, width), "MASK": keep, "ROWS": rows, "COLS": cols}
            constants["SCALED"] = True
            if not cols or dtype != "float16":
                constants["UNIT"] = None
            trial = partial(_try_backward, launch, forward, name, keep)
            found[name] = _variant(name, BACKWARD_TYPES, constants, BACKWARD, trial)
    return found


def _name(dtype: str, width: str, part: str) -> str:
    return "-".join(filter(None, (dtype, width, part)))


def _constants(dtype: str, width: str) -> dict[str, Any]:
    return {"WHOLE": width in WIDTHS, "PRECISION": "tf32" if dtype == "tf32" else "ieee"}


def _variant(
    name: str, types: dict[str, str], constants: dict[str, Any], table: dict, trial: Launch
) -> Variant:
    dtype, width = name.split("-")[0], name.split("-")[-2]  # without a width, the dtype again
    d, o = CHUNKS.get(width) or (WIDTHS[width], WIDTHS[width])
    chunks = {"BLOCK_D": d} if table is FORWARD else {"BLOCK_D": d, "BLOCK_O": o}
    configs = tuple(
        Config({"BLOCK_M": m, "BLOCK_N": n, **chunks}, warps, stages)
        for m, n, warps, stages in table[width]
    )
    signature = {
        key: kind.replace("x", f"*{TRITON[dtype]}:16")
        for key, kind in types.items()
        if key not in constants
    }
    return Variant(name, signature, constants, dtype != "float32", configs, configs[0], trial)


def _inputs(name: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """q, k of unit rows, a scale and the ids (positions), the same at each call."""
    dtype, width = name.split("-")[0], name.split("-")[-2]
    D = WIDTHS.get(width, 1024 if width == "long" else 128)
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(2, TRIAL_ROWS, D, generator=generator, device=device)
    q, k = torch.nn.functional.normalize(x, dim=2).to(getattr(torch, dtype, torch.float32))
    return q, k, torch.full((), 10.0, device=device), []


def _try_forward(
    launch: Launch, name: str, mask: Any, config: Config, device: torch.device
) -> Launch:
    inputs = _inputs(name, device)
    return lambda: launch(*inputs, mask, (name, config))


def _try_backward(
    launch: Launch, forward: Launch, name: str, mask: Any, config: Config, device: torch.device
) -> Launch:
    q, k, scale, ids = _inputs(name, device)
    k = q if name.endswith("both") else k
    _, stats = forward(q, k, scale, ids, mask)
    grad = torch.full((), 1 / len(q), device=device).expand(len(q))
    return lambda: launch([q, k, *ids], scale, stats, grad, mask, False, (name, config))
