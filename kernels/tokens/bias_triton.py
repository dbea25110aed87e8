"""Attention biases of chosen places: the Triton kernels, which `bias_ops.py` launches.

    pick     out_bhij = bias_(h, ids_bi, ids_bj)
    unpick   dbias_hpq = sum_b g_(b, h, i, j),  i and j being where p and q stand in ids_b

A program has a tile of one head.  `unpick` reads by the inverse of ids, so that each place is
written once: sums over b stay in registers, are compensated (Kahan), and are taken by shares of the
batch, as many as fill the GPU, which one launch more adds up: no atomics, the same bits each run.
Traffic: the result once, and bias from L2; backward the gradient once.  Memory-bound.  In place:
nothing.  In the kernels capitals are pointers; x_h, x_i, x_j are strides by head, row and column.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportOptionalOperand=false
# pyright: reportGeneralTypeIssues=false
# Triton states the types of its functions for its own compiler.

import triton
import triton.language as tl


@triton.jit
def _ids(IDS, b, i, K, L):
    """The ids of some places of sequence b, and which of them there are."""
    ids = tl.load(IDS + b * K + i, i < K, -1)
    return ids, (ids >= 0) & (ids < L)


@triton.jit
def pick(
    BIAS, IDS, OUT, H, K, L, b_h, b_i, b_j, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr
):  # fmt: skip
    """OUT (B, H, K, K)."""
    head = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    j = tl.program_id(2) * BLOCK_J + tl.arange(0, BLOCK_J)
    p, row = _ids(IDS, head // H, i, K, L)
    q, column = _ids(IDS, head // H, j, K, L)
    at = (head % H) * b_h + p[:, None] * b_i + q[None, :] * b_j
    x = tl.load(BIAS + at, row[:, None] & column[None, :], 0.0)
    out = (head * K + i)[:, None] * K + j[None, :]
    tl.store(OUT + out, x, (i < K)[:, None] & (j < K)[None, :])


@triton.jit
def unpick(
    G, PLACES, PARTS, B, H, K, L, share, g_b, g_h, g_i, g_j,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """PARTS (shares, H, L, L) float32.  PLACES (B, L): where p stands in ids_b, -1 if nowhere."""
    first = tl.program_id(0).to(tl.int64) * share
    blocks = tl.cdiv(L, BLOCK_I)
    h = (tl.program_id(1) // blocks).to(tl.int64)
    p = tl.program_id(1) % blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    q = tl.program_id(2) * BLOCK_J + tl.arange(0, BLOCK_J)
    total = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    lost = total
    for step in range(0, tl.minimum(B - first, share)):
        b = first + step
        i, row = _ids(PLACES, b, p, L, K)
        j, column = _ids(PLACES, b, q, L, K)
        at = b * g_b + h * g_h + i[:, None] * g_i + j[None, :] * g_j
        g = tl.load(G + at, row[:, None] & column[None, :], 0.0).to(tl.float32) - lost
        after = total + g
        lost = (after - total) - g
        total = after
    part = (tl.program_id(0).to(tl.int64) * H + h) * L
    here = (p < L)[:, None] & (q < L)[None, :]
    tl.store(PARTS + (part + p)[:, None] * L + q[None, :], total, here)
