"""Column statistics and standardised rows: the Triton kernels, which `moments_ops.py` launches.

    z (N, D)    mean_d = shift_d + rest_d    m2_d = sum_n (z_nd - mean_d)^2
    out = (z - mean) * inv_std    inv_std = 1 / sqrt(m2 / divisor + eps), 0 where that is 1 / 0
    dz = inv_std * (g - sum g / N - out * sum(g out) / divisor)

A program has a block of columns and a share of the rows, and one or both of two phases: to measure
(or sum, backward) and to apply.

held     all rows of the block fit in registers: one read, one write
whole    both phases in one program; it goes back over its rows from the last to the first, so that
         those it has seen last, still in L2, come first
split    the columns alone would not fill the GPU, or other ranks have rows too: the phases are two
         launches, both split over rows; `join` puts the shares' statistics together

Each place of a row block runs its own Welford mean of differences from its first row; they are
joined once, at the end, so that nothing is exchanged within the loop.  Joining starts from a row as
it stands, which makes a constant column's m2 an exact 0, and the mean is kept as two floats, the
nearest one and what that leaves: at a mean of 1e6 one alone has an error of 0.03.
Traffic: forward z and out once each from HBM, backward g, out and dz.  Memory-bound.  No atomics:
the same bits each run.  In place: nothing.
In the kernels capitals are pointers.
Source: Welford 1962, "Note on a method for calculating corrected sums of squares and products";
Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance".
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportOptionalOperand=false
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false
# Triton states the types of its functions for its own compiler: tl.sum "may return a tuple".

import triton
import triton.language as tl


@triton.jit
def _at(start, lane, row, d):
    """Offsets of rows from `start` on, `row` elements apart; int64, as they pass 2**31."""
    return (start + lane).to(tl.int64)[:, None] * row + d[None, :]


@triton.jit
def _rows(X, start, lane, stop, d, D, row, POLICY: tl.constexpr):
    """A block of rows in float32, 0 outside."""
    ok = (start + lane < stop)[:, None] & (d < D)[None, :]
    return tl.load(X + _at(start, lane, row, d), ok, 0.0, eviction_policy=POLICY).to(tl.float32)


@triton.jit
def _keep(X, x, start, lane, stop, d, D):
    """Write a block of rows."""
    ok = (start + lane < stop)[:, None] & (d < D)[None, :]
    tl.store(X + _at(start, lane, D, d), x.to(X.dtype.element_ty), ok)


@triton.jit
def _inverse(var, eps):
    """1 / sqrt(var + eps), and 0 where that is 1 / 0."""
    total = var + eps
    return tl.where(total == 0, 0.0, tl.div_rn(1.0, tl.sqrt_rn(tl.where(total == 0, 1.0, total))))


@triton.jit
def _about(s, mean, seen, shift):
    """How far means s + mean, of `seen` rows each, are from `shift`."""
    return tl.where(seen > 0, s - shift + mean, 0.0)


@triton.jit
def _measure(
    Z, first, stop, d, D, z_row,
    HELD: tl.constexpr, POLICY: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The rows minus shift, if they are HELD; shift, rest and m2 of all, each (1, BLOCK_D)."""
    lane = tl.arange(0, BLOCK_N)
    s = _rows(Z, first, lane, stop, d, D, z_row, POLICY)
    mean, m2 = tl.zeros_like(s), tl.zeros_like(s)
    if not HELD:
        k = 1.0
        for start in tl.range(first + BLOCK_N, stop, BLOCK_N, num_stages=STAGES):
            k += 1.0
            x = _rows(Z, start, lane, stop, d, D, z_row, POLICY)
            delta = tl.where((start + lane < stop)[:, None], x - s - mean, 0.0)
            mean += delta * (1.0 / k)
            m2 += delta * delta * (1.0 - 1.0 / k)
    seen = ((stop - first - lane + BLOCK_N - 1) // BLOCK_N).to(tl.float32)[:, None]
    n = (stop - first).to(tl.float32)
    base = tl.load(Z + first.to(tl.int64) * z_row + d, d < D, 0.0).to(tl.float32)[None, :]
    shift = base + tl.sum(_about(s, mean, seen, base) * seen, 0)[None, :] / n
    far = _about(s, mean, seen, shift)
    rest = tl.sum(far * seen, 0)[None, :] / n
    m2 = tl.sum(m2 + far * far * seen, 0)[None, :] - n * rest * rest
    return far, shift, rest, tl.where(m2 < 0, 0.0, m2)


@triton.jit
def forward(
    Z, OUT, PARTS, SHIFT, REST, SCALE, OFFSET, N, D, z_row, share, eps, divisor,
    MEASURE: tl.constexpr, APPLY: tl.constexpr, HELD: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    lane, d = tl.arange(0, BLOCK_N), tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.program_id(1) * share
    stop, here = tl.minimum(first + share, N), (d < D)[None, :]
    at = d[None, :]
    if MEASURE:
        policy: tl.constexpr = "evict_last" if APPLY and not HELD else ""
        far, shift, rest, m2 = _measure(
            Z, first, stop, d, D, z_row, HELD, policy, BLOCK_N, STAGES
        )  # fmt: skip
        if APPLY:
            scale = _inverse(m2 / divisor, eps)
            tl.store(SCALE + at, scale, here)
        else:
            PARTS += tl.program_id(1).to(tl.int64) * 3 * D
            tl.store(PARTS + at, shift, here)
            tl.store(PARTS + D + at, rest, here)
            tl.store(PARTS + 2 * D + at, m2, here)
    else:
        shift, rest = tl.load(SHIFT + at, here, 0.0), tl.load(REST + at, here, 0.0)
        scale = tl.load(SCALE + at, here, 0.0)
    if APPLY:
        if OFFSET is not None:
            offset = tl.load(OFFSET + at, here, 0.0)
        if HELD:
            _keep(OUT, (far - rest) * scale, first, lane, stop, d, D)
        else:
            last = first + (stop - first - 1) // BLOCK_N * BLOCK_N
            for back in tl.range(0, stop - first, BLOCK_N, num_stages=STAGES):
                x = _rows(Z, last - back, lane, stop, d, D, z_row, "evict_first")
                x = (x - shift - rest) * scale
                if OFFSET is not None:
                    x += offset
                _keep(OUT, x, last - back, lane, stop, d, D)


@triton.jit
def join(
    PARTS, OUT, P, D, share, N, eps, divisor,
    ROOT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """PARTS (P, 3, D), the last of a share or fewer rows -> OUT (3, D); ROOT: inv_std for m2."""
    lane = tl.arange(0, BLOCK_P)
    at = (tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    n, here = N.to(tl.float32), at < D
    base = tl.load(PARTS + at, here, 0.0)
    mean = tl.zeros_like(base)
    for start in range(0, P, BLOCK_P):
        i = (start + lane)[:, None]
        seen = tl.where(i < P, tl.minimum(share, N - i * share), 0).to(tl.float32)
        part, ok = PARTS + i.to(tl.int64) * 3 * D + at, (i < P) & here
        far = _about(tl.load(part, ok, 0.0), tl.load(part + D, ok, 0.0), seen, base)
        mean += tl.sum(far * seen, 0)[None, :]
    shift = base + mean / n
    rest, m2 = tl.zeros_like(base), tl.zeros_like(base)
    for start in range(0, P, BLOCK_P):
        i = (start + lane)[:, None]
        seen = tl.where(i < P, tl.minimum(share, N - i * share), 0).to(tl.float32)
        part, ok = PARTS + i.to(tl.int64) * 3 * D + at, (i < P) & here
        far = _about(tl.load(part, ok, 0.0), tl.load(part + D, ok, 0.0), seen, shift)
        rest += tl.sum(far * seen, 0)[None, :]
        m2 += tl.sum(tl.load(part + 2 * D, ok, 0.0) + far * far * seen, 0)[None, :]
    rest /= n
    m2 -= n * rest * rest
    m2 = tl.where(m2 < 0, 0.0, m2)
    tl.store(OUT + at, shift, here)
    tl.store(OUT + D + at, rest, here)
    tl.store(OUT + 2 * D + at, _inverse(m2 / divisor, eps) if ROOT else m2, here)


@triton.jit
def backward(
    G, OUT, DZ, SUMS, INV_STD, G_MEAN, G_OUT, N, D, g_row, out_row, share, divisor,
    MEASURE: tl.constexpr, APPLY: tl.constexpr, HELD: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    lane, d = tl.arange(0, BLOCK_N), tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.program_id(1) * share
    stop, here = tl.minimum(first + share, N), (d < D)[None, :]
    at = d[None, :]
    if MEASURE:
        policy: tl.constexpr = "evict_last" if APPLY and not HELD else ""
        g = _rows(G, first, lane, stop, d, D, g_row, policy)
        out = _rows(OUT, first, lane, stop, d, D, out_row, policy)
        total, dot = g, g * out
        if not HELD:
            for start in tl.range(first + BLOCK_N, stop, BLOCK_N, num_stages=STAGES):
                more = _rows(G, start, lane, stop, d, D, g_row, policy)
                total += more
                dot += more * _rows(OUT, start, lane, stop, d, D, out_row, policy)
        g_mean, g_out = tl.sum(total, 0)[None, :], tl.sum(dot, 0)[None, :]
        if APPLY:
            g_mean, g_out = g_mean / (stop - first).to(tl.float32), g_out / divisor
        else:
            SUMS += tl.program_id(1).to(tl.int64) * 2 * D
            tl.store(SUMS + at, g_mean, here)
            tl.store(SUMS + D + at, g_out, here)
    else:
        g_mean, g_out = tl.load(G_MEAN + at, here, 0.0), tl.load(G_OUT + at, here, 0.0)
    if APPLY:
        inv_std = tl.load(INV_STD + at, here, 0.0)
        if HELD:
            _keep(DZ, (g - g_mean - out * g_out) * inv_std, first, lane, stop, d, D)
        else:
            last = first + (stop - first - 1) // BLOCK_N * BLOCK_N
            for back in tl.range(0, stop - first, BLOCK_N, num_stages=STAGES):
                g = _rows(G, last - back, lane, stop, d, D, g_row, "evict_first")
                out = _rows(OUT, last - back, lane, stop, d, D, out_row, "evict_first")
                dz = (g - g_mean - out * g_out) * inv_std
                _keep(DZ, dz, last - back, lane, stop, d, D)
