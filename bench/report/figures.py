"""A run in pictures: time beside ours, growth along the sweeps, and the roofline of each dtype.

This module needs matplotlib; whoever imports it looks for that first.  Figures are made without
global state.  The palette is Okabe and Ito's, told apart under every common color blindness, and
every rival has a marker of its own besides.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from fastssl.bench.record import Ceiling, Fit, Result, Run
from fastssl.bench.registry import OURS
from fastssl.bench.report.formatting import is_ours, measurements, number, scale, shape_words, size
from fastssl.bench.report.scaling import fits, sweeps
from fastssl.report.figure import INK, MUTED, RULE, new_figure, plain, png_of, tidy

DOTTED = (0, (1, 2))
MOST_LINES = 42  # a figure of bars has about so many lines at most
LINE_INCHES = 0.205
KNOWN_LOOKS = {
    OURS: ("#0072b2", "o"),
    "reference": ("#6b7480", "s"),
    "compile": ("#e69f00", "^"),
    "lightly": ("#d55e00", "D"),
    "open_clip": ("#009e73", "v"),
    "pytorch-metric-learning": ("#cc79a7", "P"),
    "siglip-kernel": ("#56b4e9", "X"),
    "cut-cross-entropy": ("#7b4fa0", "*"),
    "memeff": ("#8c564b", "8"),
}
SPARE_COLORS = ("#a6761d", "#332288", "#999933", "#aa4499", "#44aa99", "#000000")
SPARE_MARKERS = "<>hpd8"


@dataclass(frozen=True)
class Picture:
    """A PNG with the name of its theme, the heading it belongs under, and what it shows."""

    name: str
    heading: str
    caption: str
    png: bytes

    @property
    def base64(self) -> str:
        """The PNG as a page embeds it."""
        return base64.b64encode(self.png).decode()


class Look(NamedTuple):
    """How a rival is drawn, in every picture."""

    color: str
    marker: str


Looks = dict[str, Look]


def looks_of(results: Iterable[Result]) -> Looks:
    """A look for every rival: known names have their own, the others follow in alphabetic order."""
    known = {name: Look(*look) for name, look in KNOWN_LOOKS.items()}
    others = sorted({row.rival for row in results} - set(known))
    spare = map(Look, cycle(SPARE_COLORS), cycle(SPARE_MARKERS))
    return known | dict(zip(others, spare, strict=False))


def save_all(run: Run, folder: Path) -> list[Path]:
    """Write every picture of the run into `folder`, which is made, and return their paths.

    Named by theme: relative-DTYPE.png, growth-CASE-VARIABLE-DTYPE.png, roofline-DTYPE.png.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for picture in pictures(run):
        paths.append(folder / f"{picture.name}.png")
        paths[-1].write_bytes(picture.png)
    return paths


def pictures(run: Run) -> list[Picture]:
    """Every picture the run has figures for, with names that differ."""
    looks = looks_of(run.results)
    drawn = [*_relatives(run, looks), *_growths(run.results, looks), *_rooflines(run, looks)]
    seen: dict[str, int] = {}
    for i, picture in enumerate(drawn):
        seen[picture.name] = count = seen.get(picture.name, 0) + 1
        if count > 1:
            drawn[i] = replace(picture, name=f"{picture.name}-{count}")
    return drawn


def _legend_below(figure: Figure, *entries: Sequence, columns: int) -> None:
    style = {"frameon": False, "fontsize": 8, "labelcolor": INK}
    figure.legend(*entries, loc="outside lower center", ncols=columns, **style)


def tick(value: float, _: object = None) -> str:
    """A number on an axis.

    >>> tick(0.001), tick(2000.0), tick(10000.0)
    ('0.001', '2000', '10k')
    """
    return f"{value / 1000:g}k" if value >= 1e4 else f"{value:g}"


def tick_bytes(value: float, _: object = None) -> str:
    """Bytes on an axis.

    >>> tick_bytes(2e6), tick_bytes(1e9)
    ('2 MB', '1 GB')
    """
    count, unit = size(value).split(" ")
    return f"{float(count):g} {unit}"


