"""Tokens in and out of a sequence: the Triton kernels, which `tokens_ops.py` launches.

    gather    out_r = pos_(r % n) + (source_(b, ids_r)  if ids_r < limit,  else token)
    restore   d_visible_(b, ids_bl) = g_bl    pos_l = sum_b g_bl    token = sum_(b, hidden l) g_bl
    scatter   out_l = sum of the rows k with ids_k = l, which a sorted order lists

A program has a block of rows and of features.  Rows are read in whole runs of features, so the ids
in between cost nothing: each byte is read once, written once.  Memory-bound.  Sums over sequences
are taken in float32 by shares of the batch, as many as fill the GPU, and the shares' sums are added
by one launch more: no atomics, the same bits each run.  `restore` writes d_visible by the ids
themselves, each place being there exactly once.  `scatter` walks the rows of a place in ascending
order; without repeats that is one row or none.  What an addition rounds off is carried to the next
(Kahan), which costs no time here and keeps long sums as accurate as pairwise ones.
In place: nothing.
Letters: b of B sequences, n rows each; r a row of all; l of L places; d of D features.  Capitals
are pointers; x_b, x_r, x_d the strides of a tensor by sequence, row and feature.
Source: He et al. 2021, MAE, arXiv:2111.06377, section 3 "Simple implementation"; Kahan 1965,
"Further remarks on reducing truncation errors".
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportOptionalOperand=false
# pyright: reportGeneralTypeIssues=false
# Triton states the types of its functions for its own compiler: tl.max "may return a tuple".

import triton
import triton.language as tl


@triton.jit
def gather(
    SOURCE, IDS, OWNERS, TOKEN, POS, OUT, R, n, D, limit, s_b, s_r, s_d,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Ids and OUT are contiguous.  OWNERS: each row's sequence, where they have not n rows each."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row, column = r < R, (d < D)[None, :]
    if OWNERS is None:
        b = r // n
    else:
        b = tl.load(OWNERS + r, row, 0).to(tl.int64)
    ids = tl.load(IDS + r, row, -1)
    shown = (ids >= 0) & (ids < limit)
    at = (b * s_b + tl.where(shown, ids, 0) * s_r)[:, None] + d.to(tl.int64)[None, :] * s_d
    x = tl.load(SOURCE + at, shown[:, None] & column, 0.0).to(tl.float32)
    if TOKEN is not None:
        token = tl.load(TOKEN + d, d < D, 0.0).to(tl.float32)
        x = tl.where(shown[:, None], x, token[None, :])
    here = row[:, None] & column
    if POS is not None:
        x += tl.load(POS + (r % n)[:, None] * D + d[None, :], here, 0.0).to(tl.float32)
    tl.store(OUT + r[:, None] * D + d[None, :], x.to(OUT.dtype.element_ty), here)


@triton.jit
def _added(total, lost, x):
    """total + x - lost, and what of that was lost to rounding."""
    x -= lost
    after = total + x
    return after, (after - total) - x


@triton.jit
def restore(
    G, IDS, VISIBLE, TOKENS, POS, B, L, K, D, share, g_b, g_r, g_d,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """VISIBLE (B, K, D); TOKENS (shares, blocks of L, D) and POS (shares, L, D) float32."""
    l = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)  # noqa: E741
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    row, column = l < L, (d < D)[None, :]
    place = l.to(tl.int64)[:, None] * g_r + d.to(tl.int64)[None, :] * g_d
    first = tl.program_id(0).to(tl.int64) * share
    total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    hidden, lost, lost_hidden = total, total, total
    for i in range(0, tl.minimum(B - first, share)):
        b = first + i
        ids = tl.load(IDS + b * L + l, row, 0)
        g = tl.load(G + b * g_b + place, row[:, None] & column, 0.0)
        if VISIBLE is not None:
            at = (b * K + ids)[:, None] * D + d[None, :]
            tl.store(VISIBLE + at, g, (row & (ids >= 0) & (ids < K))[:, None] & column)
        g = g.to(tl.float32)
        if POS is not None:
            total, lost = _added(total, lost, g)
        if TOKENS is not None:
            g = tl.where((ids >= K)[:, None], g, 0.0)
            hidden, lost_hidden = _added(hidden, lost_hidden, g)
    part = tl.program_id(0).to(tl.int64)
    if POS is not None:
        tl.store(POS + (part * L + l)[:, None] * D + d[None, :], total, row[:, None] & column)
    if TOKENS is not None:
        TOKENS += (part * tl.num_programs(1) + tl.program_id(1)) * D
        tl.store(TOKENS + d, tl.sum(hidden, 0), d < D)


@triton.jit
def scatter(
    X, ORDER, STARTS, OUT, B, L, D, n, share, start_b, x_b, x_r, x_d,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """OUT (shares, L, D).  Place l of sequence b has the rows ORDER[b * n + STARTS[b, l]], ..."""
    l = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)  # noqa: E741
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    row, column = l < L, (d < D)[None, :]
    run = d.to(tl.int64)[None, :] * x_d
    first = tl.program_id(0).to(tl.int64) * share
    total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    lost = total
    for i in range(0, tl.minimum(B - first, share)):
        b = first + i
        start = tl.load(STARTS + b * start_b + l, row, 0)
        stop = tl.load(STARTS + b * start_b + l + 1, row, 0)
        for j in range(0, tl.max(stop - start, 0)):
            more = start + j < stop
            k = tl.load(ORDER + b * n + start + j, more, 0)
            at = (b * x_b + k * x_r)[:, None] + run
            x = tl.load(X + at, more[:, None] & column, 0.0).to(tl.float32)
            total, lost = _added(total, lost, x)
    at = (tl.program_id(0).to(tl.int64) * L + l)[:, None] * D + d[None, :]
    tl.store(OUT + at, total.to(OUT.dtype.element_ty), row[:, None] & column)
