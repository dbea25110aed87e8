"""Log-sum-exps of symmetric scores in Triton: each unordered pair of tiles once.

    l_i = sum_j 2^s_ij = sum over tiles of a tile's rows + of a tile's columns       s = s^T

Half the products and half the exponentials of lse_triton's forward, where one exponential serves
both its row and its column: that is where no score can leave +-BOUND log2 units, so that none needs
a maximum, as the norms of the rows tell (Cauchy-Schwarz; SimCLR's temperatures down to 0.025).  The
GPU tells by itself: of two launches, of this kernel and of lse_triton's, one has the work.

The blocks of rows stand in a circle: block p meets p, p + 1, ... p + T // 2, so that all programs
have as much to do.  Each tile's sums of columns go to a place of their own, at most PARTS_BYTES of
them at a time, which are added in their order.  No atomics: the same bits each run.
Traffic: a block of y a tile, from L2; 4 bytes a column of a tile.  In place: nothing.
For 16 bits and at most 256 features.  Units, names and masks as in lse_triton.py.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.chunks import spans
from ..common.triton import dot, precision, rows_contiguous
from ..common.tuning import Kernel, register
from .classes import Choice, choose
from .lse_torch import Pairs
from .masks import id_ranges, triton_rules, unequal
from .masks_triton import row_ranges, verdict
from .scores_triton import BOUND, LOG2_E, multiplier, power, scored
from .symmetric_configs import MOST_FEATURES, variants

PARTS_BYTES = 1 << 25  # of columns' sums: an H200's L2 holds them
# Pairs.  Reckoned: for fewer, a dozen launches take the host longer than half the tiles the GPU.
HALF_FROM = 1 << 29
SHARE = 32  # tiles that a program meets: the last round of programs is a small part


@triton.jit
def _half(
    X, SCALE, IDS, LOW, HIGH, MOST, ROWS, COLS, N, D, first, stop, share, x_row,
    RULES: tl.constexpr, PLACES: tl.constexpr, UNEQUAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    if not (tl.load(MOST) <= BOUND):
        return
    blocks = tl.cdiv(N, BLOCK_M)
    p = tl.program_id(0)
    row = p.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    here = tl.minimum(row, N - 1)
    d = tl.arange(0, BLOCK_D)[None, :]
    x = tl.load(X + here[:, None] * x_row + d, d < D, 0.0)
    size = multiplier(SCALE)
    ranges = row_ranges(here, IDS, N, PLACES, UNEQUAL)
    total = tl.zeros((BLOCK_M,), tl.float32)
    begin = first + tl.program_id(1) * share
    for t in range(begin, tl.minimum(begin + share, stop)):
        n = (p + t) % blocks * BLOCK_N
        col = n + tl.arange(0, BLOCK_N)
        ok, there = col < N, tl.minimum(col, N - 1)
        y = tl.load(X + there.to(tl.int64)[:, None] * x_row + d, ok[:, None] & (d < D), 0.0)
        s = dot(x, y.T, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        whole, _ = verdict(ranges, n, N, LOW, HIGH, BLOCK_N, PLACES, UNEQUAL)
        s = scored(
            s, here, there, (row < N)[:, None] & ok[None, :],
            whole & (tl.maximum(n, p * BLOCK_M) + BLOCK_N <= N), SCALE, None, IDS, IDS, N, N,
            RULES, PLACES, False, False, size,
        )  # fmt: skip
        e = power(s, size, 0.0)
        total += tl.sum(e, 1)
        # The diagonal holds both sides by itself, and across the circle both blocks meet.
        once = (t > 0) & (2 * t != blocks)
        sums = tl.where(once, tl.sum(e, 0), 0.0)
        tl.store(COLS + (t - first).to(tl.int64) * N + col, sums, ok)
    tl.store(ROWS + tl.program_id(1).to(tl.int64) * N + row, total, row < N)


def half(pairs: Pairs, most: Tensor, choice: Choice | None = None) -> Tensor:
    """Sums (N,) of 2^s over the columns of each row; anything at all unless most <= BOUND."""
    x = rows_contiguous(pairs.q)
    name, config = choice or choose(HALF, x, "half")
    constants, (rules, places) = HALF.variants[name].constexprs, triton_rules(pairs.mask)
    (N, D), block = x.shape, config.blocks["BLOCK_N"]
    near, scale = id_ranges(pairs.mask, pairs.col_ids, block), pairs.scale.float()
    blocks = triton.cdiv(N, block)
    steps, totals = blocks // 2 + 1, []
    for span in spans(steps, max(1, PARTS_BYTES // (4 * N))):
        count = span.stop - span.start
        shares = triton.cdiv(count, SHARE)
        parts = torch.empty(shares + count, N, dtype=torch.float32, device=x.device)
        with torch.cuda.device_of(parts):
            _half[blocks, shares](
                x, scale, pairs.col_ids, *near, most, parts, parts[shares:], N, D,
                span.start, span.stop, SHARE, x.stride(0),
                RULES=rules, PLACES=places, UNEQUAL=unequal(pairs.mask),
                PRECISION=precision(constants["PRECISION"]), **config.arguments,
            )  # fmt: skip
        totals.append(parts.sum(0))
    return totals[0] if len(totals) == 1 else torch.stack(totals).sum(0)


def fits(pairs: Pairs) -> bool:
    """Whether the kernel is for these pairs, if their scores are bounded."""
    N, D = pairs.q.shape
    if not pairs.same or pairs.q.element_size() != 2 or D > MOST_FEATURES or N * N < HALF_FROM:
        return False
    return D <= choose(HALF, pairs.q, "half")[1].blocks["BLOCK_D"]


def statistics(pairs: Pairs, general: Callable[..., Tensor]) -> Tensor:
    """Statistics (2, N) of the rows, by half the tiles or by `general`, which is given most=.

    The sums' exponents stand for the maxima, which they are at least: 2^(s - m) is at most 1.
    """
    norm = torch.linalg.vector_norm(pairs.q, dim=1, dtype=torch.float32).amax()
    most = norm * norm * pairs.scale.float().abs() * LOG2_E.value
    total, m = torch.frexp(half(pairs, most))
    return torch.where(most <= BOUND.value, torch.stack([m.float(), total]), general(most=most))


HALF = register(Kernel("pairwise_lse_half", _half, variants(_half, half)))
