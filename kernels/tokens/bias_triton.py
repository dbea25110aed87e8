"""The attention bias of visible tokens in Triton, by the functions that bias.py has in torch.

Backward: a program has a tile of one head and reads by the inverse of ids, so that each place is
written once; sums over the batch stay in registers, are compensated (Kahan), and are taken by
shares of the batch, as many as fill the GPU, which one launch more adds up.  No atomics: the same
bits each run.
In the kernels capitals are pointers; x_h, x_i, x_j are strides by head, row and column.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import (
    ROWS,
    Part,
    config_by_dtype,
    configs,
    kernel_by_part,
    launcher,
    named,
    random,
)
from ..common.triton import sm_count
from ..common.tuning import Config


@triton.jit
def _ids(IDS, b, i, K, L):
    """The ids of some places of sequence b, and which of them there are."""
    ids = tl.load(IDS + b * K + i, i < K, -1)
    return ids, (ids >= 0) & (ids < L)


@triton.jit
def _pick(
    BIAS, IDS, OUT, H, K, L, b_h, b_i, b_j, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr
):  # fmt: skip
    """OUT (B, H, K, K)."""
    head = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    j = tl.program_id(2) * BLOCK_J + tl.arange(0, BLOCK_J)
    p, row = _ids(IDS, head // H, i, K, L)
    q, column = _ids(IDS, head // H, j, K, L)
    at = (head % H) * b_h + p[:, None] * b_i + q[None, :] * b_j
    x = tl.load(BIAS + at, row[:, None] & column[None, :], 0.0)
    out = (head * K + i)[:, None] * K + j[None, :]
    tl.store(OUT + out, x, (i < K)[:, None] & (j < K)[None, :])


@triton.jit
def _unpick(
    G, PLACES, PARTS, B, H, K, L, share, g_b, g_h, g_i, g_j,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """PARTS (shares, H, L, L) float32.  PLACES (B, L): where p stands in ids_b, -1 if nowhere."""
    first = tl.program_id(0).to(tl.int64) * share
    blocks = tl.cdiv(L, BLOCK_I)
    h = (tl.program_id(1) // blocks).to(tl.int64)
    p = tl.program_id(1) % blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    q = tl.program_id(2) * BLOCK_J + tl.arange(0, BLOCK_J)
    total = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    lost = total
    for step in range(0, tl.minimum(B - first, share)):
        b = first + step
        i, row = _ids(PLACES, b, p, L, K)
        j, column = _ids(PLACES, b, q, L, K)
        at = b * g_b + h * g_h + i[:, None] * g_i + j[None, :] * g_j
        g = tl.load(G + at, row[:, None] & column[None, :], 0.0).to(tl.float32) - lost
        after = total + g
        lost = (after - total) - g
        total = after
    part = (tl.program_id(0).to(tl.int64) * H + h) * L
    here = (p < L)[:, None] & (q < L)[None, :]
    tl.store(PARTS + (part + p)[:, None] * L + q[None, :], total, here)


def _places_of(ids: Tensor, length: int) -> Tensor:
    """Where each of `length` places stands in a row of ids (B, K), -1 if nowhere: (B, length)."""
    order = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return ids.new_full((len(ids), length), -1).scatter_(1, ids, order)


def pick(bias: Tensor, ids: Tensor) -> Tensor:
    (H, L, _), (B, K) = bias.shape, ids.shape
    out, config = bias.new_empty(B, H, K, K), config_by_dtype(PICK, bias)
    rows, columns = (triton.cdiv(K, config.blocks[b]) for b in ("BLOCK_I", "BLOCK_J"))
    if out.numel():
        with torch.cuda.device_of(bias):
            _pick[B * H, rows, columns](
                bias, ids.contiguous(), out, H, K, L, *bias.stride(), **config.arguments
            )
    return out


def unpick(grad: Tensor, ids: Tensor, length: int) -> Tensor:
    B, H, K, _ = grad.shape
    tiles = max(1, H * triton.cdiv(length, 32) ** 2)
    share = triton.cdiv(B, max(1, min(B, 4 * sm_count(grad.device) // tiles)))
    shares, config = triton.cdiv(B, max(1, share)), config_by_dtype(UNPICK, grad)
    parts = grad.new_empty(shares, H, length, length, dtype=torch.float32)
    rows, columns = (triton.cdiv(length, config.blocks[b]) for b in ("BLOCK_I", "BLOCK_J"))
    if parts.numel():
        with torch.cuda.device_of(grad):
            _unpick[shares, H * rows, columns](
                grad, _places_of(ids, length), parts, B, H, K, length, share, *grad.stride(),
                **config.arguments,
            )  # fmt: skip
    return parts.sum(0)


TRIAL = (256, 12, 196)  # sequences, heads, places; a quarter of the places is visible


def _trial(dtype: str, device: torch.device) -> tuple[Tensor, Tensor]:
    B, H, L = TRIAL
    ids = random("float32", device, B, L, seed=1).argsort(1)[:, : max(1, L // 4)]
    return random(dtype, device, H, L, L), ids


def _try_pick(dtype: str, part: str, config: Config, device: torch.device) -> Any:
    return launcher(PICK.name, config, pick, *_trial(dtype, device))


def _try_unpick(dtype: str, part: str, config: Config, device: torch.device) -> Any:
    bias, ids = _trial(dtype, device)
    grad = pick(bias, ids)
    return launcher(UNPICK.name, config, unpick, grad, ids, bias.shape[1])


# Strides by column are 1; a table's sizes are divisible by nothing.
TYPES = named("i32", "B H K L share b_h b_i g_b g_h g_i") | named("*i64:16", "IDS PLACES")
TYPES |= named(ROWS, "BIAS OUT G") | named("*fp32:16", "PARTS")
BLOCKS = configs("BLOCK_I BLOCK_J", [(32, 32, 4, 2), (16, 64, 4, 2)])
PARTS = {"": Part({"b_j": 1, "g_j": 1}, BLOCKS)}
PICK = kernel_by_part("bias_pick", _pick, TYPES, PARTS, _try_pick)
UNPICK = kernel_by_part("bias_unpick", _unpick, TYPES, PARTS, _try_unpick)
