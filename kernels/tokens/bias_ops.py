"""The Triton kernels of attention biases as operators of torch, for `bias.py`: `bias_torch`'s
functions by the same names.  They know no gradient.  Any layout, float32, bfloat16 or float16.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from ..common.launch import ROWS, kernel, launch
from ..common.tuning import Config, forced, register
from ..correlation.moments_ops import processors
from . import bias_triton as fused
from .bias_torch import places_of

operator = torch.library.custom_op
TRIAL = (256, 12, 196)  # sequences, heads, places; a quarter of the places is visible


@operator("fastssl::bias_picked", mutates_args=())
def picked(bias: Tensor, ids: Tensor) -> Tensor:
    """bias_(h, ids_bi, ids_bj): (B, H, K, K)."""
    (H, L, _), (B, K) = bias.shape, ids.shape
    out = bias.new_empty(B, H, K, K)
    tiles = ("BLOCK_I", "BLOCK_J")
    launch(
        PICK, bias, lambda blocks: (B * H, *(triton.cdiv(K, blocks[b]) for b in tiles)),
        BIAS=bias, IDS=ids.contiguous(), OUT=out, H=H, K=K, L=L, b_h=bias.stride(0),
        b_i=bias.stride(1), b_j=bias.stride(2),
    )  # fmt: skip
    return out


@operator("fastssl::bias_unpicked", mutates_args=())
def unpicked(grad: Tensor, ids: Tensor, length: int) -> Tensor:
    """The gradient of `picked` to the bias: (H, L, L) float32."""
    B, H, K, _ = grad.shape
    tiles = H * triton.cdiv(length, 32) ** 2
    share = triton.cdiv(B, max(1, min(B, 4 * processors(grad.device) // tiles)))
    shares = triton.cdiv(B, share)
    parts = grad.new_empty(shares, H, length, length, dtype=torch.float32)
    g_b, g_h, g_i, g_j = grad.stride()
    places = partial(triton.cdiv, length)
    launch(
        UNPICK, grad,
        lambda blocks: (shares, H * places(blocks["BLOCK_I"]), places(blocks["BLOCK_J"])),
        G=grad, PLACES=places_of(ids, length), PARTS=parts, B=B, H=H, K=K, L=length, share=share,
        g_b=g_b, g_h=g_h, g_i=g_i, g_j=g_j,
    )  # fmt: skip
    return parts.sum(0)


@picked.register_fake
def _(bias, ids):
    return bias.new_empty(ids.shape[0], bias.shape[0], ids.shape[1], ids.shape[1])


@unpicked.register_fake
def _(grad, ids, length):
    return grad.new_empty(grad.shape[1], length, length, dtype=torch.float32)


def _trial(dtype: str, device: torch.device) -> tuple[Tensor, Tensor]:
    (B, H, L), generator = TRIAL, torch.Generator(device).manual_seed(0)
    bias = torch.randn(H, L, L, generator=generator, device=device)
    ids = torch.rand(B, L, generator=generator, device=device).argsort(1)[:, : max(1, L // 4)]
    return bias.to(getattr(torch, dtype)), ids


def _try_pick(dtype: str, config: Config, device: torch.device) -> Callable[[], Any]:
    bias, ids = _trial(dtype, device)

    def run() -> Any:
        with forced(PICK.name, config):
            return picked(bias, ids)

    return run


def _try_unpick(dtype: str, config: Config, device: torch.device) -> Callable[[], Any]:
    bias, ids = _trial(dtype, device)
    grad = picked(bias, ids)

    def run() -> Any:
        with forced(UNPICK.name, config):
            return unpicked(grad, ids, bias.shape[1])

    return run


# Strides by column are 1; a table's sizes are divisible by nothing.
_SIZES = {name: "i32" for name in ("H", "K", "L")}
_CONFIGS = [Config({"BLOCK_I": 32, "BLOCK_J": 32}, 4, 2), Config({"BLOCK_I": 16, "BLOCK_J": 64}, 4)]
PICK = register(
    kernel(
        "bias_pick",
        fused.pick,
        {"BIAS": ROWS, "IDS": "*i64:16", "OUT": ROWS, **_SIZES, "b_h": "i32", "b_i": "i32"},
        {"b_j": 1},
        _CONFIGS,
        _try_pick,
    )
)
UNPICK = register(
    kernel(
        "bias_unpick",
        fused.unpick,
        {
            "G": ROWS, "PLACES": "*i64:16", "PARTS": "*fp32:16", "B": "i32", **_SIZES,
            "share": "i32", "g_b": "i32", "g_h": "i32", "g_i": "i32",
        },
        {"g_j": 1},
        _CONFIGS,
        _try_unpick,
    )
)  # fmt: skip
