"""The n best similarities of each row in Triton; topk.py says what it is.

    s_ij = q_i . k_j                                     M rows, N columns, D features
    key_ij = rank(s_ij) 2^32 + 2^31 - 1 - j              one int64: the score, then the place
    rank   = the bits of a float32 as an int32 that sorts as the numbers do, a NaN above them all

A program has BLOCK_M rows, a share of the columns, and each row's n best keys so far in registers.
A tile where no score passes its row's worst kept one, as in most, costs a comparison.  In another
each row's best key takes the place of its worst kept one, until no row has a better: about
n ln(N / n) times a row in all.  Where the rows alone would not fill the GPU, several programs
share the columns, and torch.topk joins their candidates; it sorts them in any case.
Traffic: k once for each block of rows, mostly from L2, and q as often where D has more features
than a block; 8 n bytes out for each row and share.
Memory: 8 n M bytes for each share.  In place: nothing.
In the kernels capitals are pointers, and ids that are not given are positions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.triton import dot, precision, rows_contiguous
from ..common.tuning import Config, Kernel, config_for, register
from .masks import triton_rules
from .masks_triton import exclude_self, kept
from .scores_triton import column_share, product
from .topk_configs import shape_class, variants

DROPPED = tl.constexpr(-(1 << 63))  # the key of a pair that is not there: below all others
NAN = tl.constexpr(0x7FC00000)  # its bits, whatever its sign was
MINUS_INFINITY = tl.constexpr(-0x7F800001)  # its rank
PAST = tl.constexpr((1 << 63) - 1)  # fills the slots beyond n: above all keys, never replaced


@triton.jit
def _keys(s, col):
    """The int64 keys of scores s (R, C) of columns col (C,); no two of a row are equal."""
    bits = tl.where(s == s, s.to(tl.int32, bitcast=True), NAN)
    rank = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (rank.to(tl.int64) << 32) + (0x7FFFFFFF - col)[None, :]


@triton.jit
def _score(key):
    """The score in a key."""
    rank = (key >> 32).to(tl.int32)
    return (rank ^ ((rank >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _topk(
    Q, K, ROW_IDS, COL_IDS, KEYS, M, N, D, n, share, q_row, k_row,
    RULES: tl.constexpr, PLACES: tl.constexpr, PRECISION: tl.constexpr, SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    here = tl.minimum(row, M - 1)  # rows past the end repeat the last, and are not stored
    first = tl.program_id(1) * share
    d = tl.arange(0, BLOCK_D)[None, :]
    Q += here[:, None] * q_row
    held: tl.constexpr = BLOCK_D >= WIDTH
    if held:
        q = tl.load(Q + d, d < D, 0.0)
    slot = tl.arange(0, SLOTS)[None, :]
    empty = (tl.full((BLOCK_M, SLOTS), MINUS_INFINITY, tl.int64) << 32) + slot  # no two alike
    best = tl.where(slot < n, empty, PAST)
    worst = tl.min(best, 1)
    for start in range(first, tl.minimum(first + share, N), BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        there = tl.minimum(col, N - 1)
        ok = col < N
        k = K + there.to(tl.int64)[:, None] * k_row
        if held:
            k = tl.load(k + d, ok[:, None] & (d < D), 0.0)
            s = dot(q, k.T, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        else:
            s = product(Q, k, d, ok, D, PRECISION)
        keep = tl.zeros_like(s).to(tl.int1) | ok[None, :]
        if len(RULES) > 0:
            keep = keep & kept(here, there, ROW_IDS, COL_IDS, M, N, RULES, PLACES, False)
        ahead = keep & ((s > _score(worst)[:, None]) | (s != s))
        if tl.max(tl.max(ahead.to(tl.int32), 1), 0) > 0:
            keys = tl.where(ahead, _keys(s, col), DROPPED)
            top = tl.max(keys, 1)
            while tl.max((top > worst).to(tl.int32), 0) > 0:
                taken = (best == worst[:, None]) & (top > worst)[:, None]
                best = tl.where(taken, top[:, None], best)
                keys = tl.where(keys == top[:, None], DROPPED, keys)
                worst, top = tl.min(best, 1), tl.max(keys, 1)
    at = ((row * tl.num_programs(1) + tl.program_id(1)) * n)[:, None] + slot
    tl.store(KEYS + at, best, (row < M)[:, None] & (slot < n))


def topk(
    q: Tensor,
    k: Tensor,
    n: int,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    mask: str,
    choice: tuple[str, Config] | None = None,
) -> tuple[Tensor, Tensor]:
    """Values (M, n) float32 and indices (M, n) int64, best first.

    mask: that of `Masks.key`.  choice: a shape class by name, and the configuration to launch.
    """
    q, k, (M, D), N = rows_contiguous(q), rows_contiguous(k), q.shape, len(k)
    name = shape_class(q, n)
    name, config = choice or (name, config_for(TOPK, name, q.device))
    rows = triton.cdiv(M, config.blocks["BLOCK_M"])
    share = column_share(rows, N, config.blocks["BLOCK_N"], q.device, 4, 4 * n)
    constants, (rules, places) = TOPK.variants[name].constexprs, triton_rules(mask)
    keys = torch.empty(M, triton.cdiv(N, share) * n, dtype=torch.int64, device=q.device)
    with torch.cuda.device_of(q):
        _topk[rows, triton.cdiv(N, share)](
            q, k, row_ids, col_ids, keys, M, N, D, n, share, q.stride(0), k.stride(0),
            RULES=rules, PLACES=places, PRECISION=precision(constants["PRECISION"]),
            SLOTS=constants["SLOTS"], WIDTH=constants["WIDTH"],
            **config.arguments,
        )  # fmt: skip
    return _decoded(keys.topk(n, dim=1).values)


def _decoded(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The scores and the places in keys, as `_keys` puts them there."""
    rank = (keys >> 32).to(torch.int32)
    scores = (rank ^ ((rank >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return scores, 0x7FFFFFFF - (keys & 0x7FFFFFFF)


TOPK = register(Kernel("pairwise_topk", _topk, variants(_topk, exclude_self, topk)))
