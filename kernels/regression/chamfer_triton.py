"""The Chamfer distance in Triton, by the functions that chamfer.py has in torch.

A program has a block of one cloud's points and goes over the other cloud in blocks:

    nearest   least_n = min_m |x_n - y_m|^2, at the lowest m that has it
    pull      dx_n = a c (x_n - y_at(n)) + b sum_(m: back(m) = n) c (x_n - y_m)
              c = 2 for squares, 1 / distance (0 at distance 0) for distances

A place of a block keeps its own best, and the block's best is taken once, at the end.  `pull` finds
the points whose nearest is n by looking through all of `back`: no atomics.
In the kernels capitals are pointers; g is a cloud, k a coordinate.
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
from ..common.tuning import Config


@triton.jit
def _squares(X, Y, x_at, y_at, row, column, x_k, y_k, DIMS: tl.constexpr):
    """|x - y|^2 of every pair of a block, by coordinates: nothing cancels far from the origin."""
    total = tl.zeros([x_at.shape[0], y_at.shape[0]], tl.float32)
    for k in tl.static_range(DIMS):
        x = tl.load(X + x_at + k * x_k, row, 0.0).to(tl.float32)
        y = tl.load(Y + y_at + k * y_k, column, 0.0).to(tl.float32)
        delta = x[:, None] - y[None, :]
        total += delta * delta
    return total


@triton.jit
def _nearest(
    X, Y, LEAST, PLACES, N, M, x_g, x_n, x_k, y_g, y_n, y_k,
    DIMS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """LEAST float32 and PLACES int32 (G, N).  What is not a number is as far as infinity."""
    g = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_at, y_at = g * x_g + n.to(tl.int64) * x_n, g * y_g
    best = tl.full([BLOCK_N, BLOCK_M], float("inf"), tl.float32)
    places = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    for start in range(0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        total = _squares(
            X, Y, x_at, y_at + m.to(tl.int64) * y_n, n < N, m < M, x_k, y_k, DIMS
        )  # fmt: skip
        closer = (total < best) & (m < M)[None, :]
        best = tl.where(closer, total, best)
        places = tl.where(closer, m[None, :], places)
    least = tl.min(best, 1)
    places = tl.min(tl.where(best == least[:, None], places, 2147483647), 1)
    tl.store(LEAST + g * N + n, least, n < N)
    tl.store(PLACES + g * N + n, tl.where(least < float("inf"), places, 0), n < N)


@triton.jit
def _factor(total, ROOT: tl.constexpr):
    """c, of squared distances."""
    if ROOT:
        far = tl.where(total > 0, total, 1.0)
        return tl.where(total > 0, tl.div_rn(1.0, tl.sqrt_rn(far)), 0.0)
    else:
        return tl.full(total.shape, 2.0, tl.float32)


@triton.jit
def _pull(
    GRAD, X, Y, PLACES, BACK, DX, N, M, a, b, grad_g, x_g, x_n, x_k, y_g, y_n, y_k,
    ROOT: tl.constexpr, DIMS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """DX (G, N, DIMS), its gradients in float32 until they are stored; WIDTH >= DIMS."""
    g = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row, column = n < N, tl.arange(0, WIDTH)
    x_at, y_at = g * x_g + n.to(tl.int64) * x_n, g * y_g
    dx = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    for start in range(0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        there = y_at + m.to(tl.int64) * y_n
        back = tl.load(BACK + g * M + m, m < M, -1)
        mine = back[None, :] == n[:, None]
        total = _squares(X, Y, x_at, there, row, m < M, x_k, y_k, DIMS)
        factor = _factor(total, ROOT)
        for k in tl.static_range(DIMS):
            x = tl.load(X + x_at + k * x_k, row, 0.0).to(tl.float32)
            y = tl.load(Y + there + k * y_k, m < M, 0.0).to(tl.float32)
            part = tl.sum(tl.where(mine, factor * (x[:, None] - y[None, :]), 0.0), 1)
            dx += tl.where((column == k)[None, :], b * part[:, None], 0.0)
    nearest = y_at + tl.load(PLACES + g * N + n, row, 0).to(tl.int64) * y_n
    own = tl.zeros([BLOCK_N], tl.float32)
    for k in tl.static_range(DIMS):
        x = tl.load(X + x_at + k * x_k, row, 0.0).to(tl.float32)
        delta = x - tl.load(Y + nearest + k * y_k, row, 0.0).to(tl.float32)
        own += delta * delta
    factor = _factor(own, ROOT)
    for k in tl.static_range(DIMS):
        x = tl.load(X + x_at + k * x_k, row, 0.0).to(tl.float32)
        delta = x - tl.load(Y + nearest + k * y_k, row, 0.0).to(tl.float32)
        dx += tl.where((column == k)[None, :], (a * factor * delta)[:, None], 0.0)
    dx *= tl.load(GRAD + g * grad_g)
    at = (g * N + n)[:, None] * DIMS + column[None, :]
    tl.store(DX + at, dx.to(DX.dtype.element_ty), row[:, None] & (column < DIMS)[None, :])


def _nearest_one_way(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    (G, N, D), M, config = x.shape, y.shape[1], config_by_dtype(NEAREST, x)
    least = x.new_empty(G, N, dtype=torch.float32)
    places = torch.empty(G, N, dtype=torch.int32, device=x.device)
    if G:
        with torch.cuda.device_of(x):
            _nearest[G, triton.cdiv(N, config.blocks["BLOCK_N"])](
                x, y, least, places, N, M, *x.stride(), *y.stride(), DIMS=D, **config.arguments
            )
    return least, places


def nearest(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_nearest_one_way(x, y), *_nearest_one_way(y, x)


def pull(
    grad: Tensor, x: Tensor, y: Tensor, places: Tensor, back: Tensor, weights: list[float],
    root: bool,
) -> Tensor:  # fmt: skip
    (G, N, D), M, config = x.shape, y.shape[1], config_by_dtype(PULL, x)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if G:
        with torch.cuda.device_of(x):
            _pull[G, triton.cdiv(N, config.blocks["BLOCK_N"])](
                grad, x, y, places, back, dx, N, M, *weights, *grad.stride(), *x.stride(),
                *y.stride(), ROOT=root, DIMS=D, WIDTH=triton.next_power_of_2(D), **config.arguments,
            )  # fmt: skip
    return dx


TRIAL = (64, 1024, 3)  # clouds, points, coordinates


def _try_nearest(dtype: str, part: str, config: Config, device: torch.device) -> Any:
    return launcher(NEAREST.name, config, nearest, *random(dtype, device, 2, *TRIAL))


def _try_pull(dtype: str, part: str, config: Config, device: torch.device) -> Any:
    x, y = random(dtype, device, 2, *TRIAL)
    _, places, _, back = nearest(x, y)
    arguments = torch.ones(len(x), device=device), x, y, places, back, [1.0, 1.0], False
    return launcher(PULL.name, config, pull, *arguments)


# Points of three coordinates, as they come; sizes are not taken to be divisible by anything.
TYPES = named("i32", "N M x_g x_n y_g y_n grad_g") | named("fp32", "a b") | named(ROWS, "X Y DX")
TYPES |= named("*fp32:16", "GRAD LEAST") | named("*i32:16", "PLACES BACK")
CONSTANTS = {"DIMS": 3, "x_k": 1, "y_k": 1, "ROOT": False, "WIDTH": 4}
BLOCKS = configs("BLOCK_N BLOCK_M", [(32, 32, 4, 2), (64, 64, 4, 2), (32, 128, 4, 2)])
NEAREST = kernel_by_part(
    "chamfer_nearest", _nearest, TYPES, {"": Part(CONSTANTS, BLOCKS)}, _try_nearest
)
PULL = kernel_by_part("chamfer_pull", _pull, TYPES, {"": Part(CONSTANTS, BLOCKS[:2])}, _try_pull)
