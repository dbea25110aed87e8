"""Pairwise log-sum-exps in Triton, fully fused: the schedule for small D.

A program keeps BLOCK_M rows of x and streams y: with x = q, y = k it makes what belongs to rows,
with TRANSPOSED, x = k, y = q, what belongs to columns.

    forward    m_i, l_i of its rows                       1 unit of 2 M N D operations a side;
               half of it for large symmetric scores: symmetric_triton.py
    backward   u_i = sum_j W_ij y_j, and sum_j W_ij       2 units a side; 2 in all when q is k
               (TRANSPOSED: W_ij scale_j y_j with a scale for each row)

A tile is asked pair by pair which are kept only where it must: at the end of the columns, and where
the rules cannot tell from the ranges of its ids (masks_triton.verdict).  With both sides' weights
one exponential a score serves both, unless the rows' m lie far apart (scores_triton.leveled): the
GPU tells by itself which of two launches has the work.
Where the rows alone would not fill the GPU, several programs share the columns, and what they make
is joined.  Each further BLOCK_O columns of D cost one unit more in the backward, since a program
keeps no more of u in registers and computes the scores again.  No atomics: the same bits each run.
W is rounded to the inputs' dtype for its product; float16 has too little range, so there W is
divided by FP16_SCALE first.
Traffic: x once, y once for each row of tiles, mostly from L2.  In place: nothing.
Row indices are int64, as row * stride passes 2**31.  Scores and statistics: scores_triton.py.
Source: Milakov & Gimelshein 2018, arXiv:1805.02867, for the running maximum and sum.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.triton import dot, precision, rows_contiguous
from ..common.tuning import Config, Kernel, register
from . import symmetric_triton
from .classes import Choice, choose
from .lse_configs import backward_variants, forward_variants
from .lse_torch import Grads, Pairs, weights
from .masks import id_ranges, triton_rules, unequal
from .masks_triton import row_ranges, verdict
from .scores_triton import (
    BOUND,
    LEAST,
    SPREAD,
    column_share,
    folded,
    fp16_scale,
    highest,
    join,
    leveled,
    log_sum,
    multiplier,
    power,
    product,
    scored,
    summed,
    weighed,
    weighed_once,
)

__all__ = ["BWD", "FWD", "gradients", "join", "log_sum", "statistics", "weights"]

# Pairs.  Reckoned: for fewer, `leveled` and a launch more take the host longer than they save.
ONCE_FROM = 1 << 26


@triton.jit
def _fwd(
    X, Y, SCALE, BIAS, X_IDS, Y_IDS, Y_LOW, Y_HIGH, MOST, STATS, M, N, D, share, x_row, y_row,
    RULES: tl.constexpr, PLACES: tl.constexpr, UNEQUAL: tl.constexpr, TRANSPOSED: tl.constexpr,
    VECTOR: tl.constexpr, FITS_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    if MOST is not None:  # of two launches one has the work: symmetric_triton.py
        if tl.load(MOST) <= BOUND:
            return
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    here = tl.minimum(row, M - 1)  # rows past the end repeat the last, and are not stored
    d = tl.arange(0, BLOCK_D)[None, :]
    X += here[:, None] * x_row
    x = tl.load(X + d, d < D, 0.0)
    size = None
    if not VECTOR and BIAS is None:
        size = multiplier(SCALE)
    ranges = row_ranges(here, X_IDS, M, PLACES, UNEQUAL)
    m = tl.full((BLOCK_M,), LEAST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    first, stop = 0, N
    if share is not None:
        first = tl.program_id(1) * share
        stop = tl.minimum(first + share, N)
    for n in range(first, stop, BLOCK_N):
        col = n + tl.arange(0, BLOCK_N)
        ok, there = col < N, tl.minimum(col, N - 1)
        whole, empty = verdict(ranges, n, N, Y_LOW, Y_HIGH, BLOCK_N, PLACES, UNEQUAL)
        Yt = Y + there.to(tl.int64)[:, None] * y_row
        if FITS_BLOCK:
            y = tl.load(Yt + d, ok[:, None] & (d < D), 0.0)
            s = dot(x, y.T, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        else:
            s = product(X, Yt, d, ok, D, PRECISION)
        if not empty:
            s = scored(
                s, here, there, ok[None, :], whole & (n + BLOCK_N <= N), SCALE, BIAS, X_IDS, Y_IDS,
                M, N, RULES, PLACES, TRANSPOSED, VECTOR, size,
            )  # fmt: skip
            peak = tl.maximum(m, highest(s, size))
            total = total * tl.exp2(m - peak) + tl.sum(power(s, size, peak[:, None]), 1)
            m = peak
    if size is not None:
        m = tl.where(m > LEAST, tl.where(tl.load(SCALE) == 0, 0.0, m), m)  # see multiplier
    if share is not None:
        STATS += tl.program_id(1).to(tl.int64) * 2 * M
    tl.store(STATS + row, m, row < M)
    tl.store(STATS + M + row, total, row < M)


@triton.jit
def _bwd(
    X, Y, SCALE, BIAS, X_IDS, Y_IDS, Y_LOW, Y_HIGH, X_SIDE, Y_SIDE, Y_LEVEL, LOW, HIGH,
    FP16_SCALE, OUT, SUMS, M, N, D, share, x_row, y_row,
    RULES: tl.constexpr, PLACES: tl.constexpr, UNEQUAL: tl.constexpr, TRANSPOSED: tl.constexpr,
    VECTOR: tl.constexpr, FITS_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    if LOW is not None:  # of two launches, with Y_LEVEL and without, one has the work
        close = tl.load(HIGH) - tl.load(LOW) <= SPREAD
        if close != (Y_LEVEL is not None):
            return
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    here = tl.minimum(row, M - 1)
    d = tl.arange(0, BLOCK_D)[None, :]
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)[None, :]
    X += here[:, None] * x_row
    x = tl.load(X + d, d < D, 0.0)
    size = None
    if not VECTOR and BIAS is None:
        size = multiplier(SCALE)
    ranges = row_ranges(here, X_IDS, M, PLACES, UNEQUAL)
    u = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    sums = tl.zeros((BLOCK_M,), tl.float32)
    first, stop = 0, N
    if share is not None:
        first = tl.program_id(2) * share
        stop = tl.minimum(first + share, N)
    for n in range(first, stop, BLOCK_N):
        col = n + tl.arange(0, BLOCK_N)
        ok, there = col < N, tl.minimum(col, N - 1)
        whole, empty = verdict(ranges, n, N, Y_LOW, Y_HIGH, BLOCK_N, PLACES, UNEQUAL)
        Yt = Y + there.to(tl.int64)[:, None] * y_row
        if FITS_BLOCK:
            y = tl.load(Yt + d, ok[:, None] & (d < D), 0.0)
            s = dot(x, y.T, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        else:
            s = product(X, Yt, d, ok, D, PRECISION)
            y = tl.load(Yt + o, ok[:, None] & (o < D), 0.0)
        if not empty:
            s = scored(
                s, here, there, ok[None, :], whole & (n + BLOCK_N <= N), SCALE, BIAS, X_IDS, Y_IDS,
                M, N, RULES, PLACES, TRANSPOSED, VECTOR, size,
            )  # fmt: skip
            if Y_LEVEL is None:
                w = weighed(s, size, here, there, X_SIDE, Y_SIDE, M, N)
            else:
                w = weighed_once(s, size, here, there, X_SIDE, Y_LEVEL, LOW, M)
            if SUMS is not None:
                sums += tl.sum(w, 1)
            if FP16_SCALE is not None:
                w *= 1 / tl.load(FP16_SCALE)
            if TRANSPOSED and VECTOR:
                w *= tl.load(SCALE + there)[None, :]
            u = dot(w.to(y.dtype), y, u, PRECISION)
    if FP16_SCALE is not None:
        u *= tl.load(FP16_SCALE)
    part = row
    if share is not None:
        part += tl.program_id(2).to(tl.int64) * M
    tl.store(OUT + part[:, None] * D + o, u, (row < M)[:, None] & (o < D))
    if SUMS is not None:
        tl.store(SUMS + part, sums, row < M)


def _fits_block(constants: Mapping[str, Any], config: Config, D: int) -> bool:
    """Whether one block holds all features of a row."""
    return constants["FITS_BLOCK"] and D <= config.blocks["BLOCK_D"]


def _operands(pairs: Pairs, transposed: bool) -> tuple[Any, ...]:
    """The kernels' first arguments: x, y, scale and bias in float32, and the ids of x and y."""
    x, y = rows_contiguous(pairs.q), rows_contiguous(pairs.k)
    ids = pairs.row_ids, pairs.col_ids
    if transposed:
        (x, y), ids = (y, x), ids[::-1]
    scale, bias = pairs.scale.float().contiguous(), pairs.bias
    return x, y, scale, None if bias is None else bias.float().contiguous(), *ids