# Time beside ours.


def _relatives(run: Run, looks: Looks) -> Iterator[Picture]:
    groups = [
        rows
        for rows in measurements(run.results)
        if not rows[0].sweep and any(row.x is not None for row in rows if not is_ours(row.rival))
    ]
    for dtype in dict.fromkeys(rows[0].dtype for rows in groups):
        for sheet in _sheets([rows for rows in groups if rows[0].dtype == dtype]):
            caption = (
                f"Time of a whole call over that of fastssl, {dtype}: right of the line a rival "
                "takes longer, left of it less. Whiskers: 95 % interval of the median. Hatched: a "
                "tie, where the interval holds 1 or the difference lies inside the noise."
            )
            figure = _relative(sheet, looks, dtype)
            yield Picture(f"relative-{dtype}", "Time beside fastssl", caption, png_of(figure))


def _sheets(groups: Sequence[list[Result]]) -> list[list[list[Result]]]:
    """The measurements on as many figures as they need."""
    sheets: list[list[list[Result]]] = [[]]
    for rows in groups:
        lines = sum(len(placed) + 1 for placed in sheets[-1])
        if sheets[-1] and lines + len(rows) > MOST_LINES:
            sheets.append([])
        sheets[-1].append(rows)
    return sheets


def _relative(groups: Sequence[list[Result]], looks: Looks, dtype: str) -> Figure:
    """Horizontal bars from 1 to x, a group for each measurement."""
    shown = [[row for row in rows if row.rival != OURS] for rows in groups]
    figure = new_figure(8.6, 1.0 + LINE_INCHES * sum(len(rows) + 1.4 for rows in shown))
    axes = figure.add_subplot()
    tidy(axes, f"Time as a multiple of fastssl's, {dtype}", grid="x")
    axes.set_xscale("log")
    axes.set_xlim(*_ends([row for rows in shown for row in rows]))
    names, y = [], 0.0
    for rows in shown:
        names.append((y, plain(f"{rows[0].case}  {shape_words(rows[0].shape)}"), True))
        for row in rows:
            y += 1
            names.append((y, plain(row.rival), False))
            _bar(axes, y, row, looks[row.rival])
        y += 1.4
    axes.axvline(1, color=looks[OURS].color, linewidth=1.6)
    axes.set_yticks([at for at, _, _ in names], [words for _, words, _ in names])
    for label, (_, _, head) in zip(axes.get_yticklabels(), names, strict=True):
        label.set(fontweight="bold" if head else "normal", color=INK if head else MUTED)
    axes.set_ylim(y - 0.6, -0.8)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(tick))
    axes.xaxis.set_minor_formatter(NullFormatter())
    return figure


def _ends(rows: Sequence[Result]) -> tuple[float, float]:
    """Of the axis: every bar, and every whisker as far as it is not much longer than the bars."""
    xs = [row.x for row in rows if row.x is not None]
    low, high = min(0.8, *xs, 1), max(1.25, *xs)
    whiskers = [end for row in rows for end in (row.x_low, row.x_high) if end]
    low = max(min(low, *whiskers, 1), low / 2)
    high = min(max(high, *whiskers, 1), high * 2)
    margin = (high / low) ** 0.04
    return low / margin, high * margin


def _bar(axes: Axes, y: float, row: Result, look: Look) -> None:
    """The bar, its whiskers and, right of the panel, its number or why there is none."""
    if row.x is None:
        _say(axes, y, "no time of fastssl" if row.status == "ok" else row.status, MUTED)
        return
    axes.barh(
        y,
        row.x - 1,
        left=1,
        height=0.72,
        color="white" if row.tie else look.color,
        edgecolor=look.color,
        hatch="////" if row.tie else None,
        linewidth=0.8,
    )
    whisker = [row.x_low or row.x, row.x_high or row.x]
    axes.plot(whisker, [y, y], color=INK, linewidth=1.1, marker="|", markersize=5)
    _say(axes, y, f"{number(row.x)}{' tie' if row.tie else ''}", INK)


