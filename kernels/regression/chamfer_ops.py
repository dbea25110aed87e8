"""The Triton kernels of the Chamfer distance as operators of torch, for `chamfer.py`.

They are `chamfer_torch`'s functions by the same names, and know no gradient.  Points are in
float32, bfloat16 or float16, in any layout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from ..common.launch import ROWS, kernel, launch
from ..common.tuning import Config, forced, register
from . import chamfer_triton as fused

operator = torch.library.custom_op
TRIAL = (64, 1024, 3)  # clouds, points, coordinates


def _given(x: Tensor, y: Tensor) -> dict[str, Any]:
    strides = {
        f"{letter}_{axis}": stride
        for letter, points in (("x", x), ("y", y))
        for axis, stride in zip("gnk", points.stride(), strict=True)
    }
    sizes = {"N": x.shape[1], "M": y.shape[1], "DIMS": x.shape[2]}
    return {"X": x, "Y": y, **sizes, **strides}


def _grid(x: Tensor) -> Any:
    return lambda blocks: (len(x), triton.cdiv(x.shape[1], blocks["BLOCK_N"]))


def _nearest(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    least = x.new_empty(x.shape[:2], dtype=torch.float32)
    places = torch.empty(x.shape[:2], dtype=torch.int32, device=x.device)
    launch(NEAREST, x, _grid(x), LEAST=least, PLACES=places, **_given(x, y))
    return least, places


@operator("fastssl::chamfer_nearest", mutates_args=())
def nearest(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Squared distance and place of the nearest of y to each x, (G, N), and of x to each y, (G, M).

    Of several nearest, the first.
    """
    return *_nearest(x, y), *_nearest(y, x)


@operator("fastssl::chamfer_pulled", mutates_args=())
def pulled(
    grad: Tensor, x: Tensor, y: Tensor, places: Tensor, back: Tensor, weights: list[float],
    root: bool,
) -> Tensor:  # fmt: skip
    """The gradient to x, (G, N, D) as x; weights: those of x's nearest and of y's."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    launch(
        PULL, x, _grid(x), GRAD=grad, PLACES=places, BACK=back, DX=dx, a=weights[0], b=weights[1],
        grad_g=grad.stride(0), ROOT=root, WIDTH=triton.next_power_of_2(x.shape[2]), **_given(x, y),
    )  # fmt: skip
    return dx


@nearest.register_fake
def _(x, y):
    least, places = (
        x.new_empty(x.shape[:2], dtype=dtype) for dtype in (torch.float32, torch.int32)
    )
    return least, places, least.new_empty(y.shape[:2]), places.new_empty(y.shape[:2])


@pulled.register_fake
def _(grad, x, y, places, back, weights, root):
    return x.new_empty(x.shape)


def _clouds(dtype: str, device: torch.device) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(2, *TRIAL, generator=generator, device=device)
    return list(x.to(getattr(torch, dtype)))


def _try_nearest(dtype: str, config: Config, device: torch.device) -> Callable[[], Any]:
    x, y = _clouds(dtype, device)

    def run() -> Any:
        with forced(NEAREST.name, config):
            return nearest(x, y)

    return run


def _try_pull(dtype: str, config: Config, device: torch.device) -> Callable[[], Any]:
    x, y = _clouds(dtype, device)
    _, places, _, back = nearest(x, y)

    def run() -> Any:
        with forced(PULL.name, config):
            ones = torch.ones(len(x), device=device)
            return pulled(ones, x, y, places, back, [1.0, 1.0], False)

    return run


# Points of three coordinates, as they come; sizes are not taken to be divisible by anything.
_TYPES = {name: "i32" for name in ("N", "M", "x_g", "x_n", "y_g", "y_n")} | {"X": ROWS, "Y": ROWS}
_CONSTANTS = {"DIMS": 3, "x_k": 1, "y_k": 1}


def _config(rows: int, columns: int, warps: int) -> Config:
    return Config({"BLOCK_N": rows, "BLOCK_M": columns}, warps, 2)


NEAREST = register(
    kernel(
        "chamfer_nearest",
        fused.nearest,
        {**_TYPES, "LEAST": "*fp32:16", "PLACES": "*i32:16"},
        _CONSTANTS,
        [_config(32, 32, 4), _config(64, 64, 4), _config(32, 128, 4)],
        _try_nearest,
    )
)
PULL = register(
    kernel(
        "chamfer_pull",
        fused.pull,
        {
            **_TYPES, "GRAD": "*fp32:16", "PLACES": "*i32:16", "BACK": "*i32:16", "DX": ROWS,
            "a": "fp32", "b": "fp32", "grad_g": "i32",
        },
        {**_CONSTANTS, "ROOT": False, "WIDTH": 4},
        [_config(32, 32, 4), _config(64, 64, 4)],
        _try_pull,
    )
)  # fmt: skip
