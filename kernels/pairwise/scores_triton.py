"""What the Triton kernels of pairs share: the product of a tile, its scores, the statistics' unit.

    s_ij = log2(e) (scale_i q_i . k_j + bias_j)        log2 units, for exp2; -inf: a dropped pair
    stats (2, M): m_i and l_i = sum_j 2^(s_ij - m_i)    lse_i = ln2 m_i + ln l_i

A kernel sees x, y: rows and columns, or with TRANSPOSED columns and rows.  Capitals are pointers.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.gpu import on_gpu
from ..common.triton import dot, sm_count
from .masks_triton import kept

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LEAST_SHARE = 512  # columns
SPREAD = tl.constexpr(40.0)  # log2 units: a score 86 below its row's m still has a weight
BOUND = tl.constexpr(60.0)  # log2 units: sums of 2^+-60 need no maximum
LEAST = tl.constexpr(-3.4028234663852886e38)  # a maximum of -inf would make -inf - -inf


@triton.jit
def product(X, Y, d, cols_ok, D, PRECISION: tl.constexpr):
    """x y^T of a tile, a chunk of D at a time; X, Y point to the starts of its rows."""
    s = tl.zeros((X.shape[0], Y.shape[0]), tl.float32)
    for start in range(0, D, d.shape[1]):
        ok = start + d < D
        x = tl.load(X + start + d, ok, 0.0)
        y = tl.load(Y + start + d, cols_ok[:, None] & ok, 0.0)
        s = dot(x, y.T, s, PRECISION)
    return s


@triton.jit
def multiplier(SCALE):
    """What makes scores of products; not 0, which would make -inf nan."""
    size = tl.load(SCALE) * LOG2_E
    return tl.where(size == 0, 1e-30, size)


@triton.jit
def highest(s, size):
    """The highest of a row's scores."""
    if size is None:
        top = tl.max(s, 1)
    else:
        if size < 0:
            top = tl.min(s, 1) * size
        else:
            top = tl.max(s, 1) * size
    return top


@triton.jit
def power(s, size, m):
    """2^(s - m) of scores s."""
    if size is None:
        return tl.exp2(s - m)
    else:
        return tl.exp2(s * size - m)


@triton.jit
def scored(
    s, x, y, ok, whole, SCALE, BIAS, X_IDS, Y_IDS, M, N,
    RULES: tl.constexpr, PLACES: tl.constexpr, TRANSPOSED: tl.constexpr, VECTOR: tl.constexpr,
    size=None,
):  # fmt: skip
    """The scores of products s (R, C) at positions x (R,) < M and y (C,) < N.

    ok (R, C) or (1, C): pairs to keep beside those the rules keep.  whole: that this is all pairs.
    VECTOR: a scale for each row.  size: that they are still to be multiplied by, if given.
    """
    if size is not None:
        pass
    elif not VECTOR:
        s *= tl.load(SCALE) * LOG2_E
    elif TRANSPOSED:
        s *= (tl.load(SCALE + y) * LOG2_E)[None, :]
    else:
        s *= (tl.load(SCALE + x) * LOG2_E)[:, None]
    if BIAS is not None:
        if TRANSPOSED:
            s += (tl.load(BIAS + x) * LOG2_E)[:, None]
        else:
            s += (tl.load(BIAS + y) * LOG2_E)[None, :]
    if not whole:
        dropped = -float("inf")
        if size is not None:
            dropped = tl.where(size < 0, float("inf"), -float("inf"))
        if len(RULES) > 0:  # pyright: ignore[reportArgumentType]
            keep = ok & kept(x, y, X_IDS, Y_IDS, M, N, RULES, PLACES, TRANSPOSED)
        else:
            keep = ok
        s = tl.where(keep, s, dropped)
    return s


@triton.jit
def weighed(s, size, x, y, X_SIDE, Y_SIDE, M, N):
    """W_ij = w_i 2^(s_ij - m_i) + w_j 2^(s_ij - m_j); a side, (2, M) or (2, N), is m and w.

    size: what the scores s are still to be multiplied by, if given.
    """
    w = tl.zeros_like(s)
    if X_SIDE is not None:
        m_x, w_x = tl.load(X_SIDE + x), tl.load(X_SIDE + M + x)
        w += power(s, size, m_x[:, None]) * w_x[:, None]
    if Y_SIDE is not None:
        m_y, w_y = tl.load(Y_SIDE + y), tl.load(Y_SIDE + N + y)
        w += power(s, size, m_y[None, :]) * w_y[None, :]
    return w


@triton.jit
def weighed_once(s, size, x, y, X_SIDE, Y_LEVEL, LOW, M):
    """As `weighed` by both sides, with one exponential; Y_LEVEL, LOW: `leveled`."""
    m_x, w_x, level = tl.load(X_SIDE + x), tl.load(X_SIDE + M + x), tl.load(Y_LEVEL + y)
    both = w_x[:, None] + tl.exp2(m_x - tl.load(LOW))[:, None] * level[None, :]
    return power(s, size, m_x[:, None]) * both


def leveled(x_side: Tensor, y_side: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """w_j 2^(low - m_j) of the columns, and the lowest and the highest m of either side.

    Where they are at most SPREAD apart, nothing of it leaves float32's range, and
    W_ij = 2^(s_ij - m_i) (w_i + 2^(m_i - low) w_j 2^(low - m_j)).
    """
    m = x_side[0] if x_side is y_side else torch.cat([x_side[0], y_side[0]])
    low, high = torch.aminmax(m)
    return (low - y_side[0]).exp2_().mul_(y_side[1]), low, high


def log_sum(stats: Tensor) -> Tensor:
    """The log-sum-exp of statistics; -inf where no pair was left."""
    return stats[0] * LN_2.value + stats[1].log()


def join(a: Tensor, b: Tensor) -> Tensor:
    """The statistics of two disjoint sets of pairs together."""
    m = torch.maximum(a[0], b[0])
    return torch.stack([m, a[1] * (a[0] - m).exp2() + b[1] * (b[0] - m).exp2()])


def folded(parts: Tensor) -> Tensor:
    """The statistics (2, R) of disjoint sets of pairs (S, 2, R) together."""
    if len(parts) == 1:
        return parts[0]
    m = parts[:, 0].amax(0)
    return torch.stack([m, (parts[:, 1] * (parts[:, 0] - m).exp2()).sum(0)])


def summed(parts: Tensor) -> Tensor:
    """The sum of parts (S, ...), in their order."""
    return parts[0] if len(parts) == 1 else parts.sum(0)


def programs(device: torch.device, each: int) -> int:
    """How many programs fill the device, `each` a multiprocessor."""
    return each * sm_count(device) if on_gpu(device) else 1


def column_share(
    blocks: int, N: int, step: int, device: torch.device, each: int = 2, least: int = 0
) -> int:
    """How many of N columns a program meets: a multiple of `step`, at least `least`.

    All, where the `blocks` of rows fill the device, `each` of them a multiprocessor.
    """
    shares = max(1, programs(device, each) // max(1, blocks))
    return triton.cdiv(max(triton.cdiv(N, shares), min(LEAST_SHARE, 8 * step), least), step) * step


def fp16_scale(sides: list[Tensor | None], factor: Tensor) -> Tensor:
    """0-d: the most a pair's W times `factor` can be; divided by it, W is in float16's range.

    A weight that is nan does not count: it would make all of them nan.
    """
    largest: Any = sum(side[1].abs().nan_to_num(0).amax() for side in sides if side is not None)
    return (largest * factor.abs().amax()).float().clamp_min(1e-30)
