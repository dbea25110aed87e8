"""How time and memory grow along a sweep: exponents by least squares on logarithms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import correlation, linear_regression

from fastssl.bench.record import Fit, Result

LEAST_POINTS = 3
MANY_POINTS = 6  # from here on only the upper half is fitted


def fit(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """The exponent p of y ~ x**p and r2, the share of the variance of log y that it explains.

    Raises ValueError unless there are as many xs as ys, all positive, and two different xs.

    >>> fit([1, 2, 4], [3.0, 12.0, 48.0])
    (2.0, 1.0)
    """
    if min(*xs, *ys) <= 0:
        raise ValueError(f"xs and ys must be positive, got {xs} and {ys}")
    u, v = ([math.log2(value) for value in values] for values in (xs, ys))
    exponent = linear_regression(u, v).slope
    return exponent, min(1.0, correlation(u, v) ** 2) if len(set(v)) > 1 else 1.0


def fits(results: Iterable[Result]) -> list[Fit]:
    """The exponents of time ("ms", the median of the whole call) and memory ("peak").

    One for each case, dtype, rival and fixed part of the shape that has at least 3 different
    values of its sweep's variable with a time; other rows do not count.  At small values the cost
    of launching and of the interpreter is a constant beside the work and bends the line, so from
    6 points on only the upper half is fitted: the exponent is that of the large problems.  Even so
    it is a description of the range measured and no law.
    """
    return [
        Fit(
            case,
            dtype,
            rival,
            variable,
            dict(fixed),
            quantity,
            *fit([x for x, _ in points], [y for _, y in points]),
            len(points),
        )
        for (case, dtype, rival, variable, fixed), rows in sweeps(results).items()
        for quantity in ("ms", "peak")
        for points in [choose_points(rows, variable, quantity)]
        if len(points) >= LEAST_POINTS
    ]


def choose_points(
    rows: Sequence[Result], variable: str, quantity: str
) -> list[tuple[float, float]]:
    """The points (value of the variable, quantity) that are fitted, smallest first."""
    by_value = {
        row.shape[variable]: row.total.p50 if quantity == "ms" else row.peak
        for row in rows
        if row.status == "ok" and row.total is not None
    }
    points = sorted((x, float(y)) for x, y in by_value.items() if y)
    return points[len(points) // 2 :] if len(points) >= MANY_POINTS else points


def sweeps(results: Iterable[Result]) -> dict[tuple, list[Result]]:
    """The rows of each sweep of each rival: (case, dtype, rival, variable, fixed part) -> rows."""
    groups: dict[tuple, list[Result]] = {}
    for row in results:
        if row.sweep:
            fixed = tuple((k, v) for k, v in row.shape.items() if k != row.sweep)
            groups.setdefault((row.case, row.dtype, row.rival, row.sweep, fixed), []).append(row)
    return groups
