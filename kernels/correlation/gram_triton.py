"""Gram matrices and covariances in Triton: the tiles, and what leaves them.

    s_ij = x_i . y_j    t_ij = u_i . v_j    total = sum_ij s_ij t_ij       i < M, j < N
    Grams        rows of a by rows of all a, rows of b by rows of all b; of one tensor t = s
    covariance   columns of a by columns of b, t = s

Why: eager reads a matrix again for its squares, and keeps it in the inputs' 16 bits.  Here s and t
leave the registers once, and W, what is kept of each, is in the inputs' dtype without its diagonal,
which goes apart in float32: of standardized rows a Gram's is D, its other entries sqrt(D), and near
convergence a covariance's is N, its others sqrt(N); the rounding of the diagonal would pass the
gradient of all the rest.  float16 ends at 65504: there W is divided by a unit, which by Cauchy and
Schwarz no entry passes.  Two schedules:

    tiles      16 bits and symmetric, from SIDE rows on: tiles on and above the diagonal, s and t in
               registers, each entry stored twice, mirrored            (M^2 / 2) 2 K flops a matrix
    products   the rest: cuBLAS, a strip of float32 that stays in L2, and one pass that reads it

The tiles above the diagonal come in a circle's order, each unordered pair once; those on it come
last and smaller, to fill the GPU's last round.  No atomics: the same bits each run.
Traffic: inputs once for each row of tiles, mostly from L2; W is written once.
Memory: W, a strip of products.  In place: nothing.
In the kernels capitals are pointers.
Source: Zbontar et al. 2021, arXiv:2103.03230, eq. 1; |a^T b|^2 = tr(a a^T b b^T).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.chunks import spans
from ..common.launch import FLOATS, kernel_by_part, launcher, random
from ..common.matmul import product
from ..common.triton import dot, precision, rows_contiguous
from ..common.tuning import Config, config_for
from . import configs
from .configs import shape_class
from .gram_torch import Matrix

# Reckoned from an H200's figures, to be confirmed by measurement.
SIDE = 1280  # rows of a symmetric matrix, 55 tiles of 128 and more: fewer leave the GPU half idle
STRIP_BYTES = 1 << 25  # of float32 products: an H200's L2 holds them,
LEAST_ROWS, TILE = 512, 128  # but fewer rows would wait for the other side; a multiple of TILE
STRIPS = 4  # of a symmetric float32 product, for 5/8 of the work


@triton.jit
def _starts(X, at, k, x_row, COLUMNS: tl.constexpr):
    """Pointers to tile (at, k) of x, or with COLUMNS of x^T."""
    if COLUMNS:
        pointers = X + k.to(tl.int64)[None, :] * x_row + at[:, None]
    else:
        pointers = X + at.to(tl.int64)[:, None] * x_row + k[None, :]
    return pointers


@triton.jit
def _dots(
    X, row, col, M, K, x_row,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x_row . x_col for a tile, a chunk of K at a time."""
    k = tl.arange(0, BLOCK_K)
    x_at, y_at = _starts(X, row, k, x_row, COLUMNS), _starts(X, col, k, x_row, COLUMNS)
    step = BLOCK_K
    if COLUMNS:
        step = BLOCK_K * tl.cast(x_row, tl.int64)
    s = tl.zeros((row.shape[0], col.shape[0]), tl.float32)
    for start in range(0, K, BLOCK_K):
        ok = (k < K - start)[None, :]
        x = tl.load(x_at, (row < M)[:, None] & ok, 0.0)
        y = tl.load(y_at, (col < M)[:, None] & ok, 0.0)
        x_at += step
        y_at += step
        s = dot(x, y.T, s, PRECISION)
    return s


@triton.jit
def _put(w, i, j, i0, j0, R, C, OUT, DIAGONAL, FP16_SCALE, N, shift, PART: tl.constexpr):
    """Store w: rows i < R from i0 on and columns j < C from j0 on of a matrix with N columns.

    What it has of the diagonal, at row + shift, goes apart.  PART of the matrix that w is in: any;
    "upper", on or above the diagonal of a symmetric one, mirrored; "above", off it.
    """
    keep = (i < R)[:, None] & (j < C)[None, :]
    if PART != "above":
        apart = i0 + shift - j0  # the column in w of its row 0's diagonal
        if PART == "upper":
            keep = keep & (j[None, :] >= i[:, None] + apart)
        if DIAGONAL is not None:
            on = j[None, :] == i[:, None] + apart
            there = (i < R) & (i + apart >= 0) & (i + apart < tl.minimum(C, j.shape[0]))
            tl.store(DIAGONAL + i0 + i, tl.sum(tl.where(on, w, 0.0), 1), there)
            w = tl.where(on, 0.0, w)
    if FP16_SCALE is not None:
        w *= 1 / tl.load(FP16_SCALE)
    w = w.to(OUT.dtype.element_ty)
    corner = tl.cast(i0, tl.int64) * N + j0  # in a tile 32 bits will do
    tl.store(OUT + corner + i[:, None] * N + j[None, :], w, keep)
    if PART != "any":
        corner = tl.cast(j0, tl.int64) * N + i0
        tl.store(OUT + corner + j[:, None] * N + i[None, :], w.T, keep.T)


