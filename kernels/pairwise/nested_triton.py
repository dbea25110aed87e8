"""Log-sum-exps of nested prefixes in Triton: one sweep over the features serves all prefixes.

A program has a tile of pairs and walks over the features.  Where a prefix ends, the products so far
are those of that prefix, and are scored.

    forward    _summarize    of each prefix the maxima and sums of the tile's rows and columns
    backward   _weigh        W_p of each prefix, in the inputs' dtype, and its sums with cosines
               _gather       G_p = W_p + r_pi r_pj G_p+1 from the last to the first, in place of W
               cuBLAS        u_p,i += G_p y_p,j    v_p,j += G_p^T y_p,i    a block at a time

y_p: the features that prefix p adds, and r: the steps of their reference lengths; with those no
number of G is larger than a pair's weights (nested_rows.py).
Units of 2 M N D operations, D the longest prefix: 1 forward, 3 backward, rows and columns together.
When q is k only blocks on and above the diagonal are computed: half of that.  One exponential of a
score serves both sides, unless the maxima in its tile lie far apart.
float32 without TF32 has no matrix instructions: there cuBLAS makes the products of each prefix too,
and the kernels read them.
Traffic in 16 bits: 10 P bytes a pair, of W and G; in the forward a quarter of a byte a prefix.
Memory: a block of W, BLOCK_BYTES, and gradients in float32.  No atomics: the same bits each run.
In the kernels capitals are pointers.  S (P, R, C): products at hand; sides (P, N, 3): a, m and w.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import dtype_name
from ..common.matmul import add_product
from ..common.triton import dot, precision
from ..common.tuning import Kernel, config_for, register
from .classes import dtype_class
from .lse_gemm import BLOCK_BYTES, strips
from .masks import triton_rules, unequal
from .masks_triton import all_kept
from .nested_configs import gather_variants, tile_variants
from .nested_rows import Nested, Rows
from .scores_triton import LEAST, SPREAD, folded, fp16_scale, join, scored, summed


@triton.jit
def _steps(ENDS: tl.constexpr, BLOCK_D: tl.constexpr):
    """How many blocks of features the prefixes add, each beginning with a block of its own."""
    steps = 0
    for t in tl.static_range(1, len(ENDS)):  # pyright: ignore
        steps += (ENDS[t] - ENDS[t - 1] + BLOCK_D - 1) // BLOCK_D
    return steps


@triton.jit
def _place(step, ENDS: tl.constexpr, BLOCK_D: tl.constexpr):
    """The prefix that a step belongs to, the step's first feature, and where the prefix ends."""
    p, first, stop, steps = 0, ENDS[0], ENDS[1], 0
    for t in tl.static_range(1, len(ENDS) - 1):  # pyright: ignore
        steps += (ENDS[t] - ENDS[t - 1] + BLOCK_D - 1) // BLOCK_D
        p = tl.where(step >= steps, t, p)
        first = tl.where(step >= steps, ENDS[t] - steps * BLOCK_D, first)
        stop = tl.where(step >= steps, ENDS[t + 1], stop)
    return p, first + step * BLOCK_D, stop


@triton.jit
def _grown(s, X, Y, start, stop, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr):
    """Products s (R, C) with those of a block of features from start on, before stop."""
    d = start + tl.arange(0, BLOCK_D)[None, :]
    a, b = tl.load(X + d, d < stop, 0.0), tl.load(Y + d, d < stop, 0.0)
    return dot(a, b.T, s, PRECISION)


