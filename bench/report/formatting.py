"""Figures in words: what the table, the pictures, the page and the comparison share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastssl.bench.record import Ceiling, Result, Run
from fastssl.bench.registry import OURS

Key = tuple[str, tuple[tuple[str, int], ...], str]


def number(value: float) -> str:
    """Three significant digits, never an exponent.

    >>> [number(v) for v in (0.01234, 0.999, 9.996, 31.4159, 1234.5)]
    ['0.0123', '0.999', '10.0', '31.4', '1234']
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    if abs(value) >= 999.5:
        return f"{value:.0f}"
    rounded = float(f"{value:.3g}")
    return f"{rounded:.{2 - math.floor(math.log10(abs(rounded)))}f}"


def count(value: float) -> str:
    """As `number`, millions and more with a prefix.

    >>> count(853.3), count(19_250), count(327_796_896)
    ('853', '19250', '328 M')
    """
    for factor, name in ((1e9, "G"), (1e6, "M")):
        if value >= 0.9995 * factor:
            return f"{number(value / factor)} {name}"
    return number(value)


def size(count: float) -> str:
    """Bytes in decimal units.

    >>> size(812), size(12_345_678), size(1.4e9)
    ('812 B', '12.3 MB', '1.40 GB')
    """
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= 0.9995 * factor:
            return f"{number(count / factor)} {unit}"
    return f"{count:.0f} B"


def percent(share: float) -> str:
    """A share as whole percents, below 1 % as one digit.

    >>> percent(0.6923), percent(0.004)
    ('69 %', '0.4 %')
    """
    return f"{100 * share:.0f} %" if share >= 0.00995 else f"{100 * share:.1g} %"


def align(rows: Sequence[Sequence[str]], gap: str = "  ", flush: str = "<") -> list[str]:
    """The rows as lines, every column as wide as its widest cell; flush ">": to the right.

    >>> align([["a", "bb"], ["ccc", "d"]], flush=">")
    ['  a  bb', 'ccc   d']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        gap.join(f"{cell:{flush}{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def shape_words(shape: Mapping[str, int] | Iterable[tuple[str, int]]) -> str:
    """
    >>> shape_words({"N": 8192, "D": 128})
    'N=8192 D=128'
    """
    return " ".join(f"{name}={value}" for name, value in dict(shape).items())


def reason(result: Result) -> str:
    """Why a row has no time: its status and what is known of it.

    >>> reason(Result("clip", {}, "float32", "lightly", status="absent", why="pip install lightly"))
    'absent: pip install lightly'
    """
    return f"{result.status}: {result.why}" if result.why else result.status


def is_ours(rival: str) -> bool:
    """Ours, or a variant of ours ("fastssl triton"); the gate draws the same line."""
    return rival.startswith(OURS)


def measurements(results: Iterable[Result]) -> list[list[Result]]:
    """The rows of each case, shape, dtype and sweep together, in the order they came."""
    groups: dict[tuple[Key, str], list[Result]] = {}
    for row in results:
        groups.setdefault((key_of(row), row.sweep), []).append(row)
    return list(groups.values())


def key_of(row: Result) -> Key:
    """Case, shape and dtype, to be looked up by; the order of the shape's sides does not matter."""
    return row.case, tuple(sorted(row.shape.items())), row.dtype


def rate(row: Result, ceilings: Sequence[Ceiling]) -> tuple[float, str, float | None] | None:
    """How fast by the resource nearer its ceiling: (rate, its unit, share of what was measured).

    Which one that is follows from the problem, so it is the same for all rivals.  Without measured
    ceilings: operations where there are any, else bytes, and no share.  None without either.  On a
    machine that cannot reach 1 TFLOP/s the unit is GFLOP/s.
    """
    measured = {c.what: c for c in ceilings}
    rates = []
    for value, unit, what in (
        (row.tflops, "TFLOP/s", f"matmul {row.dtype}"),
        (row.gbs, "GB/s", "copy"),
    ):
        ceiling = measured.get(what)
        if value and ceiling:
            factor, unit = scale(ceiling)
            rates.append((factor * value, unit, value / ceiling.measured))
        elif value:
            rates.append((value, unit, None))
    return max(rates, key=lambda one: one[2] or 0.0, default=None)


def scale(ceiling: Ceiling) -> tuple[float, str]:
    """What to multiply the ceiling's figures with, and the unit they then have."""
    if ceiling.unit == "TFLOP/s" and ceiling.measured < 1:
        return 1e3, "GFLOP/s"
    return 1.0, ceiling.unit


