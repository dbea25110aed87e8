"""Of a product of parameters, few cases in which each pair of values still meets.

A mistake in a kernel shows with one value or with two together, hardly ever with a certain three.
So `make test` runs a covering array of each test's cases, and `make test-all` every case, by
`pytest --full`.  Two axes whose every combination must meet each value of a third are `crossed`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

import pytest

FULL = False  # tests/conftest.py sets it before a module of tests is imported


def examples(full: int, few: int = 8) -> int:
    """How many examples Hypothesis draws: `full` with --full, else at most `few`."""
    return full if FULL else min(full, few)


def crossed(**axes: Mapping[str, Any]) -> pytest.MarkDecorator:
    """parametrize() by all combinations of {id: value} axes, as one axis."""
    ids = map("-".join, product(*axes.values()))
    values = product(*(axis.values() for axis in axes.values()))
    return pytest.mark.parametrize(", ".join(axes), list(values), ids=list(ids))


def pairwise(axes: Mapping[str, Sequence[Any] | Mapping[str, Any]]) -> dict[str, Any]:
    """Arguments of parametrize(): a covering array of the product of axes, all of it with --full.

    axes: {"B, D": [(2, 3), ...], "temperature": [...], ...}; a dict as an axis gives its values.
    """
    values = [list(axis.values() if isinstance(axis, Mapping) else axis) for axis in axes.values()]
    rows = list(product(*(range(len(axis)) for axis in values)))
    cases = []
    for i in range(len(rows)) if FULL else covering(rows):
        chosen = zip(axes, values, rows[i], strict=True)
        cases.append([x for n, axis, k in chosen for x in (axis[k] if "," in n else [axis[k]])])
    return {"argnames": ", ".join(axes), "argvalues": cases}


def covering(rows: Sequence[tuple[Hashable, ...]]) -> list[int]:
    """Indices of rows in which any two columns' values meet that meet in all rows.

    The same each time: of the rows with the most new pairs the first.
    """
    pairs = [set(combinations(enumerate(row), 2)) for row in rows]
    left, chosen = set().union(*pairs), []
    while left:
        chosen.append(max(range(len(rows)), key=lambda i: len(pairs[i] & left)))
        left -= pairs[chosen[-1]]
    return sorted(chosen)


def reduced(cases: Sequence[Any]) -> Sequence[Any]:
    """Of all pytest items of one test function those of a covering array."""
    rows = [tuple(case.callspec._idlist) for case in cases]  # an id for each axis
    return [cases[i] for i in covering(rows)] if len(rows[0]) > 1 else cases
