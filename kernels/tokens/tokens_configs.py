"""The shape classes of the tokens' kernels, and what is worth trying in each.

A class is a dtype and a part: what a kernel is given beside its rows.  Blocks are 8 to 32 rows of
256 to 1024 bytes: whole lines of L2, and enough of them under way at once.
Every candidate compiles without spills for sm_80, sm_90 and sm_100 (bench/aot.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.launch import ROWS, Part, configs, dtype_name, named, random

# (BLOCK_R, BLOCK_D, warps, stages) for 16-bit numbers; the first is the safe one.
MOVES = configs("BLOCK_R BLOCK_D", [(16, 256, 4, 2), (8, 512, 4, 2)])
SUMS = configs("BLOCK_R BLOCK_D", [(8, 128, 8, 2), (8, 64, 4, 2), (8, 256, 8, 2)])
PAIRS = configs("BLOCK_R BLOCK_D", [(8, 128, 4, 2), (8, 64, 4, 2), (8, 256, 8, 2)])
TRIAL = (256, 196, 768)  # sequences, places, features; a quarter of the places is visible

# Sizes and strides are taken to be divisible by 16, features adjacent.
TYPES = named("i32:16", "R n D limit s_b s_r B L K g_b g_r start_b x_b x_r") | named("i32", "share")
TYPES |= named("*i64:16", "IDS ORDER STARTS") | named("*i32:16", "OWNERS")
TYPES |= named("*fp32:16", "TOKENS") | named(ROWS, "SOURCE TOKEN POS OUT G VISIBLE X")
ADJACENT = {"s_d": 1, "g_d": 1, "x_d": 1}
GATHER = {
    "rows": Part({**ADJACENT, "OWNERS": None, "TOKEN": None, "POS": None}, MOVES),
    "restore": Part({**ADJACENT, "OWNERS": None}, MOVES),
    "packed": Part({**ADJACENT, "TOKEN": None, "POS": None}, MOVES),
}
RESTORE = {"restore": Part(ADJACENT, PAIRS, {"POS": "*fp32:16"})}
SCATTER = {"rows": Part(ADJACENT, SUMS), "table": Part(ADJACENT, SUMS, {"OUT": "*fp32:16"})}


def shape_class(x: Tensor, part: str) -> str:
    """The name of the class.

    >>> shape_class(torch.empty(0, dtype=torch.bfloat16), "rows")
    'bfloat16-rows'
    """
    return f"{dtype_name(x)}-{part}"


def trial_tokens(dtype: str, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Tokens (B, L, D), each sequence's places in random order (B, L), and how many are visible."""
    B, L, D = TRIAL
    order = random("float32", device, B, L, seed=1).argsort(1)
    return random(dtype, device, B, L, D), order, max(1, L // 4)