def share_of_floor(row: Result) -> float | None:
    """The floor over the median time: 1 is as fast as this machine can be."""
    return row.floor / row.total.p50 if row.floor and row.total else None


@dataclass(frozen=True)
class Tally:
    """How ours stands in one case, against the best rival of each measurement.

    faster, tie, slower   measurements by outcome; one rival that is faster makes it slower.
    alone                 no rival has a time.   no_time  ours has none: wrong, failed, no memory.
    low, high             the least and the largest x of a best rival.
    """

    case: str
    faster: int = 0
    tie: int = 0
    slower: int = 0
    alone: int = 0
    no_time: int = 0
    low: float | None = None
    high: float | None = None

    @property
    def between(self) -> str:
        """The least and the largest x: "0.93 to 5.20", one number when they agree, "" without."""
        if self.low is None or self.high is None:
            return ""
        low, high = number(self.low), number(self.high)
        return low if low == high else f"{low} to {high}"


def tallies(results: Iterable[Result]) -> list[Tally]:
    """One tally for each case, in the order of the table."""
    outcomes: dict[str, list[tuple[str, float | None]]] = {}
    for rows in measurements(results):
        outcomes.setdefault(rows[0].case, []).append(outcome(rows))
    tallied = []
    for case, pairs in outcomes.items():
        best = [x for _, x in pairs if x is not None]
        counts = {name: sum(name == o for o, _ in pairs) for name in dict(pairs)}
        ends = (min(best), max(best)) if best else (None, None)
        tallied.append(Tally(case, **counts, low=ends[0], high=ends[1]))
    return tallied


def outcome(rows: Sequence[Result]) -> tuple[str, float | None]:
    """Of one measurement: the field of Tally it counts in, and the x of its best rival."""
    ours = next((row for row in rows if row.rival == OURS), None)
    if ours is None or ours.total is None:
        return "no_time", None
    others = [row for row in rows if not is_ours(row.rival) and row.total and row.x is not None]
    if not others:
        return "alone", None
    x = min(row.x for row in others if row.x is not None)
    if any(row.x is not None and row.x < 1 and not row.tie for row in others):
        return "slower", x
    return ("tie" if any(row.tie for row in others) else "faster"), x


def headline(results: Iterable[Result]) -> str:
    """The run in one sentence, the unpleasant part included; "" when there is nothing to say."""
    tallied = tallies(results)
    faster, tie, slower, none = (
        sum(getattr(t, name) for t in tallied) for name in ("faster", "tie", "slower", "no_time")
    )
    total = faster + tie + slower
    if not total and not none:
        return ""
    if not total:
        return f"{OURS} has no time in any of {none} measurements."
    each = "the one measurement" if total == 1 else f"each of {total} measurements"
    said = f"Against the best rival of {each} {OURS} is faster in {faster}"
    said += f", ties in {tie} and is slower in {slower}."
    return said + (f" In {none} more it has no time." if none else "")


def ceiling_words(ceiling: Ceiling) -> str:
    """What was measured beside the datasheet.

    >>> ceiling_words(Ceiling("copy", 3900.0, "GB/s", 4800.0, "NVIDIA H200 datasheet"))
    '3900 GB/s, 81 % of 4800 (NVIDIA H200 datasheet)'
    >>> ceiling_words(Ceiling("matmul float32", 0.0512, "TFLOP/s"))
    '51.2 GFLOP/s'
    """
    factor, unit = scale(ceiling)
    said = f"{number(factor * ceiling.measured)} {unit}"
    if ceiling.datasheet:
        share = ceiling.measured / ceiling.datasheet
        said += f", {percent(share)} of {factor * ceiling.datasheet:g}"
        said += f" ({ceiling.source})" if ceiling.source else ""
    return said


def where(conditions: Mapping[str, Any]) -> str:
    """The machine and the software in one line.

    >>> where({"device": "Some CPU", "type": "cpu", "threads": 2, "versions": {"torch": "2.15"}})
    'Some CPU, 2 threads, torch 2.15'
    """
    words = [str(conditions.get("device") or "unknown device")]
    if conditions.get("type") != "cuda" and (threads := conditions.get("threads")):
        words.append(f"{threads} thread" + ("s" if threads != 1 else ""))
    versions = conditions.get("versions") or {}
    words += [f"{name} {versions[name]}" for name in ("torch", "triton") if name in versions]
    return ", ".join(words)


def as_run(source: Run | Iterable[Result], ceilings: Iterable[Ceiling] = ()) -> Run:
    """A run, or results alone made into one."""
    if isinstance(source, Run):
        return source
    return Run({}, ceilings=list(ceilings), results=list(source))
