"""The cross-entropy from features and prototypes in Triton, by linear_torch's functions.

A program of the forward keeps some rows' maxima and sums, of either side, and streams prototypes:
the two products of a tile give its part of all of them.

    forward    the largest logits, the sums of exponentials from there, sum_k q_k (s_k - top)
    backward   rows: dx_i = g_i / a sum_k W_ik w_k        W_ik = p_ik - q_ik
               cols: dw_k = sum_i W_ik g_i / a x_i        x and w, y and u, change places

Where the rows alone would not fill the GPU, several programs share the prototypes, or the rows, and
what they make is joined.  Each further BLOCK_O features cost the scores of a tile once more.  No
atomics: the same bits each run.  W is rounded to the inputs' dtype for its product, in float16
FINE times as large, and the rows' gradients there in units of the largest.
In the kernels capitals are pointers.  Logits are scaled when the largest is taken off.  Row indices
are int64, as row * stride passes 2**31.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import FLOATS, ROWS, configs, launcher, named, random, variant
from ..common.rows import evened
from ..common.triton import dot, precision
from ..common.tuning import Config, Kernel, Variant, config_for, register
from ..pairwise.classes import dtype_class
from ..pairwise.scores_triton import column_share, product, summed
from .linear_torch import FINE
from .soft_triton import LOG2E, joined


@triton.jit
def _forward(
    X, W, Y, U, C, TOP, SUM, FAR, R, K, D, E, share, sharp_s, sharp_t, x_row, w_row, y_row, u_row,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """TOP, SUM (parts, 2, R), the student's first; FAR (parts, R)."""
    part = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    here = tl.minimum(row, R - 1)[:, None]  # rows past the end repeat the last, and are not stored
    d = tl.arange(0, BLOCK_D)[None, :]
    X += here * x_row
    Y += here * y_row
    top_s = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    top_t = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    sum_s, sum_t = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    far = tl.zeros((BLOCK_M,), tl.float32)
    first = tl.program_id(1) * share
    for n in range(first, tl.minimum(first + share, K), BLOCK_N):
        k = n + tl.arange(0, BLOCK_N)
        ok, there = k < K, tl.minimum(k, K - 1).to(tl.int64)[:, None]
        s = product(X, W + there * w_row, d, ok, D, PRECISION)
        t = product(Y, U + there * u_row, d, ok, E, PRECISION)
        if C is not None:
            t -= tl.load(C + k, ok, 0.0)[None, :]
        s = tl.where(ok[None, :], s, -float("inf"))
        t = tl.where(ok[None, :], t, -float("inf"))
        high_s, high_t = tl.maximum(top_s, tl.max(s, 1)), tl.maximum(top_t, tl.max(t, 1))
        s -= high_s[:, None]
        e = tl.exp2((t - high_t[:, None]) * sharp_t)
        fade_t = tl.exp2((top_t - high_t) * sharp_t)
        sum_s = sum_s * tl.exp2((top_s - high_s) * sharp_s) + tl.sum(tl.exp2(s * sharp_s), 1)
        s = tl.where(ok[None, :], s, 0.0)
        moved = tl.where(n == first, 0.0, top_s - high_s)
        far = (far + moved * sum_t) * fade_t + tl.sum(s * e, 1)
        sum_t = sum_t * fade_t + tl.sum(e, 1)
        top_s, top_t = high_s, high_t
    at = part * 2 * R + row
    tl.store(TOP + at, top_s, row < R)
    tl.store(TOP + R + at, top_t, row < R)
    tl.store(SUM + at, sum_s, row < R)
    tl.store(SUM + R + at, sum_t, row < R)
    tl.store(FAR + part * R + row, far / sum_t, row < R)


