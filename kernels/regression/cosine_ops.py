"""The Triton kernels of the scaled cosine error as operators of torch, for `cosine.py`.

They are `cosine_torch`'s functions by the same names, and know no gradient.  pred and target are
(B, L, D) in float32, bfloat16 or float16, each of its own dtype, in any layout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from ..common.launch import ROWS, kernel, launch
from ..common.tuning import Config, forced, register
from . import cosine_triton as fused

operator = torch.library.custom_op
TRIAL = (256, 196, 768)  # sequences, places, features


def _given(pred: Tensor, target: Tensor, ids: Tensor | None, gamma: float) -> dict[str, Any]:
    B, L, D = pred.shape
    n = L if ids is None else ids.shape[1]
    strides = {
        f"{letter}_{axis}": stride
        for letter, x in (("p", pred), ("t", target))
        for axis, stride in zip("krd", x.stride(), strict=True)
    }
    sizes = {"R": B * n, "n": n, "D": D, "gamma": float(gamma), "SQUARE": gamma == 2}
    ids = None if ids is None else ids.contiguous()
    return {"P": pred, "T": target, "IDS": ids, **sizes, **strides}


@operator("fastssl::scaled_cosine", mutates_args=())
def errors(pred: Tensor, target: Tensor, ids: Tensor | None, gamma: float) -> tuple[Tensor, Tensor]:
    """(1 - cos)^gamma (B, K) and, for `gradients`, (3, B, K): cos and both norms; float32."""
    given = _given(pred, target, ids, gamma)
    loss = pred.new_empty(len(pred), given["n"], dtype=torch.float32)
    stats = loss.new_empty(3, *loss.shape)
    grid = lambda blocks: (triton.cdiv(given["R"], blocks["BLOCK_R"]),)  # noqa: E731
    launch(FORWARD, pred, grid, LOSS=loss, STATS=stats, **given)
    return loss, stats


@operator("fastssl::scaled_cosine_gradients", mutates_args=())
def gradients(
    grad: Tensor,
    pred: Tensor,
    target: Tensor,
    ids: Tensor | None,
    stats: Tensor,
    gamma: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """The gradients to pred and target, each as its own; empty where `needs` says so."""
    given, R = _given(pred, target, ids, gamma), stats[0].numel()
    fresh = torch.empty_like if ids is None else torch.zeros_like
    made = [
        fresh(x, memory_format=torch.contiguous_format) if need else None
        for x, need in zip((pred, target), needs, strict=True)
    ]
    rows, columns = ("BLOCK_R", R), ("BLOCK_D", pred.shape[2])
    launch(
        BACKWARD, pred, lambda blocks: tuple(triton.cdiv(n, blocks[b]) for b, n in (rows, columns)),
        G=grad, STATS=stats, DP=made[0], DT=made[1], L=pred.shape[1], g_k=grad.stride(0),
        g_r=grad.stride(1), **given,
    )  # fmt: skip
    d_pred, d_target = (
        x.new_empty(0) if d is None else d for x, d in zip((pred, target), made, strict=True)
    )
    return d_pred, d_target


@errors.register_fake
def _(pred, target, ids, gamma):
    shape = pred.shape[:2] if ids is None else ids.shape
    loss = pred.new_empty(shape, dtype=torch.float32)
    return loss, loss.new_empty(3, *shape)


@gradients.register_fake
def _(grad, pred, target, ids, stats, gamma, needs):
    d_pred, d_target = (
        x.new_empty(x.shape if need else 0) for x, need in zip((pred, target), needs, strict=True)
    )
    return d_pred, d_target


def _rows(dtype: str, device: torch.device) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(2, *TRIAL, generator=generator, device=device)
    return list(x.to(getattr(torch, dtype)))


def _try_forward(dtype: str, config: Config, device: torch.device) -> Callable[[], Any]:
    pred, target = _rows(dtype, device)

    def run() -> Any:
        with forced(FORWARD.name, config):
            return errors(pred, target, None, 2.0)

    return run


def _try_backward(dtype: str, config: Config, device: torch.device) -> Callable[[], Any]:
    pred, target = _rows(dtype, device)
    loss, stats = errors(pred, target, None, 2.0)

    def run() -> Any:
        with forced(BACKWARD.name, config):
            return gradients(torch.ones_like(loss), pred, target, None, stats, 2.0, [True, True])

    return run


# Sizes and strides are taken to be divisible by 16, features adjacent, ids to be given.
_TYPES = {"P": ROWS, "T": ROWS, "IDS": "*i64:16", "STATS": "*fp32:16", "n": "i32", "D": "i32:16"}
_TYPES |= {name: "i32:16" for name in ("R", "p_k", "p_r", "t_k", "t_r")} | {"gamma": "fp32"}
_CONSTANTS = {"SQUARE": True, "p_d": 1, "t_d": 1}


def _config(rows: int, columns: int, warps: int) -> Config:
    return Config({"BLOCK_R": rows, "BLOCK_D": columns}, warps, 2)


FORWARD = register(
    kernel(
        "scaled_cosine_forward",
        fused.forward,
        {**_TYPES, "LOSS": "*fp32:16"},
        _CONSTANTS,
        [_config(4, 256, 4), _config(4, 512, 8)],
        _try_forward,
    )
)
BACKWARD = register(
    kernel(
        "scaled_cosine_backward",
        fused.backward,
        {**_TYPES, "G": "*fp32:16", "DP": ROWS, "DT": ROWS, "L": "i32", "g_k": "i32", "g_r": "i32"},
        _CONSTANTS,
        [_config(8, 256, 4), _config(4, 512, 4)],
        _try_backward,
    )
)
