"""The pairwise sigmoid loss in Triton, by one of two schedules; sigmoid.py has its why.

    z_ij = -y_ij s_ij    softplus(z) = max(z, 0) + log1p(e)    sigmoid(z) = (1 or e) / (1 + e)
    e = exp(-|z|), which never overflows

A tile is asked which of its pairs are positive only where the ranges of its ids meet.

tiles      one kernel, a program for a block of rows, which meets all others a block at a time:
           x = q gives dq and the sums, x = k gives dk.  4 units of 2 M N D operations with
           gradients, 1 without; each further BLOCK_O columns of D cost one unit more a side.
           Where its rows alone would not fill the GPU, several programs share the others.
products   cuBLAS makes a block of q k^T in float32, of BLOCK_BYTES; `_weigh` reads it once, sums,
           and writes W in the inputs' dtype; cuBLAS multiplies W twice.  3 units.

Each program writes its own sums, which are added in float64.  No atomics: the same bits each run.
W is rounded to the inputs' dtype for its products.  |W| <= 1, and in float16 it is multiplied by
FP16_SCALE first: at SigLIP's first bias of -10 a negative pair's 4.5e-5 would already be subnormal.
In the kernels capitals are pointers.  Row indices are int64, as row * stride passes 2**31.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.chunks import spans
from ..common.launch import dtype_name
from ..common.matmul import add_product
from ..common.matmul import product as matmul
from ..common.triton import dot, precision, rows_contiguous
from ..common.tuning import Kernel, config_for, register
from .classes import Choice, choose, schedule
from .lse_gemm import BLOCK_BYTES
from .masks import id_ranges, triton_rules, unequal
from .masks_triton import kept, row_ranges, verdict
from .scores_triton import LN_2, LOG2_E, column_share, product, summed
from .sigmoid_configs import FP16_SCALES, PASSES, tile_variants, weigh_variants
from .sigmoid_torch import Logits, Need, Results


@triton.jit
def _log1p(e):
    """log(1 + e) of e in [0, 1], to 2.2e-7 of itself: Remez's polynomial for that.

    Products and sums alone, which other units of a GPU than the exponential's compute.
    """
    c = -0.008778954856097698
    c = c * e + 0.04498663917183876
    c = c * e - 0.10902290791273117
    c = c * e + 0.17847207188606262
    c = c * e - 0.24536865949630737
    c = c * e + 0.3328406512737274
    c = c * e - 0.4999817907810211
    return (c * e + 1.0) * e


@triton.jit
def _softplus(z, LOSS: tl.constexpr):
    """softplus(z) with LOSS, else nothing to use, and sigmoid(z), of z in log2 units.

    1 / (1 + e) is the square of a root, which has no division's full range.  A nan stays one.
    """
    if LOSS:
        e = tl.exp2(-tl.abs(z))
        root = tl.rsqrt(1 + e)
        w = tl.where(z > 0, 1.0, e) * (root * root)
        loss = tl.maximum(z, 0.0) * LN_2 + _log1p(e)
    else:
        least = tl.minimum(-z, 126.0, propagate_nan=tl.PropagateNan.ALL)
        root = tl.rsqrt(1 + tl.exp2(least))
        w, loss = root * root, z
    return loss, w


@triton.jit
def _sigmoid(s, positive, ok, LOSS: tl.constexpr):
    """softplus(-y s) and W of scores in log2 units; both 0 where not ok."""
    loss, w = _softplus(tl.where(ok, tl.where(positive, -s, s), -float("inf")), LOSS)
    return loss, tl.where(positive, -w, w)


@triton.jit
def _tiles(
    X, Y, SCALE, BIAS, X_IDS, Y_IDS, Y_LOW, Y_HIGH, SUMS, OUT, M, N, D, share, x_row, y_row,
    RULES: tl.constexpr, PLACES: tl.constexpr, UNEQUAL: tl.constexpr, TRANSPOSED: tl.constexpr,
    TOTAL: tl.constexpr, GRAD: tl.constexpr, FP16_SCALE: tl.constexpr, FITS_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    here = tl.minimum(row, M - 1)  # rows past the end repeat the last, and are not stored
    d = tl.arange(0, BLOCK_D)[None, :]
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)[None, :]
    X += here[:, None] * x_row
    x = tl.load(X + d, d < D, 0.0)
    scale, bias = tl.load(SCALE), tl.load(BIAS)
    steep, shift = scale * LOG2_E, bias * LOG2_E
    ranges = row_ranges(here, X_IDS, M, PLACES, UNEQUAL)
    u = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sum_w = tl.zeros((BLOCK_M,), tl.float32)
    sum_wp = tl.zeros((BLOCK_M,), tl.float32)
    first, stop = 0, N
    if share is not None:
        first = tl.program_id(2) * share
        stop = tl.minimum(first + share, N)
    for n in range(first, stop, BLOCK_N):
        col = n + tl.arange(0, BLOCK_N)
        ok, there = col < N, tl.minimum(col, N - 1)
        Yt = Y + there.to(tl.int64)[:, None] * y_row
        if FITS_BLOCK:
            y = tl.load(Yt + d, ok[:, None] & (d < D), 0.0)
            p = dot(x, y.T, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        else:
            p = product(X, Yt, d, ok, D, PRECISION)
        s = p * steep + shift  # not in both branches: Triton 3.6 cannot pipeline what is left
        _, empty = verdict(ranges, n, N, Y_LOW, Y_HIGH, BLOCK_N, PLACES, UNEQUAL)
        if empty & (n + BLOCK_N <= N):
            loss, w = _softplus(s, TOTAL)
        else:
            positive = kept(here, there, X_IDS, Y_IDS, M, N, RULES, PLACES, TRANSPOSED)
            loss, w = _sigmoid(s, positive, ok[None, :], TOTAL)
        if TOTAL:
            total += tl.sum(loss, 1)
        if TOTAL and GRAD:
            sum_w += tl.sum(w, 1)
            sum_wp += tl.sum(w * p, 1)
        if GRAD:
            if not FITS_BLOCK:
                y = tl.load(Yt + o, ok[:, None] & (o < D), 0.0)
            u = dot((w * FP16_SCALE).to(y.dtype), y, u, PRECISION)
    if GRAD:
        u *= scale / FP16_SCALE
        part = row
        if share is not None:
            part += tl.program_id(2).to(tl.int64) * M
        tl.store(OUT + part[:, None] * D + o, u, (row < M)[:, None] & (o < D))
    if TOTAL:
        if tl.program_id(1) == 0:
            SUMS += (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * 3
            tl.store(SUMS, tl.sum(tl.where(row < M, total, 0.0), 0))
            tl.store(SUMS + 1, tl.sum(tl.where(row < M, sum_w, 0.0), 0))
            tl.store(SUMS + 2, tl.sum(tl.where(row < M, sum_wp, 0.0), 0))


@triton.jit
def _weigh(
    P, SCALE, BIAS, ROW_IDS, COL_IDS, W, SUMS, i0, j0, R, C, M, N,
    RULES: tl.constexpr, PLACES: tl.constexpr, GRAD: tl.constexpr, FP16_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (i < R)[:, None] & (j < C)[None, :]
    x, y = i0 + tl.minimum(i, R - 1).to(tl.int64), j0 + tl.minimum(j, C - 1).to(tl.int64)
    at = i.to(tl.int64)[:, None] * C + j[None, :]
    p = tl.load(P + at, inside, 0.0)
    positive = kept(x, y, ROW_IDS, COL_IDS, M, N, RULES, PLACES, False)  # pyright: ignore
    scale, bias = tl.load(SCALE) * LOG2_E, tl.load(BIAS) * LOG2_E
    loss, w = _sigmoid(p * scale + bias, positive, inside, True)  # pyright: ignore
    SUMS += (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * 3
    tl.store(SUMS, tl.sum(tl.sum(loss, 1), 0))
    if GRAD:
        tl.store(SUMS + 1, tl.sum(tl.sum(w, 1), 0))
        tl.store(SUMS + 2, tl.sum(tl.sum(w * p, 1), 0))
        tl.store(W + at, (w * FP16_SCALE).to(W.dtype.element_ty), inside)
    else:
        tl.store(SUMS + 1, 0.0)
        tl.store(SUMS + 2, 0.0)


def one_side(
    logits: Logits, part: str, choice: Choice | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """The sums (3,) in float64: of the loss, W and W p; and the gradient of a side in float32.

    part: "loss" has no gradient; "rows" has q's; "cols" has k's, and no sums.
    """
    name, config = choice or choose(TILES, logits.q, part)
    constants, passes, blocks = TILES.variants[name].constexprs, PASSES[part], config.blocks
    (rules, places), scale = triton_rules(logits.mask), logits.scale.float()
    x, y = rows_contiguous(logits.q), rows_contiguous(logits.k)
    ids = logits.row_ids, logits.col_ids
    if passes["TRANSPOSED"]:
        (x, y), ids = (y, x), ids[::-1]
    (M, D), N = x.shape, len(y)
    near = id_ranges(logits.mask, ids[1], blocks["BLOCK_N"])
    rows, outs = triton.cdiv(M, blocks["BLOCK_M"]), triton.cdiv(D, blocks["BLOCK_O"])
    outs = outs if passes["GRAD"] else 1
    share = column_share(rows * outs, N, blocks["BLOCK_N"], x.device)
    shares = triton.cdiv(N, share)
    out = scale.new_empty(shares, M, D) if passes["GRAD"] else None
    sums = scale.new_empty(shares * rows, 3) if passes["TOTAL"] else None
    with torch.cuda.device_of(scale):
        _tiles[rows, outs, shares](
            x, y, scale, logits.bias.float(), *ids, *near, sums, out, M, N, D,
            share if shares > 1 else None, x.stride(0), y.stride(0),
            RULES=rules, PLACES=places, UNEQUAL=unequal(logits.mask), **passes,
            FP16_SCALE=FP16_SCALES.get(dtype_name(x), 1.0),
            FITS_BLOCK=constants["FITS_BLOCK"] and blocks["BLOCK_D"] >= D,
            PRECISION=precision(constants["PRECISION"]), **config.arguments,
        )  # fmt: skip
    total = None if sums is None else sums.sum(0, dtype=torch.float64)
    return total, None if out is None else summed(out)


def weigh(p: Tensor, logits: Logits, i: slice, j: slice, part: str) -> tuple[Tensor, Tensor]:
    """The sums (3,) of a block of products, and its W times FP16_SCALE in the inputs' dtype.

    part: "loss" or "grad"; of "loss" there is no W, and the sums of W are 0.
    float32 products become their W.
    """
    config = config_for(WEIGH, f"{dtype_name(logits.q)}-{part}", p.device)
    (R, C), blocks, (rules, places) = p.shape, config.blocks, triton_rules(logits.mask)
    grid = triton.cdiv(R, blocks["BLOCK_M"]), triton.cdiv(C, blocks["BLOCK_N"])
    sums = p.new_empty(*grid, 3)
    here = part == "loss" or p.dtype == logits.q.dtype
    w = p if here else torch.empty_like(p, dtype=logits.q.dtype)
    with torch.cuda.device_of(p):
        _weigh[grid](
            p, logits.scale.float(), logits.bias.float(), logits.row_ids, logits.col_ids, w, sums,
            i.start, j.start, R, C, len(logits.q), len(logits.k), RULES=rules, PLACES=places,
            GRAD=part == "grad", FP16_SCALE=FP16_SCALES.get(dtype_name(logits.q), 1.0),
            **config.arguments,
        )  # fmt: skip
    return sums.sum((0, 1), dtype=torch.float64), w


Found = tuple[Tensor, Tensor | None, Tensor | None]  # sums (3,), dq and dk


def _by_tiles(logits: Logits, need: Need) -> Found:
    need_q, need_k, *numbers = need
    sums, dq = one_side(logits, "rows" if need_q or any(numbers) else "loss")
    assert sums is not None
    return sums, dq if need_q else None, one_side(logits, "cols")[1] if need_k else None


def _by_products(logits: Logits, need: Need) -> Found:
    q, k, (need_q, need_k, *_) = logits.q, logits.k, need
    factor = logits.scale.float() / FP16_SCALES.get(dtype_name(q), 1.0)
    dq, dk = (factor.new_zeros(x.shape if n else 0) for x, n in ((q, need_q), (k, need_k)))
    sums = factor.new_zeros(3, dtype=torch.float64)
    C = min(len(k), math.isqrt(BLOCK_BYTES // 2))
    part = "grad" if any(need) else "loss"
    for i in spans(len(q), max(1, BLOCK_BYTES // 4 // C)):
        for j in spans(len(k), C):
            block_sums, w = weigh(matmul(q[i], k[j].T), logits, i, j, part)
            sums += block_sums
            if need_q:
                add_product(dq[i], w, k[j])
            if need_k:
                add_product(dk[j], w.T, q[i])
    return sums, dq.mul_(factor), dk.mul_(factor)


def results(logits: Logits, need: Need) -> Results:
    """As sigmoid_torch.results."""
    by = {"tiles": _by_tiles, "products": _by_products}[schedule(logits.q, "grads")]
    sums, *made = by(logits, need)
    none = logits.q.new_empty
    total, dbias, dscale = (x.to(torch.float32, copy=True) for x in sums.unbind())
    numbers = dscale if need[2] else None, dbias if need[3] else None
    grads = (none(0, dtype=torch.float32) if g is None else g for g in (*made, *numbers))
    return Results(total, *grads)


TILES = register(Kernel("pairwise_sigmoid_tiles", _tiles, tile_variants(_tiles, one_side)))
WEIGH = register(Kernel("pairwise_sigmoid_weigh", _weigh, weigh_variants(_weigh, weigh)))