@triton.jit
def _backward(
    G, A, B, P, Q, C, TOP, SUM, OUT, M, N, D, E, share, sharp_s, sharp_t, fine,
    a_row, b_row, p_row, q_row,
    COLS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """OUT (shares, M, D) of the M rows of A, which meet the N of B; P and Q: the teacher's.

    COLS: A is of prototypes, and B of rows.  TOP, SUM (2, rows), G (rows,).
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    here = tl.minimum(row, M - 1)
    d = tl.arange(0, BLOCK_D)[None, :]
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)[None, :]
    A += here[:, None] * a_row
    P += here[:, None] * p_row
    gone = -float("inf")  # the score of what is past the end
    u = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    first = tl.program_id(2) * share
    for n in range(first, tl.minimum(first + share, N), BLOCK_N):
        col = n + tl.arange(0, BLOCK_N)
        ok, there = col < N, tl.minimum(col, N - 1).to(tl.int64)
        Bt = B + there[:, None] * b_row
        s = product(A, Bt, d, ok, D, PRECISION)
        t = product(P, Q + there[:, None] * q_row, d, ok, E, PRECISION)
        if COLS:
            if C is not None:
                t -= tl.load(C + here)[:, None]
            s = (s - tl.load(TOP + there)[None, :]) * sharp_s
            t = (t - tl.load(TOP + N + there)[None, :]) * sharp_t
            p = tl.exp2(tl.where(ok[None, :], s, gone)) * (fine / tl.load(SUM + there))[None, :]
            q = tl.exp2(tl.where(ok[None, :], t, gone)) * (fine / tl.load(SUM + N + there))[None, :]
            w = (p - q) * tl.load(G + there)[None, :]
        else:
            if C is not None:
                t -= tl.load(C + there)[None, :]
            s = (s - tl.load(TOP + here)[:, None]) * sharp_s
            t = (t - tl.load(TOP + M + here)[:, None]) * sharp_t
            p = tl.exp2(tl.where(ok[None, :], s, gone)) * (fine / tl.load(SUM + here))[:, None]
            q = tl.exp2(tl.where(ok[None, :], t, gone)) * (fine / tl.load(SUM + M + here))[:, None]
            w = p - q
        b = tl.load(Bt + o, ok[:, None] & (o < D), 0.0)
        u = dot(w.to(b.dtype), b, u, PRECISION)
    if not COLS:
        u *= tl.load(G + here)[:, None]
    at = (tl.program_id(2).to(tl.int64) * M + row)[:, None] * D + o
    tl.store(OUT + at, u / fine, (row < M)[:, None] & (o < D))


def cross_entropies(
    x: Tensor,
    w: Tensor,
    teacher_x: Tensor,
    teacher_w: Tensor,
    center: Tensor | None,
    pairs: list[float],
    sharp_s: float,
    sharp_t: float,
) -> tuple[Tensor, Tensor]:
    """Of one view and one of the teacher: the losses (1, R), and the tops and sums (2, 2, R)."""
    rows = [evened(z) for z in (x[0], w, teacher_x[0], teacher_w)]
    (R, D), K, E = rows[0].shape, len(w), rows[2].shape[1]
    name, config = _choose(FORWARD, x)
    blocks = triton.cdiv(R, config.blocks["BLOCK_M"])
    share = column_share(blocks, K, config.blocks["BLOCK_N"], x.device)
    parts = triton.cdiv(K, share)
    top, sums = x.new_empty(2, parts, 2, R, dtype=torch.float32)
    far = top.new_empty(parts, R)
    if R:
        with torch.cuda.device_of(x):
            _forward[(blocks, parts)](
                *rows, _flat(center), top, sums, far, R, K, D, E, share,
                sharp_s * LOG2E, sharp_t * LOG2E, *(z.stride(0) for z in rows),
                PRECISION=_precision(FORWARD, name), **config.arguments,
            )  # fmt: skip
    one = far.new_ones(1, 1)
    loss, stats = joined(top, sums, far[:, None, None], one, sharp_s, sharp_t)
    return loss.mul_(pairs[0]), stats


def gradients(
    grad: Tensor,
    stats: Tensor,
    need_x: bool,
    need_w: bool,
    x: Tensor,
    w: Tensor,
    teacher_x: Tensor,
    teacher_w: Tensor,
    center: Tensor | None,
    pairs: list[float],
    sharp_s: float,
    sharp_t: float,
) -> tuple[Tensor, Tensor]:
    """As linear_torch.gradients."""
    g = grad[0].float() * (sharp_s * pairs[0])
    sides = [x[0], w, teacher_x[0], teacher_w]
    rest = center, stats, sharp_s * LOG2E, sharp_t * LOG2E
    dx = dw = None
    if need_x:
        dx = _gradient(g, sides, *rest)[None]
    if need_w:
        largest: Any = 1.0
        if x.dtype == torch.float16 and len(g):
            largest = g.abs().amax().clamp_min(torch.finfo(g.dtype).tiny)
        dw = _gradient(g / largest, sides, *rest, cols=True) * largest
    return tuple(g.new_empty(0) if z is None else z for z in (dx, dw))  # pyright: ignore[reportReturnType]


def _gradient(
    g: Tensor,
    sides: list[Tensor],
    center: Tensor | None,
    stats: Tensor,
    sharp_s: float,
    sharp_t: float,
    cols: bool = False,
) -> Tensor:
    """The gradient to the student's rows, or with cols to its prototypes."""
    x, w, y, u = (evened(z) for z in sides)
    rows = [w, x, u, y] if cols else [x, w, y, u]
    (M, D), N, E = rows[0].shape, len(rows[1]), y.shape[1]
    name, config = _choose(BACKWARD, x, "-cols" if cols else "-rows")
    sizes = config.blocks
    blocks, outs = triton.cdiv(M, sizes["BLOCK_M"]), triton.cdiv(D, sizes["BLOCK_O"])
    share = column_share(blocks * outs, max(N, 1), sizes["BLOCK_N"], x.device)
    out = g.new_empty(triton.cdiv(max(N, 1), share), M, D)
    fine = FINE if x.dtype == torch.float16 else 1.0
    if M:
        with torch.cuda.device_of(x):
            _backward[(blocks, outs, len(out))](
                g, *rows, _flat(center), *stats, out, M, N, D, E, share, sharp_s, sharp_t, fine,
                *(z.stride(0) for z in rows),
                COLS=cols, PRECISION=_precision(BACKWARD, name), **config.arguments,
            )  # fmt: skip
    return summed(out)[:, : sides[0].shape[1]]


def _flat(center: Tensor | None) -> Tensor | None:
    return None if center is None else center.float().flatten().contiguous()


def _choose(kernel: Kernel, x: Tensor, ending: str = "") -> tuple[str, Config]:
    name = dtype_class(x) + ending
    return name, config_for(kernel, name, x.device)


def _precision(kernel: Kernel, name: str) -> str:
    return precision(kernel.variants[name].constexprs["PRECISION"])


# (BLOCK_M, BLOCK_N, BLOCK_D, warps, stages), and BLOCK_O after BLOCK_D.  The first is the safe one:
# its shared memory fits in 99 KB, all that a consumer GPU has.
HALF = [(64, 64, 64, 4, 3), (128, 64, 64, 8, 3), (128, 128, 64, 8, 3)]
TILES = {
    "bfloat16": HALF,
    "float16": HALF,
    "tf32": [(64, 64, 32, 4, 3), (128, 64, 32, 8, 3)],
    "float32": [(64, 32, 16, 8, 2)],
}
HALF_BACK = [(64, 64, 64, 128, 8, 2), (64, 64, 64, 256, 8, 2)]
BOTH = {
    "tf32": [(64, 32, 32, 128, 8, 2), (64, 64, 32, 128, 8, 2)],
    "float32": [(32, 32, 16, 64, 4, 2), (64, 16, 16, 128, 8, 2)],
}
TILES_BACK = {
    "rows": BOTH | dict.fromkeys(FLOATS[:2], [*HALF_BACK, (128, 64, 64, 128, 8, 3)]),
    "cols": BOTH | dict.fromkeys(FLOATS[:2], HALF_BACK),
}
TRIAL = (1024, 65536, 256)  # rows, prototypes, features

# Sizes and strides are taken to be divisible by 16, a center to be there.
TYPES = named("i32:16", "R K M N D E share x_row w_row y_row u_row a_row b_row p_row q_row")
TYPES |= named("fp32", "sharp_s sharp_t fine") | named(ROWS, "X W Y U A B P Q")
TYPES |= named("*fp32:16", "C TOP SUM FAR G OUT")


def _trial(name: str, device: torch.device) -> tuple[Any, ...]:
    """Unit rows, as those of a head."""
    dtype, (R, K, D) = name.split("-")[0], TRIAL
    of = [random(dtype, device, n, D, seed=i, unit=True) for i, n in enumerate((R, K, R, K))]
    x, w, y, u = of
    return x[None], w, y[None], u, torch.zeros(1, K, device=device), [1.0], 10.0, 25.0


def _try_forward(name: str, config: Config, device: torch.device) -> Any:
    return launcher(FORWARD.name, config, cross_entropies, *_trial(name, device))


def _try_backward(name: str, config: Config, device: torch.device) -> Any:
    sides = _trial(name, device)
    loss, stats = cross_entropies(*sides)
    need = name.endswith("-rows"), name.endswith("-cols")
    run = partial(gradients, torch.ones_like(loss), stats, *need, *sides)
    return launcher(BACKWARD.name, config, lambda: [z for z in run() if z.numel()])


def _variants(
    fn: Any, tables: Mapping[str, Any], blocks: str, trial: Any, part: str = ""
) -> dict[str, Variant]:
    made = {}
    for dtype, table in tables.items():
        name, how = dtype + part, "tf32" if dtype == "tf32" else "ieee"
        constants, tried = {"PRECISION": how, "COLS": part == "-cols"}, configs(blocks, table)
        run, products = partial(trial, name), dtype != "float32"
        made[name] = variant(name, fn, TYPES, constants, tried, run, products)
    return made


_BLOCKS = "BLOCK_M BLOCK_N BLOCK_D"
_FORWARDS = _variants(_forward, TILES, _BLOCKS, _try_forward)
_BACKWARDS = {
    name: each
    for part, table in TILES_BACK.items()
    for name, each in _variants(
        _backward, table, f"{_BLOCKS} BLOCK_O", _try_backward, f"-{part}"
    ).items()
}
FORWARD = register(Kernel("linear_forward", _forward, _FORWARDS))
BACKWARD = register(Kernel("linear_backward", _backward, _BACKWARDS))
