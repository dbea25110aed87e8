"""Embeddings along random directions, a few directions at a time: how they are distributed there.

Directions are drawn from torch's default generator, by one call: the same numbers under the same
seed, whatever is done with them.  Of a group of ranks the first one's are everybody's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastssl.distributed import Group, all_reduce_sum, rank, world_size
from fastssl.kernels.common import FirstOrder, accumulator, first_order
from fastssl.kernels.common.chunks import spans, square_tile
from fastssl.kernels.common.operators import operator


@torch.no_grad()
def draw_directions(z: Tensor, count: int, group: Group) -> Tensor:
    """(D, count) columns of length one, for the D features of z."""
    acc = accumulator(z.dtype)
    a = torch.randn(z.shape[-1], count, device=z.device, dtype=acc)
    if world_size(group) > 1:
        a = all_reduce_sum(a if rank(group) == 0 else torch.zeros_like(a), group)
    return a.div_(torch.linalg.vector_norm(a, dim=0))


def _sums(z: Tensor, directions: Tensor, step: float, K: int) -> Tensor:
    acc = accumulator(z.dtype)
    sums = z.new_zeros(2, len(z), directions.shape[1], K, dtype=acc)
    for v, i, j in _tiles(z, directions):
        cos, sin = _turns(z[v, i].to(acc) @ directions[:, j], step)
        c, s, spare = cos.clone(), sin.clone(), torch.empty_like(cos)
        for k in range(K):
            if k:
                torch.mul(c, cos, out=spare).addcmul_(s, sin, value=-1)
                s.mul_(cos).addcmul_(c, sin)
                c, spare = spare, c
            sums[0, v, j, k] += c.sum(1)
            sums[1, v, j, k] += s.sum(1)
    return sums


def _slopes(grad: Tensor, z: Tensor, directions: Tensor, step: float) -> Tensor:
    """That of x is -Im sum_k k conj(g_k) e^(ikx), of g = dcos + i dsin, by Horner's rule."""
    acc, K = accumulator(z.dtype), grad.shape[-1]
    out = z.new_zeros(z.shape, dtype=acc)
    pull = grad * (step * torch.arange(1, K + 1, device=z.device, dtype=acc))
    for v, i, j in _tiles(z, directions):
        cos, sin = _turns(z[v, i].to(acc) @ directions[:, j], step)
        a, b, spare = torch.zeros_like(cos), torch.zeros_like(cos), torch.empty_like(cos)
        for k in range(K, 0, -1):
            a += pull[0, v, None, j, k - 1]
            b -= pull[1, v, None, j, k - 1]
            torch.mul(a, cos, out=spare).addcmul_(b, sin, value=-1)
            b.mul_(cos).addcmul_(a, sin)
            a, spare = spare, a
        out[v, i] -= b @ directions[:, j].T
    return out.to(z.dtype)


def _fake_sums(z, directions, step, K):
    shape = 2, z.shape[0], directions.shape[1], K
    return z.new_empty(shape, dtype=accumulator(z.dtype))


# Operators, so that a compiler does not write every tile and knot into its graph.
_wave_sums = operator("wave_sums", _sums, _fake_sums)
_wave_slopes = operator("wave_slopes", _slopes, lambda grad, z, *_: z.new_empty(z.shape))


class Waves(FirstOrder):
    """sums (2, V, S, K) of z (V, N, D) along directions (D, S), where x = step z . direction:

        sum_n cos(k x_n), sum_n sin(k x_n)      k = 1..K

    Why: eager makes all (V, N, S, K) angles, cosines and sines, and keeps them.  Here each x has
    one of either, and is turned on from one k to the next; a tile of them at a time, each way.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, directions: Tensor, step: float, K: int) -> Tensor:
        ctx.save_for_backward(z, directions)
        ctx.step = step
        return _wave_sums(z, directions, step, K)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _wave_slopes(grad, *ctx.saved_tensors, ctx.step), None, None, None


def _turns(x: Tensor, step: float) -> tuple[Tensor, Tensor]:
    x.mul_(step)
    return x.cos(), x.sin_()


def _tiles(z: Tensor, directions: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Views, rows and directions that are worked on at once, seven such tensors at a time."""
    (V, N, _), S = z.shape, directions.shape[1]
    side = square_tile(z.new_empty(0, dtype=accumulator(z.dtype)), 7)
    rows = min(N, side)
    cols = min(S, max(1, side * side // rows))
    for v in spans(V, max(1, side * side // (rows * cols))):
        for i in spans(N, rows):
            for j in spans(S, cols):
                yield v, i, j


def _rank(z: Tensor, directions: Tensor, quantiles: Tensor, need: bool) -> tuple[Tensor, Tensor]:
    value, slope = z.new_zeros(()), z.new_zeros(z.shape if need else (0,))
    side = square_tile(z, 7)
    cols = max(1, side * side // z.shape[1])
    views = max(1, side * side // (z.shape[1] * min(cols, max(1, directions.shape[1]))))
    for v in spans(len(z), views):
        for j in spans(directions.shape[1], cols):
            ordered, at = (directions[:, j].T @ z[v].mT).sort(dim=2)
            ordered -= quantiles
            value += torch.linalg.vector_norm(ordered).square_()
            if need:
                back = torch.empty_like(ordered).scatter_(2, at, ordered)
                slope[v] += back.mT @ directions[:, j].T
    return value, slope


def _fake_rank(z, directions, quantiles, need):
    return z.new_empty(()), z.new_empty(z.shape if need else (0,))


_ranked = operator("ranked", _rank, _fake_rank)


class Ranked(FirstOrder):
    """The sum of (x_(i) - quantile_i)^2, x_(i) the i-th smallest of the N of each view and
    direction: of z (V, N, D) along directions (D, S); quantiles (N,).  The slope is that of every x
    where it stands; it is made with the sum, so that nothing is sorted twice.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, directions: Tensor, quantiles: Tensor, need: bool) -> Tensor:
        value, slope = _ranked(z, directions, quantiles, need)
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.saved_tensors[0] * (2 * grad), None, None, None