def _say(axes: Axes, y: float, words: str, color: str) -> None:
    across = axes.get_yaxis_transform()  # x as a share of the panel, y in data
    style = {"va": "center", "fontsize": 8, "color": color, "annotation_clip": False}
    axes.annotate(words, (1.01, y), xycoords=across, **style)


# How time and memory grow along a sweep: two panels, a line for each rival, fitted exponents.


def _growths(results: Sequence[Result], looks: Looks) -> Iterator[Picture]:
    """A picture for each sweep that has a time."""
    together: dict[tuple, dict[str, list[Result]]] = {}
    for (case, dtype, rival, variable, fixed), rows in sweeps(results).items():
        together.setdefault((case, dtype, variable, fixed), {})[rival] = rows
    for (case, dtype, variable, fixed), rivals in together.items():
        rows = [row for some in rivals.values() for row in some]
        if not any(row.total for row in rows):
            continue
        at = ", ".join(word for word in (shape_words(fixed), dtype) if word)
        figure = _growth(f"{case}, {at}", variable, rivals, looks)
        caption = (
            f"{case} at {at}, both axes logarithmic. Left, the time of a whole call: medians, "
            "and as a band the 20th to 80th percentile. Right, the memory a call needs. "
            "A cross at the top: out of memory from there on."
        )
        yield Picture(f"growth-{case}-{variable}-{dtype}", "Growth", caption, png_of(figure))


def _growth(title: str, variable: str, rivals: dict[str, list[Result]], looks: Looks) -> Figure:
    """Time, and beside it memory where it was measured."""
    names = [name for name, rows in rivals.items() if any(row.total for row in rows)]
    rows = [row for some in rivals.values() for row in some]
    panels = [("ms", f"{title}: time, ms")]
    if any(row.peak for row in rows):
        panels.append(("peak", "Memory"))
    figure = new_figure(4.8 * len(panels), 3.9 + 0.24 * math.ceil(len(names) / 2))
    every = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (quantity, head) in zip(every, panels, strict=True):
        tidy(axes, head)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for some in rivals.values():
            _curve(axes, sorted(some, key=lambda r: r.shape[variable]), variable, quantity, looks)
        _finish(axes, rivals, variable, quantity, looks)
    exponents = {(fit.rival, fit.quantity): fit for fit in fits(rows)}
    handles = [Line2D([], [], color=looks[n].color, marker=looks[n].marker) for n in names]
    labels = [_label(name, variable, exponents) for name in names]
    if any(row.floor for row in rows):
        handles.append(Line2D([], [], color=MUTED, linewidth=1, linestyle=DOTTED))
        labels.append("floor of the time on this machine")
    _legend_below(figure, handles, labels, columns=len(panels))
    return figure


def _value(row: Result, quantity: str) -> float | None:
    if row.status != "ok" or row.total is None:
        return None
    return row.total.p50 if quantity == "ms" else row.peak


def _curve(axes: Axes, rows: Sequence[Result], variable: str, quantity: str, looks: Looks) -> None:
    points = [(row, y) for row in rows if (y := _value(row, quantity))]
    if not points:
        return
    rival = points[0][0].rival
    look, width = looks[rival], 2.2 if rival == OURS else 1.4
    xs = [row.shape[variable] for row, _ in points]
    ys = [y for _, y in points]
    axes.plot(xs, ys, color=look.color, marker=look.marker, markersize=5, linewidth=width)
    if quantity == "ms":
        spreads = [row.total for row, _ in points if row.total]
        ends = [s.p20 for s in spreads], [s.p80 for s in spreads]
        axes.fill_between(xs, *ends, color=look.color, alpha=0.18, linewidth=0)


