"""The pair masks' rules for Triton, and how a kernel asks them.  Ids are never negative in //."""

import triton
import triton.language as tl


@triton.jit
def exclude_self(rows, cols):
    """No row meets itself; given ids, nothing of its own id."""
    return rows != cols


@triton.jit
def exclude_self_and_pair(rows, cols):
    """Rows 2i and 2i + 1 are two views of one image."""
    return rows // 2 != cols // 2


@triton.jit
def same_group(rows, cols):
    """Equal ids."""
    return rows == cols


@triton.jit
def different_group(rows, cols):
    """Unequal ids."""
    return rows != cols


@triton.jit
def kept(
    x, y, X_IDS, Y_IDS, M, N,
    RULES: tl.constexpr, PLACES: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Which pairs of positions x (R,) < M and y (C,) < N are kept: (R, C) bool.

    X_IDS, Y_IDS point to (P, M) and (P, N) ids.  TRANSPOSED: x are the columns, and y the rows.
    """
    keep = tl.full((x.shape[0], y.shape[0]), True, tl.int1)
    for t in tl.static_range(len(RULES)):  # pyright: ignore
        if PLACES[t] < 0:
            i, j = x.to(tl.int32), y.to(tl.int32)
        else:
            i, j = tl.load(X_IDS + PLACES[t] * M + x), tl.load(Y_IDS + PLACES[t] * N + y)
        if TRANSPOSED:
            keep = keep & RULES[t](j[None, :], i[:, None])
        else:
            keep = keep & RULES[t](i[:, None], j[None, :])
    return keep


@triton.jit
def row_ranges(x, X_IDS, M, PLACES: tl.constexpr, UNEQUAL: tl.constexpr):
    """The least and the greatest id of positions x (R,) < M, by each rule in turn."""
    found = ()
    for t in tl.static_range(len(UNEQUAL)):  # pyright: ignore
        if UNEQUAL[t] < 0:
            found = found + (0, 0)
        else:
            i = x if PLACES[t] < 0 else tl.load(X_IDS + PLACES[t] * M + x)
            found = found + (tl.min(i, 0), tl.max(i, 0))
    return found


@triton.jit
def verdict(
    ranges, n, N, Y_LOW, Y_HIGH, BLOCK: tl.constexpr, PLACES: tl.constexpr, UNEQUAL: tl.constexpr
):
    """Of columns n to n + BLOCK: whether all pairs are kept, and whether none; both may be no.

    ranges: the rows' `row_ranges`.  Y_LOW, Y_HIGH point to those of the columns, (P, N / BLOCK).
    Where the two do not meet no ids are equal.
    """
    whole, empty = n == n, n != n
    for t in tl.static_range(len(UNEQUAL)):  # pyright: ignore
        if UNEQUAL[t] < 0:
            whole = n != n
        else:
            low, high = n, n + BLOCK - 1
            if PLACES[t] >= 0:
                at = PLACES[t] * tl.cdiv(N, BLOCK) + n // BLOCK
                low, high = tl.load(Y_LOW + at), tl.load(Y_HIGH + at)
            apart = (low > ranges[2 * t + 1]) | (high < ranges[2 * t])
            if UNEQUAL[t] == 1:
                whole = whole & apart
            else:
                whole, empty = n != n, empty | apart
    return whole, empty


@triton.jit
def all_kept(x, y, X_IDS, Y_IDS, M, N, PLACES: tl.constexpr, UNEQUAL: tl.constexpr):
    """Whether the ranges of ids tell that all pairs of positions x and y are kept."""
    rows = row_ranges(x, X_IDS, M, PLACES, UNEQUAL)
    cols = row_ranges(y, Y_IDS, N, PLACES, UNEQUAL)
    whole = M == M
    for t in tl.static_range(len(UNEQUAL)):  # pyright: ignore
        if UNEQUAL[t] != 1:
            whole = M != M
        else:
            whole &= (cols[2 * t] > rows[2 * t + 1]) | (cols[2 * t + 1] < rows[2 * t])
    return whole