def _part(pairs: Pairs) -> str:
    """Which of the forward's classes a launch is nearest to."""
    plain = pairs.bias is None and pairs.scale.ndim == 0
    return "full" if not plain else "masked" if pairs.mask else "all"


def forward(
    pairs: Pairs,
    transposed: bool = False,
    choice: Choice | None = None,
    most: Tensor | None = None,
) -> Tensor:
    """Statistics (2, M) of the rows of q, or with transposed of k.

    most: 0-d; where it is at most BOUND, nothing is computed.
    """
    x, y, scale, *rest = _operands(pairs, transposed)
    name, config = choice or choose(FWD, pairs.q, _part(pairs))
    constants, (rules, places) = FWD.variants[name].constexprs, triton_rules(pairs.mask)
    (M, D), N = x.shape, len(y)
    near = id_ranges(pairs.mask, rest[-1], config.blocks["BLOCK_N"])
    rows = triton.cdiv(M, config.blocks["BLOCK_M"])
    share = column_share(rows, N, config.blocks["BLOCK_N"], x.device)
    out = torch.empty(triton.cdiv(N, share), 2, M, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(out):
        _fwd[rows, len(out)](
            x, y, scale, *rest, *near, most, out, M, N, D, share if len(out) > 1 else None,
            x.stride(0), y.stride(0),
            RULES=rules, PLACES=places, UNEQUAL=unequal(pairs.mask), TRANSPOSED=transposed,
            VECTOR=scale.ndim == 1, FITS_BLOCK=_fits_block(constants, config, D),
            PRECISION=precision(constants["PRECISION"]), **config.arguments,
        )  # fmt: skip
    return folded(out)


def backward(
    pairs: Pairs,
    sides: list[Tensor | None],
    transposed: bool = False,
    sums: bool = False,
    choice: Choice | None = None,
) -> tuple[Tensor, Tensor | None]:
    """u (M, D) of q, or with transposed of k, and sum_j W_ij (M,), both float32.

    sides: the `weights` of q's rows and of k's, None for a side without upstream gradient.
    """
    x, y, scale, *rest = _operands(pairs, transposed)
    one_sided = any(side is None for side in sides)
    part = "both" if pairs.same else "full" if not one_sided else "cols" if transposed else "rows"
    name, config = choice or choose(BWD, pairs.q, part)
    constants, (rules, places) = BWD.variants[name].constexprs, triton_rules(pairs.mask)
    (M, D), N, blocks = x.shape, len(y), config.blocks
    near = id_ranges(pairs.mask, rest[-1], blocks["BLOCK_N"])
    by_column = transposed and scale.ndim == 1
    factor = scale if by_column else x.new_ones((), dtype=torch.float32)
    rows, outs = triton.cdiv(M, blocks["BLOCK_M"]), triton.cdiv(D, blocks["BLOCK_O"])
    share = column_share(rows * outs, N, blocks["BLOCK_N"], x.device)
    shares = triton.cdiv(N, share)
    out = torch.empty(shares, M, D, dtype=torch.float32, device=x.device)
    total = out.new_empty(shares, M) if sums else None
    x_side, y_side = sides[::-1] if transposed else sides
    largest = fp16_scale(sides, factor) if x.dtype == torch.float16 else None
    level, *ends = None, None, None
    if x_side is not None and y_side is not None and M * N >= ONCE_FROM:
        level, *ends = leveled(x_side, y_side)
    with torch.cuda.device_of(out):
        for given in (None,) if level is None else (level, None):
            _bwd[rows, outs, shares](
                x, y, scale, *rest, *near, x_side, y_side, given, *ends, largest, out, total,
                M, N, D, share if shares > 1 else None, x.stride(0), y.stride(0),
                RULES=rules, PLACES=places, UNEQUAL=unequal(pairs.mask), TRANSPOSED=transposed,
                VECTOR=scale.ndim == 1, FITS_BLOCK=_fits_block(constants, config, D),
                PRECISION=precision(constants["PRECISION"]), **config.arguments,
            )  # fmt: skip
    return summed(out), None if total is None else summed(total)


def statistics(pairs: Pairs, both: bool) -> tuple[Tensor, Tensor]:
    """As lse_torch.statistics, in log2 units."""
    by_half = symmetric_triton.fits(pairs)
    rows = (
        symmetric_triton.statistics(pairs, partial(forward, pairs)) if by_half else forward(pairs)
    )
    if not both:
        return rows, rows.new_empty(2, 0)
    return rows, rows.clone() if pairs.same else forward(pairs, transposed=True)


def gradients(
    pairs: Pairs, rows: Tensor | None, cols: Tensor | None, need: tuple[bool, bool, bool, bool]
) -> Grads:
    """As lse_torch.gradients."""
    sides = [rows, rows if pairs.same else cols]
    need_q, need_k, need_scale, need_bias = need
    dq = dk = dscale = dbias = None
    scale = pairs.scale.float()
    by_row = scale[:, None] if scale.ndim else scale
    if need_q or need_scale or pairs.same:
        u, _ = backward(pairs, sides)
        if need_scale:
            dscale = (pairs.q * u).sum(1)
            # Of symmetric scores each pair stands in u twice, once from either side.
            dscale = dscale if scale.ndim else dscale.sum() / (2 if pairs.same else 1)
        dq = u * by_row if need_q or pairs.same else None
    if (need_k and not pairs.same) or need_bias:
        dk, dbias = backward(pairs, sides, transposed=True, sums=need_bias)
        dk = dk if scale.ndim else dk.mul_(scale)
    wanted = dq, dk if need_k else None, dscale, dbias
    return Grads(*(scale.new_empty(0) if g is None else g for g in wanted))


FWD = register(Kernel("pairwise_lse_fwd", _fwd, forward_variants(_fwd, forward)))
BWD = register(Kernel("pairwise_lse_bwd", _bwd, backward_variants(_bwd, backward, forward)))
