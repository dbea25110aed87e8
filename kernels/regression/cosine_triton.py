"""The scaled cosine error: the Triton kernels, which `cosine_ops.py` launches.

    cos = p . t / (max(|p|, EPS) max(|t|, EPS))        loss = max(1 - cos, 0)^gamma
    dp = -g gamma (1 - cos)^(gamma - 1) (t / |t| - cos p / |p|) / |p|,  without cos where |p| <= EPS

A program has whole rows and goes over them once; their sums stay in registers.  The rows of chosen
places are read where they stand.  Backward has a block of features too: three numbers a row are
kept for it.  Traffic: forward p and t; backward p, t and their gradients.  Memory-bound.  No
atomics.  In place: nothing.  In the kernels capitals are pointers; r is a row of R, k a sequence.
Source: Hou et al. 2022, GraphMAE, arXiv:2205.10803, eq. 2.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportOptionalOperand=false
# pyright: reportGeneralTypeIssues=false
# Triton states the types of its functions for its own compiler: tl.sum "may return a tuple".

import triton
import triton.language as tl

EPS = tl.constexpr(1e-12)


@triton.jit
def _places(IDS, r, R, n):
    """The sequence and the place of each row; n rows a sequence."""
    if IDS is None:
        return r // n, r % n
    else:
        return r // n, tl.load(IDS + r, r < R, 0)


@triton.jit
def _power(e, gamma, SQUARE: tl.constexpr):
    """e^gamma, and its derivative, for e >= 0; at 0 that is 1 for gamma = 1, else 0."""
    if SQUARE:
        return e * e, 2.0 * e
    else:
        at_zero = tl.where(gamma == 1.0, 1.0, 0.0)
        slope = tl.exp2((gamma - 1.0) * tl.log2(tl.where(e > 0.0, e, 1.0)))
        slope = tl.where(e == 0.0, at_zero, slope)
        return e * slope, gamma * slope


@triton.jit
def forward(
    P, T, IDS, LOSS, STATS, R, n, D, gamma, p_k, p_r, p_d, t_k, t_r, t_d,
    SQUARE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    k, place = _places(IDS, r, R, n)
    P += (k * p_k + place * p_r)[:, None]
    T += (k * t_k + place * t_r)[:, None]
    pp = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    tt, pt = pp, pp
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        here = (r < R)[:, None] & (d < D)[None, :]
        p = tl.load(P + d.to(tl.int64)[None, :] * p_d, here, 0.0).to(tl.float32)
        t = tl.load(T + d.to(tl.int64)[None, :] * t_d, here, 0.0).to(tl.float32)
        pp += p * p
        tt += t * t
        pt += p * t
    p_norm = tl.sqrt_rn(tl.sum(pp, 1))
    t_norm = tl.sqrt_rn(tl.sum(tt, 1))
    cos = tl.div_rn(tl.sum(pt, 1), tl.maximum(p_norm, EPS))
    cos = tl.div_rn(cos, tl.maximum(t_norm, EPS))
    e = tl.where(cos > 1.0, 0.0, 1.0 - cos)
    loss, _ = _power(e, gamma, SQUARE)
    tl.store(LOSS + r, loss, r < R)
    tl.store(STATS + r, cos, r < R)
    tl.store(STATS + R + r, p_norm, r < R)
    tl.store(STATS + 2 * R + r, t_norm, r < R)


@triton.jit
def backward(
    G, P, T, IDS, STATS, DP, DT, R, n, L, D, gamma, g_k, g_r, p_k, p_r, p_d, t_k, t_r, t_d,
    SQUARE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """DP and DT (sequences, L, D): rows at their places."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row, here = r < R, (r < R)[:, None] & (d < D)[None, :]
    k, place = _places(IDS, r, R, n)
    cos = tl.load(STATS + r, row, 0.0)
    p_norm, t_norm = tl.load(STATS + R + r, row, 1.0), tl.load(STATS + 2 * R + r, row, 1.0)
    _, slope = _power(tl.where(cos > 1.0, 0.0, 1.0 - cos), gamma, SQUARE)
    w = -slope * tl.load(G + k * g_k + (r % n) * g_r, row, 0.0)
    in_p = tl.div_rn(1.0, tl.maximum(p_norm, EPS))
    in_t = tl.div_rn(1.0, tl.maximum(t_norm, EPS))
    feature = d.to(tl.int64)[None, :]
    p = tl.load(P + (k * p_k + place * p_r)[:, None] + feature * p_d, here, 0.0).to(tl.float32)
    t = tl.load(T + (k * t_k + place * t_r)[:, None] + feature * t_d, here, 0.0).to(tl.float32)
    p, t = p * in_p[:, None], t * in_t[:, None]
    out = ((k * L + place) * D)[:, None] + d[None, :]
    if DP is not None:
        along = tl.where(p_norm > EPS, cos, 0.0)[:, None]
        dp = (t - along * p) * (w * in_p)[:, None]
        tl.store(DP + out, dp.to(DP.dtype.element_ty), here)
    if DT is not None:
        along = tl.where(t_norm > EPS, cos, 0.0)[:, None]
        dt = (p - along * t) * (w * in_t)[:, None]
        tl.store(DT + out, dt.to(DT.dtype.element_ty), here)
