"""Row log-sum-exp of pairwise similarities in Triton; pairwise.py says what it is.

    s_ij = log2(e) scale x_i . y_j           M rows, N columns, D features; log2 units, for exp2
    forward    m_i = max_j s_ij    l_i = sum_j 2^(s_ij - m_i)    lse_i = ln2 m_i + ln l_i
    kept       m_i and 1 / l_i, apart: scores far from 0 would lose l in their sum's logarithm
    backward   u_i = sum_j W_ij y_j          dx_i = scale u_i    dscale = sum_i x_i . u_i
               W_ij = g_i 2^(s_ij - m_i) / l_i    the row side:     x = q, y = k gives dq
                    + g_j 2^(s_ij - m_j) / l_j    the column side:  x = k, y = q gives dk

When q is k one pass takes both sides.  In units of 2 M N D operations: forward 1, backward 4 for
two tensors and 2 for one; each further BLOCK_O columns of D cost one unit more, since a program
keeps no more of u in registers and computes the scores again.  No atomics: the same bits each run.
W is rounded to the inputs' dtype for its product.  float16 has too little range for g / l, so that
W is divided by the largest of them (UNIT); with rows alone g / l comes after the product.
Traffic: q once, k once for each row of tiles, mostly from L2.  In place: nothing.
In the kernels capitals are pointers, and ids that are not given are positions.
Row indices are int64, as row * stride passes 2**31.
Source: Milakov & Gimelshein 2018, arXiv:1805.02867, for the running maximum and sum.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tuning import Config, Kernel, config_for, register
from .pairwise_configs import backward_variants, forward_variants, shape_class

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LEAST = tl.constexpr(-3.4028234663852886e38)  # a maximum of -inf would make -inf - -inf


@triton.jit
def different(rows, cols):
    """`exclude_self` for the kernels."""
    return rows != cols


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if PRECISION == "widened":  # see _constants
        acc += tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _product(X, Y, d, cols_ok, D, PRECISION: tl.constexpr):
    """x y^T of a tile, a chunk of D at a time; X, Y point to the starts of its rows."""
    s = tl.zeros((X.shape[0], Y.shape[0]), tl.float32)
    for start in range(0, D, d.shape[1]):
        ok = start + d < D
        x = tl.load(X + start + d, ok, 0.0)
        y = tl.load(Y + start + d, cols_ok[:, None] & ok, 0.0)
        s = _dot(x, y.T, s, PRECISION)
    return s


@triton.jit
def _fwd(
    Q, K, SCALE, ROW_IDS, COL_IDS, LSE, STATS, M, N, D, q_row, k_row,
    MASK: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    here = tl.minimum(row, M - 1)  # rows past the end repeat the last, and are not stored
    d = tl.arange(0, BLOCK_D)[None, :]
    Q += here[:, None] * q_row
    q = tl.load(Q + d, d < D, 0.0)
    c = tl.load(SCALE) * LOG2_E
    row_ids = here.to(tl.int32) if ROW_IDS is None else tl.load(ROW_IDS + here)
    m = tl.full((BLOCK_M,), LEAST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for n in range(0, N, BLOCK_N):
        col = n + tl.arange(0, BLOCK_N)
        ok = col < N
        Kt = K + col.to(tl.int64)[:, None] * k_row
        if WHOLE:
            k = tl.load(Kt + d, ok[:, None] & (d < D), 0.0)
            s = _dot(q, k.T, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        else:
            s = _product(Q, Kt, d, ok, D, PRECISION)
        keep = ok[None, :]
        if MASK is not None:
            col_ids = col if COL_IDS is None else tl.load(COL_IDS + col, ok, 0)
            keep = keep & MASK(row_ids[:, None], col_ids[None, :])
        s = tl.where(keep, s * c, -float("inf"))
        peak = tl.maximum(m, tl.max(s, 1))
        total = total * tl.exp2(m - peak) + tl.sum(tl.exp2(s - peak[:, None]), 1)
        m = peak
    none = total == 0
    lse = tl.where(none, -float("inf"), LN_2 * m + tl.log(tl.where(none, 1.0, total)))
    tl.store(LSE + row, lse, row < M)
    tl.store(STATS + row, m, row < M)
    tl.store(STATS + M + row, 1 / tl.where(none, 1.0, total), row < M)


@triton.jit
def _bwd(
    X, Y, SCALE, X_IDS, Y_IDS, MAXIMA, WEIGHTS, UNIT, OUT, M, N, D, x_row, y_row,
    MASK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SCALED: tl.constexpr,
    WHOLE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    here = tl.minimum(row, M - 1)
    d = tl.arange(0, BLOCK_D)[None, :]
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)[None, :]
    X += here[:, None] * x_row
    x = tl.load(X + d, d < D, 0.0)
    scale = tl.load(SCALE)
    c = scale * LOG2_E
    x_ids = here.to(tl.int32) if X_IDS is None else tl.load(X_IDS + here)
    if ROWS:
        m, w = tl.load(MAXIMA + here), tl.load(WEIGHTS + here)
    u = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    for n in range(0, N, BLOCK_N):
        col = n + tl.arange(0, BLOCK_N)
        ok = col < N
        Yt = Y + col.to(tl.int64)[:, None] * y_row
        if WHOLE:
            y = tl.load(Yt + d, ok[:, None] & (d < D), 0.0)
            s = _dot(x, y.T, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        else:
            s = _product(X, Yt, d, ok, D, PRECISION)
            y = tl.load(Yt + o, ok[:, None] & (o < D), 0.0)
        keep = ok[None, :]
        if MASK is not None:
            y_ids = col if Y_IDS is None else tl.load(Y_IDS + col, ok, 0)
            i, j = x_ids[:, None], y_ids[None, :]
            keep = keep & (MASK(i, j) if ROWS else MASK(j, i))
        s = tl.where(keep, s * c, -float("inf"))
        if COLS:
            m_y, w_y = tl.load(MAXIMA + col, ok, 0.0), tl.load(WEIGHTS + col, ok, 0.0)
            p = tl.exp2(s - m_y[None, :]) * w_y[None, :]
            if ROWS:
                p += tl.exp2(s - m[:, None]) * w[:, None]
        else:
            p = tl.exp2(s - m[:, None])
        u = _dot(p.to(y.dtype), y, u, PRECISION)
    if not COLS:
        u *= w[:, None]
    if UNIT is not None:
        u *= tl.load(UNIT)
    if SCALED:
        u *= scale
    inside = (row < M)[:, None] & (o < D)
    tl.store(OUT + row[:, None] * D + o, u.to(OUT.dtype.element_ty), inside)


INTERPRETED = not isinstance(_fwd, triton.JITFunction)
Choice = tuple[str, Config]  # of a shape class by name, and of the configuration in it


def choose(kernel: Kernel, x: Tensor, part: str) -> Choice:
    """The shape class of a launch and the configuration to make it with."""
    name = shape_class(x, part)
    return name, config_for(kernel, name, x.device)


def _constants(kernel: Kernel, choice: Choice, x: Tensor, mask: Any) -> dict[str, Any]:
    """Every constexpr argument of the launch, and its compiler options."""
    variant, config = kernel.variants[choice[0]], choice[1]
    found = {**variant.constexprs, **config.blocks, **config.options, "MASK": mask}
    found["WHOLE"] = found["WHOLE"] and x.shape[1] <= config.blocks["BLOCK_D"]
    if INTERPRETED:  # NumPy has no bfloat16, and rounds x y^T and y x^T differently: a GPU does not
        found["PRECISION"] = "widened"
    return found


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def forward(
    q: Tensor, k: Tensor, scale: Tensor, ids: list[Tensor], mask: Any, choice: Choice | None = None
) -> tuple[Tensor, Tensor]:
    """lse (M,), and stats (2, M): the maxima in log2 units, 1 / the sums.  All float32.

    ids: of rows and columns, (M,) and (N,) int64; nothing for the positions.
    """
    q, k, (M, D), N = _rows(q), _rows(k), q.shape, len(k)
    lse, stats = scale.new_empty(M), scale.new_empty(2, M)
    choice = choice or choose(FWD, q, "all" if mask is None else "masked")
    grid = (triton.cdiv(M, choice[1].blocks["BLOCK_M"]),)
    with torch.cuda.device_of(q):
        launch: Any = _fwd[grid]
        launch(
            q, k, scale, *(ids or (None, None)), lse, stats, M, N, D, q.stride(0), k.stride(0),
            **_constants(FWD, choice, q, mask),
        )  # fmt: skip
    return lse, stats


def backward(
    pair: list[Tensor], scale: Tensor, stats: Tensor, grad: Tensor, mask: Any, wide: bool,
    choice: Choice,
) -> Tensor:  # fmt: skip
    """scale u (M, D) in the inputs' dtype; u itself, in float32, when it is to be wide.

    pair: x (M, D), y (N, D) and their ids, if they are not the positions.
    """
    x, y, (M, D), N = _rows(pair[0]), _rows(pair[1]), pair[0].shape, len(pair[1])
    out = torch.empty(M, D, dtype=torch.float32 if wide else x.dtype, device=x.device)
    constants = _constants(BWD, choice, x, mask) | {"SCALED": not wide}
    weights = grad * stats[1]
    if "UNIT" not in constants:
        constants["UNIT"] = weights.abs().amax().clamp_min(1e-30)
        weights /= constants["UNIT"]
    grid = (triton.cdiv(M, constants["BLOCK_M"]), triton.cdiv(D, constants["BLOCK_O"]))
    x_ids, y_ids = pair[2:] or (None, None)
    with torch.cuda.device_of(x):
        launch: Any = _bwd[grid]
        launch(
            x, y, scale, x_ids, y_ids, stats[0], weights, OUT=out, M=M, N=N, D=D,
            x_row=x.stride(0), y_row=y.stride(0), **constants,
        )  # fmt: skip
    return out


FWD = register(Kernel("pairwise_lse_fwd", _fwd, forward_variants(different, forward)))
BWD = register(Kernel("pairwise_lse_bwd", _bwd, backward_variants(different, backward, forward)))
