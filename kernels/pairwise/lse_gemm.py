"""Pairwise log-sum-exps as products of blocks and one Triton pass each: for large D, and float32.

A strip of rows meets the keys a block at a time:

    S = X_i Y_j^T            cuBLAS, float32, a block of at most BLOCK_BYTES
    forward    _summarize    reads S once: maxima and sums of its rows and of its columns
    backward   _weigh        reads S once, writes W in the inputs' dtype (and sums of its columns)
               dq_i += W Y_j     dk_j += W^T X_i

Units of 2 M N D operations: 1 forward, 3 backward, for rows and columns together.  When q is k only
blocks on and above the diagonal are computed: half of that.  No atomics: the same bits each run.
W is rounded to the inputs' dtype; in float16 it is divided by FP16_SCALE first.
Memory: a block of S and of W, one strip's sums of columns, gradients in float32.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.chunks import spans
from ..common.launch import ROWS, Part, configs, dtype_name, kernel_by_part, launcher, named, random
from ..common.matmul import add_product, product
from ..common.tuning import Config, Kernel, config_for
from .lse_configs import MASKED
from .lse_torch import Grads, Pairs, weights
from .masks import Masks, TritonRules, exclude_self, triton_rules
from .scores_triton import LEAST, folded, fp16_scale, join, log_sum, scored, weighed

__all__ = ["SUMMARIZE", "WEIGH", "gradients", "join", "log_sum", "statistics", "weights"]

# Of S.  An H200's L2 would hold an eighth of it, but such a block's launches, reckoned at 60 us
# forward and 105 us backward, take longer than the GPU's work on it, and the gradients' products
# would be 48 to 96 tiles for 132 multiprocessors.
BLOCK_BYTES = 1 << 28


@triton.jit
def _summarize(
    S, SCALE, BIAS, ROW_IDS, COL_IDS, ROWS, COLS, i0, j0, R, C, M, N, width,
    RULES: tl.constexpr, PLACES: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (i < R)[:, None] & (j < C)[None, :]
    x, y = tl.minimum(i0 + i, M - 1), tl.minimum(j0 + j, N - 1)
    s = tl.load(S + i.to(tl.int64)[:, None] * C + j[None, :], inside, 0.0)
    s = scored(
        s, x, y, inside, False, SCALE, BIAS, ROW_IDS, COL_IDS, M, N,
        RULES, PLACES, False, VECTOR,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    m = tl.maximum(tl.max(s, 1), LEAST)
    ROWS += tl.program_id(1).to(tl.int64) * 2 * R
    tl.store(ROWS + i, m, i < R)
    tl.store(ROWS + R + i, tl.sum(tl.exp2(s - m[:, None]), 1), i < R)
    if COLS is not None:
        m_y = tl.maximum(tl.max(s, 0), LEAST)
        COLS += tl.program_id(0).to(tl.int64) * 2 * width
        tl.store(COLS + j, m_y, j < C)
        tl.store(COLS + width + j, tl.sum(tl.exp2(s - m_y[None, :]), 0), j < C)


@triton.jit
def _weigh(
    S, SCALE, BIAS, ROW_IDS, COL_IDS, ROW_SIDE, COL_SIDE, FP16_SCALE, W, SUMS, i0, j0, R, C, M, N,
    RULES: tl.constexpr, PLACES: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (i < R)[:, None] & (j < C)[None, :]
    x, y = tl.minimum(i0 + i, M - 1), tl.minimum(j0 + j, N - 1)
    at = i.to(tl.int64)[:, None] * C + j[None, :]
    s = tl.load(S + at, inside, 0.0)
    s = scored(
        s, x, y, inside, False, SCALE, BIAS, ROW_IDS, COL_IDS, M, N,
        RULES, PLACES, False, VECTOR,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    w = weighed(s, None, x, y, ROW_SIDE, COL_SIDE, M, N)
    if SUMS is not None:
        tl.store(SUMS + tl.program_id(0).to(tl.int64) * C + j, tl.sum(w, 0), j < C)
    if FP16_SCALE is not None:
        w *= 1 / tl.load(FP16_SCALE)
    tl.store(W + at, w.to(W.dtype.element_ty), inside)


def strips(M: int, N: int, same: bool, area: int) -> Iterator[tuple[slice, list[slice]]]:
    """Strips of rows, each with the blocks of keys it meets; of symmetric scores from itself on.

    area: the most pairs of a block.  Sides are even, so that rows of a block begin where the widest
    loads do.
    """
    C = min(N, _even(math.isqrt(2 * area)))
    for i in spans(M, min(M, _even(area // C))):
        start = i.stop if same else 0
        rest = [slice(start + j.start, start + j.stop) for j in spans(N - start, C)]
        yield i, [i, *rest] if same else rest


def _even(side: int) -> int:
    """At most that, and a multiple of 128 where it is as long."""
    return max(1, side - side % 128 if side > 128 else side)


def _blocks(pairs: Pairs) -> Iterator[tuple[slice, list[slice]]]:
    """`strips` of float32 scores."""
    return strips(len(pairs.q), len(pairs.k), pairs.same, BLOCK_BYTES // 4)


class _Pass:
    """What the two kernels share: the configuration, the first and the last of their arguments."""

    def __init__(self, kernel: Kernel, pairs: Pairs) -> None:
        plain = pairs.bias is None and pairs.scale.ndim == 0
        part = "plain" if plain else "full"
        self.config = config_for(kernel, f"{dtype_name(pairs.q)}-{part}", pairs.q.device)
        self.scale = pairs.scale.float().contiguous()
        bias = None if pairs.bias is None else pairs.bias.float().contiguous()
        self.scoring = self.scale, bias, pairs.row_ids, pairs.col_ids
        rules, places = triton_rules(pairs.mask)
        self.constants = {"RULES": rules, "PLACES": places, "VECTOR": pairs.scale.ndim == 1}

    def blocks(self, R: int, C: int) -> tuple[int, int]:
        """Blocks of a block's rows and columns."""
        sizes = self.config.blocks
        return triton.cdiv(R, sizes["BLOCK_M"]), triton.cdiv(C, sizes["BLOCK_N"])