def _finish(
    axes: Axes, rivals: dict[str, list[Result]], variable: str, quantity: str, looks: Looks
) -> None:
    """Ticks at the sweep's values, the floor, and a cross at the top for what ran out of memory."""
    rows = [row for some in rivals.values() for row in some]
    values = sorted({row.shape[variable] for row in rows})
    axes.set_xticks(values, [_short(v) for v in values])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(values[0] / 1.3, values[-1] * 1.3)
    axes.set_xlabel(variable, fontsize=9, color=MUTED)
    axes.yaxis.set_major_formatter(FuncFormatter(tick if quantity == "ms" else tick_bytes))
    axes.yaxis.set_minor_formatter(NullFormatter())
    if quantity == "ms":
        floors = {row.shape[variable]: row.floor for row in rows if row.floor}
        if len(floors) > 1:
            xs = sorted(floors)
            axes.plot(xs, [floors[x] for x in xs], color=MUTED, linewidth=1, linestyle=DOTTED)
    drawn = [y for row in rows if (y := _value(row, quantity))]
    if drawn:
        _crosses(axes, rivals, variable, max(drawn), looks)
    low, high = axes.get_ylim()
    subs = (1,) if high > 200 * low else (1, 2, 5) if high > 8 * low else (1, 1.5, 2, 3, 4, 5, 7)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))


def _crosses(
    axes: Axes, rivals: dict[str, list[Result]], variable: str, largest: float, looks: Looks
) -> None:
    """A cross in a strip at the top, where each rival first runs out of memory."""
    lost = {
        rival: [row.shape[variable] for row in rows if row.status == "out of memory"]
        for rival, rows in rivals.items()
    }
    first = {rival: min(values) for rival, values in lost.items() if values}
    if not first:
        return
    taken: dict[int, int] = {}
    across = axes.get_xaxis_transform()  # x in data, y as a share of the panel
    for rival, x in first.items():
        y = 0.965 - 0.045 * taken.get(x, 0)
        taken[x] = taken.get(x, 0) + 1
        style = {"marker": "x", "markersize": 6, "markeredgewidth": 1.8, "linestyle": ""}
        axes.plot([x], [y], color=looks[rival].color, transform=across, **style)
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


def _label(name: str, variable: str, exponents: dict[tuple[str, str], Fit]) -> str:
    said = [
        f"{head} ~ {variable}$^{{{exponents[name, quantity].exponent:.2f}}}$"
        for head, quantity in (("time", "ms"), ("memory", "peak"))
        if (name, quantity) in exponents
    ]
    return plain(name) + (f": {', '.join(said)}" if said else "")


def _short(value: int) -> str:
    for unit, name in ((1 << 20, "M"), (1 << 10, "k")):
        if value >= unit and value % unit == 0:
            return f"{value // unit}{name}"
    return str(value)


# The roofline.


def _rooflines(run: Run, looks: Looks) -> Iterator[Picture]:
    rates = {c.what: c for c in run.ceilings}
    for dtype in dict.fromkeys(row.dtype for row in run.results):
        copy, product = rates.get("copy"), rates.get(f"matmul {dtype}")
        points = [
            row for row in run.results if row.dtype == dtype and row.tflops and _intensity(row)
        ]
        if copy is None or product is None or not points:
            continue
        figure = _roofline(points, copy, product, looks)
        caption = (
            f"Work done a second against operations for each byte the problem needs, {dtype}. "
            "Solid: what a copy and a matrix product reached in this run; dashed: the datasheet. "
            "One column of points is one measurement; the higher, the faster."
        )
        yield Picture(f"roofline-{dtype}", "Roofline", caption, png_of(figure))


def _intensity(row: Result) -> float:
    """Operations for each byte that the problem needs; 0 where either is not stated."""
    moved = sum(row.bytes_moved.values())
    return sum(row.flops.values()) / moved if moved else 0.0