@triton.jit
def _total(s, t, i, j, apart, APART: tl.constexpr, PART: tl.constexpr):
    """sum s t of a tile, zero outside of the matrix, as `_put` has it; APART: but its diagonal."""
    both = s * t
    if PART != "above":
        place = j[None, :] - i[:, None] - apart
        if PART == "upper":
            both = tl.where(place >= 0, both, 0.0)
        if APART:
            both = tl.where(place != 0, both, 0.0)
    total = tl.sum(tl.sum(both, 1), 0)
    if PART != "any":
        total *= 2
    return total


@triton.jit
def _tile(
    i0, j0, A, B, A_OUT, A_DIAGONAL, A_SCALE, B_OUT, B_DIAGONAL, B_SCALE, M, K, L, a_row, b_row,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, SIZE: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """The tile whose first row and column are i0 and j0."""
    i = tl.arange(0, SIZE)
    s = _dots(A, i0 + i, j0 + i, M, K, a_row, COLUMNS, PRECISION, BLOCK_K)
    t = s
    if B is not None:
        t = _dots(B, i0 + i, j0 + i, M, L, b_row, COLUMNS, PRECISION, BLOCK_K)
    total = _total(s, t, i, i, i0 - j0, True, PART)
    _put(s, i, i, i0, j0, M - i0, M - j0, A_OUT, A_DIAGONAL, A_SCALE, M, 0, PART)
    if B is not None:
        _put(t, i, i, i0, j0, M - i0, M - j0, B_OUT, B_DIAGONAL, B_SCALE, M, 0, PART)
    return total


@triton.jit
def _tiles(
    A, B, A_OUT, A_DIAGONAL, A_SCALE, B_OUT, B_DIAGONAL, B_SCALE, PARTS, M, K, L, a_row, b_row,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, CORNER: tl.constexpr,
):  # fmt: skip
    """Symmetric: a program is a tile above the diagonal, or a corner of CORNER rows on it."""
    p = tl.program_id(0)
    side = tl.cdiv(M, BLOCK)
    above = side * (side - 1) // 2
    if p < above:  # tile i meets the next ones in turn: each pair is met once
        i, j = p % side, (p + p // side + 1) % side
        total = _tile(
            tl.minimum(i, j) * BLOCK, tl.maximum(i, j) * BLOCK, A, B, A_OUT, A_DIAGONAL, A_SCALE,
            B_OUT, B_DIAGONAL, B_SCALE, M, K, L, a_row, b_row, COLUMNS, PRECISION, BLOCK_K, BLOCK,
            "above",
        )  # fmt: skip
    else:
        EACH: tl.constexpr = 1 if CORNER == BLOCK else 3  # (0, 0), (0, 1), (1, 1) of 2 x 2
        start, part = (p - above) // EACH * BLOCK, (p - above) % EACH
        total = _tile(
            start + part // 2 * CORNER, start + (part + 1) // 2 * CORNER, A, B, A_OUT, A_DIAGONAL,
            A_SCALE, B_OUT, B_DIAGONAL, B_SCALE, M, K, L, a_row, b_row, COLUMNS, PRECISION, BLOCK_K,
            CORNER, "upper",
        )  # fmt: skip
    tl.store(PARTS + p, total)


@triton.jit
def _settle(
    S, T, A_OUT, A_DIAGONAL, A_SCALE, B_OUT, B_DIAGONAL, B_SCALE, PARTS, i0, j0, R, C, N, shift,
    PART: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A strip (R, C) of products, whose first row and column are i0 and j0."""
    p, q = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    i, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    at = (p + i).to(tl.int64)[:, None] * C + (q + j)[None, :]
    ok = (i < R - p)[:, None] & (j < C - q)[None, :]
    s = tl.load(S + at, ok, 0.0)
    t = s
    if T is not None:
        t = tl.load(T + at, ok, 0.0)
    APART: tl.constexpr = A_DIAGONAL is not None
    total = _total(s, t, i, j, i0 + p + shift - j0 - q, APART, PART)
    tl.store(PARTS + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), total)
    _put(
        s, i, j, i0 + p, j0 + q, R - p, C - q, A_OUT, A_DIAGONAL, A_SCALE, N, shift, PART
    )  # fmt: skip
    if T is not None:
        _put(
            t, i, j, i0 + p, j0 + q, R - p, C - q, B_OUT, B_DIAGONAL, B_SCALE, N, shift, PART
        )  # fmt: skip


def schedule(x: Tensor, M: int, mirror: bool) -> str:
    """ "tiles" or "products": of a matrix with M rows, that of x's dtype with itself if mirror."""
    return "tiles" if mirror and x.dtype != torch.float32 and M >= SIDE else "products"


def _parts_of(matrices: list[Matrix]) -> tuple[Tensor | None, ...]:
    """Values, diagonal and scale of one or two matrices: the kernels' OUT, DIAGONAL and SCALE."""
    first, *second = matrices
    return *first, *(second[0] if second else (None,) * 3)


def by_tiles(sides: list[Tensor], matrices: list[Matrix], columns: bool) -> Tensor:
    """sum_ij s_ij t_ij of symmetric matrices without their diagonals; they go into `matrices`.

    sides: a, or a and b; columns: their columns meet, not their rows.
    """
    a, b = sides[0], sides[1] if len(sides) > 1 else None
    K, M = a.shape if columns else a.shape[::-1]
    name = shape_class(a, "columns" if columns else "one" if b is None else "pair")
    config = config_for(TILES, name, a.device)
    blocks, side = config.blocks, triton.cdiv(M, config.blocks["BLOCK"])
    grid = side * (side - 1) // 2 + side * (1 if blocks["CORNER"] == blocks["BLOCK"] else 3)
    parts = torch.empty(grid, dtype=torch.float32, device=a.device)
    constants, L = TILES.variants[name].constexprs, K if b is None else b.shape[1]
    b_row = 0 if b is None else b.stride(0)
    with torch.cuda.device_of(a):
        _tiles[(grid,)](
            a, b, *_parts_of(matrices), parts, M, K, L, a.stride(0), b_row, COLUMNS=columns,
            PRECISION=precision(constants["PRECISION"]), **config.arguments,
        )  # fmt: skip
    return parts.sum()


def settle(
    strips: list[Tensor], matrices: list[Matrix], corner: tuple[int, int], start: int, mirror: bool
) -> Tensor:
    """The parts of by_products' sum that strips (R, C) of s and t make; corner: their first entry.

    The rest is as there.
    """
    s, t = strips[0], strips[1] if len(strips) > 1 else None
    part = ("one" if t is None else "pair") + ("-mirror" if mirror else "")
    config = config_for(SETTLE, shape_class(matrices[0].values, part), s.device)
    (R, C), N, blocks = s.shape, matrices[0].values.shape[1], config.blocks
    grid = triton.cdiv(R, blocks["BLOCK_M"]), triton.cdiv(C, blocks["BLOCK_N"])
    parts = torch.empty(grid[0] * grid[1], dtype=torch.float32, device=s.device)
    with torch.cuda.device_of(s):
        _settle[grid](
            s, t, *_parts_of(matrices), parts, *corner, R, C, N, start,
            PART="upper" if mirror else "any", **config.arguments,
        )  # fmt: skip
    return parts


def strip_rows(width: int) -> int:
    """The rows of a strip of products with `width` columns."""
    rows = max(LEAST_ROWS, STRIP_BYTES // (4 * width))
    return rows - rows % TILE


def by_products(
    sides: list[tuple[Tensor, Tensor]], matrices: list[Matrix], mirror: bool, start: int = 0
) -> Tensor:
    """sum_ij s_ij t_ij without a diagonal that goes apart; the matrices go into `matrices`.

    sides: x (M, K) and y (N, K) for s, and for t.  mirror: x is y.
    start: the column where row 0 has the diagonal.
    """
    M, N = matrices[0].values.shape
    step = strip_rows(N)
    if mirror and sides[0][0].dtype == torch.float32:  # more strips: less below the diagonal
        step = min(step, max(TILE, triton.cdiv(M, STRIPS)))
    parts = []
    for i in spans(M, step):
        first = i.start if mirror else 0
        strips = [product(x[i], y[first:].T) for x, y in sides]
        parts.append(settle(strips, matrices, (i.start, first), start, mirror))
    return torch.cat(parts).sum()


def _matrix(like: Tensor, shape: tuple[int, int], apart: bool, largest: Any) -> Matrix:
    """Room for a matrix; apart: for its diagonal, too.  largest: makes the float16 scale."""
    diagonal = like.new_empty(shape[0], dtype=torch.float32) if apart else None
    factor = largest().clamp_min(1e-30) if like.dtype == torch.float16 else None
    return Matrix(like.new_empty(shape), diagonal, factor)


def _norm(x: Tensor, dim: int) -> Tensor:
    """The largest norm of x's vectors along dim, 0-d float32."""
    return torch.linalg.vector_norm(x, dim=dim, dtype=torch.float32).amax()


def gram_matrices(
    sides: list[Tensor], others: list[Tensor] | None, start: int, by: str = ""
) -> tuple[Tensor, list[Matrix]]:
    """As `grams`, of one tensor or two.  others: all ranks' rows; None: sides are all there are."""
    sides = [rows_contiguous(x) for x in sides]
    every = others or sides
    matrices = [
        _matrix(x, (len(x), len(y)), True, lambda y=y: _norm(y, 1).square())
        for x, y in zip(sides, every, strict=True)
    ]
    if (by or schedule(sides[0], len(sides[0]), others is None)) == "tiles":
        total = by_tiles(sides, matrices, False)
    else:
        pairs = list(zip(sides, every, strict=True))
        total = by_products(pairs, matrices, others is None, start)
    first, last = matrices[0].diagonal, matrices[-1].diagonal
    assert first is not None and last is not None
    return total + (first * last).sum(), matrices


def covariance_matrix(a: Tensor, b: Tensor | None, by: str = "") -> tuple[Tensor, Matrix]:
    """a^T b, b None: a^T a, and the sum of its squares; without its diagonal where D is E."""
    a, other = rows_contiguous(a), a if b is None else rows_contiguous(b)
    shape = a.shape[1], other.shape[1]
    norms = lambda: _norm(a, 0) * _norm(other, 0)  # noqa: E731
    matrix = _matrix(a, shape, shape[0] == shape[1], norms)
    if (by or schedule(a, shape[0], b is None)) == "tiles":
        return by_tiles([a], [matrix], True), matrix
    return by_products([(a.T, other.T)], [matrix], b is None), matrix


def _all_tiles(sides: list[Tensor], columns: bool) -> list[Tensor]:
    """All that a launch for a tuner makes."""
    M = sides[0].shape[1 if columns else 0]
    matrices = [
        _matrix(x, (M, M), True, lambda x=x: x.new_ones((), dtype=torch.float32)) for x in sides
    ]
    total = by_tiles(sides, matrices, columns)
    return [total, *(x for matrix in matrices for x in matrix[:2] if x is not None)]


def _settle_strip(strips: list[Tensor], dtype: torch.dtype, mirror: bool) -> list[Tensor]:
    """All that a launch for a tuner makes, of a strip of a matrix that has no other."""
    (R, C), like = strips[0].shape, strips[0].new_empty(0, dtype=dtype)
    matrices = [_matrix(like, (C if mirror else R, C), True, strips[0].amax) for _ in strips]
    parts = settle(strips, matrices, (0, 0), 0, mirror)
    return [parts.sum(), *(m.values[:R] for m in matrices)]


def _try_tiles(dtype: str, part: str, config: Config, device: torch.device) -> Any:
    shape = 2 if part == "pair" else 1, *configs.TRIAL_TILES[part]
    sides = [*random(dtype, device, *shape, unit=True)]
    return launcher(TILES.name, config, _all_tiles, sides, part == "columns")


def _try_settle(dtype: str, part: str, config: Config, device: torch.device) -> Any:
    shape = 2 if "pair" in part else 1, *configs.TRIAL_STRIP
    strips, mirror = [*random("float32", device, *shape, unit=True)], part.endswith("mirror")
    return launcher(SETTLE.name, config, _settle_strip, strips, getattr(torch, dtype), mirror)


TILES = kernel_by_part(
    "correlation_tiles", _tiles, configs.TYPES, configs.TILES, _try_tiles, FLOATS[:2], product=True
)
SETTLE = kernel_by_part("correlation_settle", _settle, configs.TYPES, configs.SETTLE, _try_settle)