def statistics(pairs: Pairs, both: bool) -> tuple[Tensor, Tensor]:
    """As lse_torch.statistics, in log2 units."""
    summary, M, N = _Pass(SUMMARIZE, pairs), len(pairs.q), len(pairs.k)
    rows = _none(M, summary.scale)
    cols = rows if pairs.same else _none(N if both else 0, summary.scale)
    for i, keys in _blocks(pairs):
        R = i.stop - i.start
        first = i.stop if pairs.same else 0  # columns whose sums this strip adds to
        counts = [summary.blocks(R, j.stop - j.start) for j in keys]
        row_parts = rows.new_empty(sum(n for _, n in counts), 2, R)
        col_parts = rows.new_empty(counts[0][0], 2, max(cols.shape[1] - first, 0))
        at = 0
        for j, (_, n) in zip(keys, counts, strict=True):
            mirrored = col_parts.numel() > 0 and j.start >= first
            seen = col_parts[:, :, j.start - first :] if mirrored else None
            s = product(pairs.q[i], pairs.k[j].T)
            with torch.cuda.device_of(s):
                _summarize[summary.blocks(*s.shape)](
                    s, *summary.scoring, row_parts[at : at + n], seen, i.start, j.start, *s.shape,
                    M, N, col_parts.shape[2], **summary.constants, **summary.config.arguments,
                )  # fmt: skip
            at += n
        rows[:, i] = join(rows[:, i], folded(row_parts))
        if col_parts.numel():
            cols[:, first:] = join(cols[:, first:], folded(col_parts))
    if not both:
        return rows, rows.new_empty(2, 0)
    return rows, cols.clone() if pairs.same else cols


def _none(n: int, like: Tensor) -> Tensor:
    """Statistics (2, n) of no pair."""
    stats = like.new_zeros(2, n)
    stats[0] = LEAST.value
    return stats