def _roofline(points: Sequence[Result], copy: Ceiling, product: Ceiling, looks: Looks) -> Figure:
    figure = new_figure(8.6, 5.2)
    axes = figure.add_subplot()
    longest = max(len(row.case) for row in points)
    tidy(axes, f"Roofline, {points[0].dtype}", pad=10 + 3.4 * longest)
    axes.set_xscale("log")
    axes.set_yscale("log")
    xs = [_intensity(row) for row in points]
    ridge = product.measured * 1e3 / copy.measured
    ends = min(*xs, ridge) / 3, max(*xs, ridge) * 3
    factor, unit = scale(product)
    _roofs(axes, ends, copy, product)
    for rival in dict.fromkeys(row.rival for row in points):
        mine = [row for row in points if row.rival == rival]
        axes.plot(
            [_intensity(row) for row in mine],
            [factor * (row.tflops or 0) for row in mine],
            linestyle="",
            color=looks[rival].color,
            marker=looks[rival].marker,
            markersize=7 if rival == OURS else 5.5,
            markeredgecolor="white",
            markeredgewidth=0.6,
            label=plain(rival),
            zorder=4 if rival == OURS else 3,
        )
    axes.set_xlim(*ends)
    axes.xaxis.set_major_formatter(FuncFormatter(tick))
    axes.yaxis.set_major_formatter(FuncFormatter(tick))
    axes.set_xlabel("operations for each byte", fontsize=9, color=MUTED)
    axes.set_ylabel(unit, fontsize=9, color=MUTED)
    _legend_below(figure, columns=3)
    _name_cases(figure, axes, points, factor)
    return figure


def _roofs(axes: Axes, ends: tuple[float, float], copy: Ceiling, product: Ceiling) -> None:
    """Measured, and dashed what the datasheet states; named in the legend, out of the way."""
    factor, unit = scale(product)
    for line, color, gbs, tflops, head in (
        ("-", INK, copy.measured, product.measured, "measured"),
        ("--", MUTED, copy.datasheet, product.datasheet, "datasheet"),
    ):
        if gbs and tflops:
            said = f"{head}: {gbs:.4g} GB/s, {factor * tflops:.4g} {unit}"
            xs = [ends[0] * (ends[1] / ends[0]) ** (i / 200) for i in range(201)]
            ys = [factor * min(gbs * x / 1e3, tflops) for x in xs]
            axes.plot(xs, ys, color=color, linestyle=line, linewidth=1.2, label=said)


def _name_cases(figure: Figure, axes: Axes, points: Sequence[Result], factor: float) -> None:
    """Each case's name above the roof, aslant, with a line down to its highest point."""
    best: dict[str, Result] = {}
    for row in points:
        if row.case not in best or (row.tflops or 0) > (best[row.case].tflops or 0):
            best[row.case] = row
    rows = sorted(best.values(), key=_intensity)
    figure.draw_without_rendering()
    there, back = axes.transData, axes.transData.inverted()
    spots = [there.transform((_intensity(row), 1.0))[0] for row in rows]
    for row, x in zip(rows, _apart(spots, 16 * figure.dpi / 72), strict=True):
        axes.annotate(
            plain(row.case),
            (_intensity(row), factor * (row.tflops or 0)),
            xytext=(back.transform((x, 0))[0], 1.01),
            textcoords=("data", "axes fraction"),
            rotation=40,
            rotation_mode="anchor",
            fontsize=8,
            color=INK,
            arrowprops={"arrowstyle": "-", "color": RULE, "lw": 0.8, "relpos": (0, 0)},
        )


def _apart(places: Sequence[float], least: float) -> list[float]:
    """The ascending places moved as little as may be until neighbors are `least` apart.

    >>> _apart([0.0, 1.0, 50.0], 10.0)
    [-4.5, 5.5, 50.0]
    """
    groups: list[tuple[float, int]] = []  # isotonic regression of the places less their due
    for i, place in enumerate(places):
        groups.append((place - i * least, 1))
        while len(groups) > 1 and groups[-2][0] > groups[-1][0]:
            (a, m), (b, n) = groups[-2:]
            groups[-2:] = [((a * m + b * n) / (m + n), m + n)]
    level = [mean for mean, count in groups for _ in range(count)]
    return [mean + i * least for i, mean in enumerate(level)]