@triton.jit
def _is_full(R, C, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether all of this program's tile lies inside of R rows and C columns."""
    rows, cols = (tl.program_id(0) + 1) * BLOCK_M, (tl.program_id(1) + 1) * BLOCK_N
    return (rows <= R) & (cols <= C)


@triton.jit
def _totals(z, m_x, m_y):
    """Sums of 2^(z - m) by row and by column, m their maxima, in a tile of scores z."""
    top = tl.max(m_x, 0)
    if top - tl.minimum(tl.min(m_x, 0), tl.min(m_y, 0)) <= SPREAD:
        e = tl.exp2(z - top)
        l_x, l_y = tl.sum(e, 1) * tl.exp2(top - m_x), tl.sum(e, 0) * tl.exp2(top - m_y)
    else:
        l_x = tl.sum(tl.exp2(z - m_x[:, None]), 1)
        l_y = tl.sum(tl.exp2(z - m_y[None, :]), 0)
    return l_x, l_y


@triton.jit
def _weighed(z, m_x, w_x, m_y, w_y):
    """w_i 2^(z_ij - m_i) + w_j 2^(z_ij - m_j)."""
    low = tl.minimum(tl.min(m_x, 0), tl.min(m_y, 0))
    if tl.maximum(tl.max(m_x, 0), tl.max(m_y, 0)) - low <= SPREAD:
        v_x, v_y = tl.exp2(low - m_x) * w_x, tl.exp2(low - m_y) * w_y
        w = tl.exp2(z - low) * (v_x[:, None] + v_y[None, :])
    else:
        w = tl.exp2(z - m_x[:, None]) * w_x[:, None]
        w += tl.exp2(z - m_y[None, :]) * w_y[None, :]
    return w


@triton.jit
def _summarize(
    X, Y, S, A_X, A_Y, SCALE, X_IDS, Y_IDS, ROWS, COLS, i0, j0, R, C, M, N, x_row, y_row,
    ENDS: tl.constexpr, RULES: tl.constexpr, PLACES: tl.constexpr, UNEQUAL: tl.constexpr,
    HALF: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    side: tl.constexpr = max(BLOCK_M, BLOCK_N)
    square_i, square_j = tl.program_id(0) * BLOCK_M // side, tl.program_id(1) * BLOCK_N // side
    if HALF:  # below the diagonal of symmetric scores, in squares, stands what is above it
        if square_j < square_i:
            return
    P: tl.constexpr = len(ENDS) - 1  # pyright: ignore
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (i < R)[:, None] & (j < C)[None, :]
    x, y = i0 + tl.minimum(i, R - 1), j0 + tl.minimum(j, C - 1)
    whole = all_kept(x, y, X_IDS, Y_IDS, M, N, PLACES, UNEQUAL) & _is_full(R, C, BLOCK_M, BLOCK_N)
    X += x.to(tl.int64)[:, None] * x_row
    Y += y.to(tl.int64)[:, None] * y_row
    at, size = i.to(tl.int64)[:, None] * C + j[None, :], tl.full((), R, tl.int64) * C
    ROWS += tl.program_id(1).to(tl.int64) * 2 * P * R
    mirrored = C
    if HALF:  # on the diagonal the rows have all pairs
        mirrored = tl.where(square_i < square_j, C, 0)
    if COLS is not None:
        COLS += tl.program_id(0).to(tl.int64) * 2 * P * C
    s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(_steps(ENDS, BLOCK_D)):  # one loop, so that loads run ahead of the scores
        p, start, stop = _place(step, ENDS, BLOCK_D)
        if S is None:
            s = _grown(s, X, Y, start, stop, PRECISION, BLOCK_D)
        else:
            s = tl.load(S + p * size + at, inside, 0.0)
        if start + BLOCK_D >= stop:
            c = s * tl.load(A_X + p * M + x)[:, None] * tl.load(A_Y + p * N + y)[None, :]
            z = scored(
                c, x, y, inside, whole, SCALE, None, X_IDS, Y_IDS, M, N,
                RULES, PLACES, False, False,
            )  # fmt: skip
            m_x = tl.maximum(tl.max(z, 1), LEAST)
            if COLS is None:
                l_x = tl.sum(tl.exp2(z - m_x[:, None]), 1)
            else:
                m_y = tl.maximum(tl.max(z, 0), LEAST)
                l_x, l_y = _totals(z, m_x, m_y)
                tl.store(COLS + p * C + j, m_y, j < mirrored)
                tl.store(COLS + (P + p) * C + j, l_y, j < mirrored)
            tl.store(ROWS + p * R + i, m_x, i < R)
            tl.store(ROWS + (P + p) * R + i, l_x, i < R)


@triton.jit
def _weigh(
    X, Y, S, X_SIDE, Y_SIDE, SCALE, X_IDS, Y_IDS, FP16_SCALE, W, ROWS, COLS,
    i0, j0, R, C, M, N, x_row, y_row,
    ENDS: tl.constexpr, RULES: tl.constexpr, PLACES: tl.constexpr, UNEQUAL: tl.constexpr,
    ONE_SIDED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    P: tl.constexpr = len(ENDS) - 1  # pyright: ignore
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (i < R)[:, None] & (j < C)[None, :]
    x, y = i0 + tl.minimum(i, R - 1), j0 + tl.minimum(j, C - 1)
    whole = all_kept(x, y, X_IDS, Y_IDS, M, N, PLACES, UNEQUAL) & _is_full(R, C, BLOCK_M, BLOCK_N)
    X += x.to(tl.int64)[:, None] * x_row
    Y += y.to(tl.int64)[:, None] * y_row
    at, size = i.to(tl.int64)[:, None] * C + j[None, :], tl.full((), R, tl.int64) * C
    ROWS += tl.program_id(1).to(tl.int64) * P * R
    COLS += tl.program_id(0).to(tl.int64) * P * C
    s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(_steps(ENDS, BLOCK_D)):  # one loop, so that loads run ahead of the scores
        p, start, stop = _place(step, ENDS, BLOCK_D)
        if S is None:
            s = _grown(s, X, Y, start, stop, PRECISION, BLOCK_D)
        else:
            s = tl.load(S + p * size + at, inside, 0.0)
        if start + BLOCK_D >= stop:
            row, col = X_SIDE + (p * M + x) * 3, Y_SIDE + (p * N + y) * 3
            a_x, a_y = tl.load(row), tl.load(col)
            z = scored(
                s * a_x[:, None] * a_y[None, :], x, y, inside, whole, SCALE, None, X_IDS, Y_IDS,
                M, N, RULES, PLACES, False, False,
            )  # fmt: skip
            m_x, w_x = tl.load(row + 1), tl.load(row + 2)
            if ONE_SIDED:
                w = tl.exp2(z - m_x[:, None]) * w_x[:, None]
            else:
                w = _weighed(z, m_x, w_x, tl.load(col + 1), tl.load(col + 2))
            tl.store(ROWS + p * R + i, tl.sum(w * s * a_y[None, :], 1) * a_x, i < R)
            tl.store(COLS + p * C + j, tl.sum(w * s * a_x[:, None], 0) * a_y, j < C)
            if FP16_SCALE is not None:
                w *= 1 / tl.load(FP16_SCALE)
            tl.store(W + at + p * size, w.to(W.dtype.element_ty), inside)


@triton.jit
def _gather(
    W, A_X, A_Y, B_X, B_Y, i0, j0, R, C, M, N,
    P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (i < R)[:, None] & (j < C)[None, :]
    x, y = i0 + tl.minimum(i, R - 1), j0 + tl.minimum(j, C - 1)
    size = tl.full((), R, tl.int64) * C
    W += i.to(tl.int64)[:, None] * C + j[None, :]
    g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for t in range(P):
        p = P - 1 - t
        w = tl.load(W + p * size, inside, 0.0).to(tl.float32)
        if B_X is not None:
            # A prefix of zeros has no direction.
            a_x, a_y = tl.load(A_X + p * M + x) > 0, tl.load(A_Y + p * N + y) > 0
            w *= a_x.to(tl.float32)[:, None] * a_y.to(tl.float32)[None, :]
            g *= tl.load(B_X + p * M + x)[:, None] * tl.load(B_Y + p * N + y)[None, :]
        g += w
        tl.store(W + p * size, g.to(W.dtype.element_ty), inside)


class _Pass:
    """What the launches share: the configuration, and the kernels' arguments that stay."""

    def __init__(self, kernel: Kernel, nested: Nested, both: bool) -> None:
        q, k, exact = nested.q, nested.k, dtype_class(nested.q.x)
        self.config = config_for(kernel, f"{exact}-{'both' if both else 'rows'}", q.x.device)
        self.given, self.one_sided, self.P = exact == "float32", not both, len(q.dims)
        self.scoring = nested.scale.float().contiguous(), nested.row_ids, nested.col_ids
        self.sizes, self.strides = (len(q), len(k)), (q.x.stride(0), k.x.stride(0))
        rules, places = triton_rules(nested.mask)
        self.constants = {
            "ENDS": tuple(range(self.P + 1))
            if self.given
            else q.ends,  # a step each, or as they are
            **{"RULES": rules, "PLACES": places, "UNEQUAL": unequal(nested.mask)},
            "PRECISION": precision("tf32" if exact == "tf32" else "ieee"),
            **self.config.arguments,
        }
        self.pair_bytes = self.P * (4 if q.x.dtype == torch.float32 else 2)  # of products or W

    def tiles(self, R: int, C: int) -> tuple[int, int]:
        """Tiles of a block's rows and columns."""
        sizes = self.config.blocks
        return triton.cdiv(R, sizes["BLOCK_M"]), triton.cdiv(C, sizes["BLOCK_N"])


def _products(q: Rows, k: Rows, i: slice, j: slice) -> Tensor:
    """S (P, R, C) of a block, by cuBLAS."""
    parts = [(q.x[i, part], k.x[j, part].T) for part in q.parts]
    s = q.x.new_empty(len(parts), i.stop - i.start, j.stop - j.start)
    for p, (x, y) in enumerate(parts):
        torch.addmm(s[max(p - 1, 0)], x, y, beta=min(p, 1), out=s[p])
    return s


def statistics(nested: Nested, both: bool) -> tuple[Tensor, Tensor]:
    """Statistics (2, P, M) of the rows, and (2, P, N) of the columns: (2, P, 0) unless `both`.

    In log2 units; those of columns are the rows', in another tensor, of symmetric scores.
    """
    q, k, same = nested.q, nested.k, nested.same
    mirrored = both or same
    made = _Pass(SUMMARIZE, nested, mirrored)
    rows = _none(made.P, len(q), made.scoring[0])
    cols = rows if same else _none(made.P, len(k) if both else 0, rows)
    least = min(made.config.blocks["BLOCK_M"], made.config.blocks["BLOCK_N"])
    area = BLOCK_BYTES // (made.pair_bytes if made.given else triton.cdiv(16 * made.P, least))
    for i, keys in strips(len(q), len(k), same, max(1, area)):
        for j in keys:
            R, C, half = i.stop - i.start, j.stop - j.start, same and i == j
            grid = made.tiles(R, C)
            of_rows, of_cols = (
                _none(made.P, n, rows, tiles) if half else rows.new_empty(tiles, 2, made.P, n)
                for n, tiles in zip((R, C if mirrored else 0), grid[::-1], strict=True)
            )
            s = _products(q, k, i, j) if made.given else None
            with torch.cuda.device_of(rows):
                _summarize[grid](
                    q.x, k.x, s, q.factors, k.factors, *made.scoring, of_rows,
                    of_cols if mirrored else None, i.start, j.start, R, C, *made.sizes,
                    *made.strides, HALF=half, **made.constants,
                )  # fmt: skip
            rows[..., i] = join(rows[..., i], folded(of_rows))
            if mirrored:
                cols[..., j] = join(cols[..., j], folded(of_cols))
    if not both:
        return rows, rows.new_empty(2, made.P, 0)
    return rows, cols.clone() if same else cols


def _none(P: int, n: int, like: Tensor, parts: int | None = None) -> Tensor:
    """Statistics (2, P, n) of no pair, or (parts, 2, P, n)."""
    stats = like.new_zeros(*(() if parts is None else (parts,)), 2, P, n)
    stats.select(-3, 0).fill_(LEAST.value)
    return stats


def gradients(
    nested: Nested, rows: Tensor, cols: Tensor | None, need: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients to q, k and scale in float32; what is not needed has no elements.

    rows, cols: the `weights` of rows and columns, None for a side without upstream gradient.  Of
    symmetric scores rows alone, and the whole gradient is in that of q.
    """
    (q, k, *_), same = nested, nested.same
    cols = rows if same else cols
    need_q, need_k, need_scale = need[0] or same, need[1] and not same, need[2]
    made = _Pass(WEIGH, nested, cols is not None)
    scale, sizes = made.scoring[0], (len(q), len(k))
    one = scale.new_full((), made.P)
    factor = fp16_scale([rows, cols], one) if q.x.dtype == torch.float16 else None
    sides = [q.side(rows), k.side(cols)]
    u, v = ([scale.new_zeros(z.x[:, part].shape) for part in z.parts] for z in (q, k))
    v = u if same else v
    radial = [scale.new_zeros(made.P, n) for n in sizes]
    radial = radial[:1] * 2 if same else radial
    for i, keys in strips(*sizes, same, max(1, BLOCK_BYTES // made.pair_bytes)):
        for j in keys:
            w, of_rows, of_cols = weigh(made, nested, sides, factor, i, j)
            radial[0][:, i] += summed(of_rows)
            if not (same and i == j):
                radial[1][:, j] += summed(of_cols)
            _gathered(w, nested, i, j)
            for c in range(made.P):
                if need_q:
                    add_product(u[c][i], w[c], k.referred[c][j])
                if need_k or same and i != j:
                    add_product(v[c][j], w[c].T, q.referred[c][i])
    if factor is not None:
        u, v = ([x * factor for x in z] for z in (u, v))
    none = scale.new_empty
    # Of symmetric scores each pair stands in the sums twice, once from either side.
    dscale = radial[0].sum() / (2 if same else 1) if need_scale else none(0)
    dq = q.gradient(u, scale, radial[0]) if need_q else none(0)
    return dq, k.gradient(v, scale, radial[1]) if need_k else none(0), dscale


def weigh(
    made: _Pass, nested: Nested, sides: list[Tensor], factor: Tensor | None, i: slice, j: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """W (P, R, C) of a block, over `factor`; by tile its sums with cosines (tiles, P, R or C)."""
    q, k = nested.q, nested.k
    R, C = i.stop - i.start, j.stop - j.start
    grid, sums = made.tiles(R, C), sides[0].new_empty
    of_rows, of_cols = sums(grid[1], made.P, R), sums(grid[0], made.P, C)
    s = _products(q, k, i, j) if made.given else None
    w = q.x.new_empty(made.P, R, C) if s is None else s  # in its place
    with torch.cuda.device_of(w):
        _weigh[grid](
            q.x, k.x, s, *sides, *made.scoring, factor, w, of_rows, of_cols, i.start, j.start, R, C,
            *made.sizes, *made.strides, ONE_SIDED=made.one_sided, **made.constants,
        )  # fmt: skip
    return w, of_rows, of_cols


def _gathered(w: Tensor, nested: Nested, i: slice, j: slice) -> None:
    """W (P, R, C) of a block becomes G."""
    (q, k, *_), (P, R, C) = nested, w.shape
    config = config_for(GATHER, dtype_name(w), w.device)
    grid = triton.cdiv(R, config.blocks["BLOCK_M"]), triton.cdiv(C, config.blocks["BLOCK_N"])
    with torch.cuda.device_of(w):
        _gather[grid](
            w, q.inverse, k.inverse, q.ratios, k.ratios, i.start, j.start, R, C, len(q), len(k),
            P=P, **config.arguments,
        )  # fmt: skip


def _try_weigh(nested: Nested, both: bool) -> Any:
    """What the tuner times: a block."""
    rows, cols = (torch.ones(2, len(z.dims), len(z), device=z.x.device) for z in nested[:2])
    made, sides = _Pass(WEIGH, nested, both), [nested.q.side(rows), nested.k.side(cols)]
    one = rows.new_ones(())
    factor = fp16_scale([rows, cols], one) if nested.q.x.dtype == torch.float16 else None
    return [x.float() for x in weigh(made, nested, sides, factor, *_try_block(nested))]


def _try_block(nested: Nested) -> tuple[slice, slice]:
    """Of 8192 rows, 2048 x 4096 pairs."""
    return slice(0, len(nested.q) // 4), slice(0, len(nested.k) // 2)


def _try_gather(nested: Nested, both: bool) -> Any:
    """The same of the sums over prefixes."""
    i, j = _try_block(nested)
    w = nested.q.x.new_ones(len(nested.q.dims), i.stop, j.stop)
    _gathered(w, nested, i, j)
    return w


def _register(name: str, fn: Any, launch: Any, variants: Any) -> Kernel:
    return register(Kernel(name, fn, variants(name, fn, launch)))


SUMMARIZE = _register("pairwise_nested_summarize", _summarize, statistics, tile_variants)
WEIGH = _register("pairwise_nested_weigh", _weigh, _try_weigh, tile_variants)
GATHER = _register("pairwise_nested_gather", _gather, _try_gather, gather_variants)