def gradients(
    pairs: Pairs, rows: Tensor | None, cols: Tensor | None, need: tuple[bool, bool, bool, bool]
) -> Grads:
    """As lse_torch.gradients."""
    weighing, (q, k, scale, *_), same = _Pass(WEIGH, pairs), pairs, pairs.same
    cols = rows if same else cols
    need_q, need_k, need_scale, need_bias = need
    by_row = weighing.scale[:, None] if scale.ndim else weighing.scale
    one = weighing.scale.new_ones(())
    factor = fp16_scale([rows, cols], one) if q.dtype == torch.float16 else None
    u = weighing.scale.new_zeros(q.shape if need_q or need_scale or same else 0)
    dk = weighing.scale.new_zeros(k.shape if need_k and not same else 0)
    dbias = weighing.scale.new_zeros(len(k) if need_bias else 0)
    for i, keys in _blocks(pairs):
        x = (q[i] * scale[i, None]).to(q.dtype) if scale.ndim and dk.numel() else q[i]
        for j in keys:
            s = product(q[i], k[j].T)
            w = torch.empty_like(s, dtype=q.dtype)
            sums = s.new_empty(weighing.blocks(*s.shape)[0], s.shape[1]) if need_bias else None
            with torch.cuda.device_of(s):
                _weigh[weighing.blocks(*s.shape)](
                    s, *weighing.scoring, rows, cols, factor, w, sums, i.start, j.start, *s.shape,
                    len(q), len(k), **weighing.constants, **weighing.config.arguments,
                )  # fmt: skip
            if u.numel():
                add_product(u[i], w, k[j])
            if same and i != j:
                add_product(u[j], w.T, q[i])
            if dk.numel():
                add_product(dk[j], w.T, x)
            if sums is not None:
                dbias[j] += sums.sum(0)
    if factor is not None:
        u, dk = u * factor, dk * factor
    dscale = weighing.scale.new_empty(0)
    if need_scale:
        dscale = (q * u).sum(1)
        # Of symmetric scores each pair stands in u twice, once from either side.
        dscale = dscale if scale.ndim else dscale.sum() / (2 if same else 1)
    dq = u * by_row if need_q or same else u.new_empty(0)
    return Grads(dq, dk if scale.ndim else dk * by_row, dscale, dbias)


TRIAL = (4096, 2048)  # rows and keys of a tuner's launch
CONFIGS = configs(
    "BLOCK_M BLOCK_N", [(32, 128, 4, 1), (64, 64, 8, 1), (32, 256, 8, 1), (64, 128, 8, 1)]
)
PLAIN = dict.fromkeys(("BIAS", "ROW_IDS", "COL_IDS", "SUMS"))
PARTS = {  # "full": with rules on ids, a bias and a scale for each row
    "plain": Part({**PLAIN, "RULES": TritonRules(), "PLACES": (), "VECTOR": False}, CONFIGS),
    "full": Part({**MASKED, "VECTOR": True}, CONFIGS),
}
TYPES = named("i32:16", "i0 j0 R C M N width") | named("*i64:16", "ROW_IDS COL_IDS")
TYPES |= named("*fp32:16", "S SCALE BIAS ROWS COLS ROW_SIDE COL_SIDE FP16_SCALE SUMS")
TYPES |= named(ROWS, "W")


def _try(kernel: str, dtype: str, part: str, config: Config, device: torch.device) -> Any:
    """One block of scores, forward or backward, with `config`."""
    M, N = TRIAL
    q = random(dtype, device, M, 64)
    scale, bias, mask = torch.full((), 0.1, device=device), None, Masks()
    if part == "full":
        scale, bias = scale.expand(M).contiguous(), scale.new_zeros(N)
        mask = exclude_self(torch.arange(M, device=device), torch.arange(N, device=device))
    pairs = Pairs(q, q[:N], scale, bias, *mask.ids(), mask.key, False)
    if kernel == SUMMARIZE.name:
        return launcher(kernel, config, statistics, pairs, True)
    sides = [torch.ones(2, n, device=device) for n in (M, N)]
    need = True, True, True, part == "full"
    run = lambda: gradients(pairs, sides[0], sides[1], need)  # noqa: E731
    return launcher(kernel, config, lambda: [x for x in run() if x.numel()])


SUMMARIZE, WEIGH = (
    kernel_by_part(name, fn, TYPES, PARTS, partial(_try, name))
    for name, fn in (("pairwise_summarize", _summarize), ("pairwise_weigh", _weigh))
)
