"""How time and memory grow along a sweep: two panels, a line for each rival, fitted exponents."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fastssl.bench.record import Fit, Result
from fastssl.bench.registry import OURS
from fastssl.bench.report._figure import (
    INK,
    MUTED,
    Look,
    Picture,
    new_figure,
    plain,
    png_of,
    tick,
    tick_bytes,
    tidy,
)
from fastssl.bench.report.formatting import shape_words
from fastssl.bench.report.scaling import fits, sweeps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def growths(results: Sequence[Result], looks: dict[str, Look]) -> Iterator[Picture]:
    """A picture for each sweep that has a time."""
    fitted = {
        (f.case, f.dtype, f.rival, f.variable, tuple(f.fixed.items()), f.quantity): f
        for f in fits(results)
    }
    together: dict[tuple, dict[str, list[Result]]] = {}
    for (case, dtype, rival, variable, fixed), rows in sweeps(results).items():
        together.setdefault((case, dtype, variable, fixed), {})[rival] = rows
    for (case, dtype, variable, fixed), rivals in together.items():
        if not any(row.total for rows in rivals.values() for row in rows):
            continue
        exponents = {
            (rival, quantity): fitted.get((case, dtype, rival, variable, fixed, quantity))
            for rival in rivals
            for quantity in ("ms", "peak")
        }
        at = ", ".join(word for word in (shape_words(fixed), dtype) if word)
        figure = _growth(f"{case}, {at}", variable, rivals, exponents, looks)
        caption = (
            f"{case} at {at}, both axes logarithmic. Left, the time of a whole call: medians, "
            "and as a band the 20th to 80th percentile. Right, the memory a call needs. "
            "A cross at the top: out of memory from there on."
        )
        yield Picture(f"growth-{case}-{variable}-{dtype}", "Growth", caption, png_of(figure))


def _growth(
    title: str,
    variable: str,
    rivals: dict[str, list[Result]],
    exponents: dict[tuple[str, str], Fit | None],
    looks: dict[str, Look],
) -> Figure:
    """Time, and beside it memory where it was measured."""
    names = [name for name, rows in rivals.items() if any(row.total for row in rows)]
    rows = [row for found in rivals.values() for row in found]
    panels = [("ms", f"{title}: time, ms")]
    if any(row.peak for row in rows):
        panels.append(("peak", "Memory"))
    figure = new_figure(4.8 * len(panels), 3.9 + 0.24 * math.ceil(len(names) / 2))
    every = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (quantity, head) in zip(every, panels, strict=True):
        tidy(axes, head)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for found in rivals.values():
            _curve(axes, sorted(found, key=lambda r: r.shape[variable]), variable, quantity, looks)
        _finish(axes, rivals, variable, quantity, looks)
    handles, labels = _legend(names, variable, exponents, looks)
    if not any(row.floor for row in rows):
        handles, labels = handles[:-1], labels[:-1]
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=len(panels),
        frameon=False,
        fontsize=8,
        labelcolor=INK,
    )
    return figure


def _value(row: Result, quantity: str) -> float | None:
    if row.status != "ok" or row.total is None:
        return None
    return row.total.p50 if quantity == "ms" else row.peak


def _curve(
    axes: Axes, rows: Sequence[Result], variable: str, quantity: str, looks: dict[str, Look]
) -> None:
    points = [(row, y) for row in rows if (y := _value(row, quantity))]
    if not points:
        return
    look = looks[points[0][0].rival]
    xs = [row.shape[variable] for row, _ in points]
    wide = 2.2 if points[0][0].rival == OURS else 1.4
    ys = [y for _, y in points]
    axes.plot(xs, ys, color=look.colour, marker=look.marker, markersize=5, linewidth=wide)
    if quantity == "ms":
        spreads = [row.total for row, _ in points if row.total]
        ends = [s.p20 for s in spreads], [s.p80 for s in spreads]
        axes.fill_between(xs, *ends, color=look.colour, alpha=0.18, linewidth=0)


def _finish(
    axes: Axes,
    rivals: dict[str, list[Result]],
    variable: str,
    quantity: str,
    looks: dict[str, Look],
) -> None:
    """Ticks at the sweep's values, the floor, and a cross at the top for what ran out of memory."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    rows = [row for found in rivals.values() for row in found]
    values = sorted({row.shape[variable] for row in rows})
    axes.set_xticks(values, [_short(v) for v in values])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(values[0] / 1.3, values[-1] * 1.3)
    axes.set_xlabel(variable, fontsize=9, color=MUTED)
    axes.yaxis.set_major_formatter(FuncFormatter(tick if quantity == "ms" else tick_bytes))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: ""))
    if quantity == "ms":
        floors = {row.shape[variable]: row.floor for row in rows if row.floor}
        if len(floors) > 1:
            xs = sorted(floors)
            axes.plot(xs, [floors[x] for x in xs], color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
    drawn = [y for row in rows if (y := _value(row, quantity))]
    if drawn:
        _crosses(axes, rivals, variable, max(drawn), looks)
    low, high = axes.get_ylim()
    subs = (1,) if high > 200 * low else (1, 2, 5) if high > 8 * low else (1, 1.5, 2, 3, 4, 5, 7)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))


def _crosses(
    axes: Axes,
    rivals: dict[str, list[Result]],
    variable: str,
    largest: float,
    looks: dict[str, Look],
) -> None:
    """A cross in a strip at the top, where each rival first runs out of memory."""
    first = {
        rival: min(row.shape[variable] for row in rows if row.status == "out of memory")
        for rival, rows in rivals.items()
        if any(row.status == "out of memory" for row in rows)
    }
    if not first:
        return
    taken: dict[int, int] = {}
    across = axes.get_xaxis_transform()  # x in data, y as a share of the panel
    for rival, x in first.items():
        y = 0.965 - 0.045 * taken.get(x, 0)
        taken[x] = taken.get(x, 0) + 1
        style = {"marker": "x", "markersize": 6, "markeredgewidth": 1.8}
        axes.plot([x], [y], color=looks[rival].colour, transform=across, linestyle="", **style)
    axes.annotate(
        "out of memory from here",
        (min(taken), 0.965),
        xycoords=across,
        xytext=(-8, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        fontsize=8,
        color=MUTED,
    )
    low = axes.get_ylim()[0]
    share = 0.9 - 0.045 * max(taken.values())  # of the panel's height, for the curves
    axes.set_ylim(low, low * (largest / low) ** (1 / share))


def _legend(
    names: Sequence[str],
    variable: str,
    exponents: dict[tuple[str, str], Fit | None],
    looks: dict[str, Look],
) -> tuple[list, list[str]]:
    from matplotlib.lines import Line2D

    handles, labels = [], []
    for name in names:
        said = [
            f"{head} ~ {variable}$^{{{found.exponent:.2f}}}$"
            for head, quantity in (("time", "ms"), ("memory", "peak"))
            if (found := exponents[name, quantity])
        ]
        handles.append(Line2D([], [], color=looks[name].colour, marker=looks[name].marker))
        labels.append(plain(name) + (f": {', '.join(said)}" if said else ""))
    handles.append(Line2D([], [], color=MUTED, linewidth=1, linestyle=(0, (1, 2))))
    labels.append("floor of the time on this machine")
    return handles, labels


def _short(value: int) -> str:
    for unit, name in ((1 << 20, "M"), (1 << 10, "k")):
        if value >= unit and value % unit == 0:
            return f"{value // unit}{name}"
    return str(value)
