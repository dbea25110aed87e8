"""A run in pictures: time beside ours, growth along the sweeps, and the roofline of each dtype.

matplotlib is needed for it, and imported only when a picture is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fastssl.bench.record import Ceiling, Result, Run
from fastssl.bench.registry import OURS
from fastssl.bench.report import formatting
from fastssl.bench.report._figure import (
    INK,
    MUTED,
    RULE,
    Look,
    Picture,
    looks_of,
    new_figure,
    plain,
    png_of,
    tick,
    tidy,
)
from fastssl.bench.report._growth import growths
from fastssl.bench.report.formatting import is_ours, number, shape_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_LINES = 42  # a figure of bars has about so many lines at most
_INCHES = 0.205  # of a line


def available() -> bool:
    """Whether pictures can be drawn: matplotlib is installed."""
    return find_spec("matplotlib") is not None


def save_all(run: Run, folder: Path) -> list[Path]:
    """Write every picture of the run into `folder`, which is made, and return their paths.

    Named by theme: relative-DTYPE.png, growth-CASE-VARIABLE-DTYPE.png, roofline-DTYPE.png.
    Raises ModuleNotFoundError where matplotlib is not installed.
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
    drawn = [*_relatives(run, looks), *growths(run.results, looks), *_rooflines(run, looks)]
    seen: dict[str, int] = {}
    for i, picture in enumerate(drawn):
        seen[picture.name] = count = seen.get(picture.name, 0) + 1
        if count > 1:
            drawn[i] = replace(picture, name=f"{picture.name}-{count}")
    return drawn


def _relatives(run: Run, looks: dict[str, Look]) -> Iterator[Picture]:
    groups = [
        rows
        for rows in formatting.measurements(run.results)
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
        if sheets[-1] and lines + len(rows) > _MOST_LINES:
            sheets.append([])
        sheets[-1].append(rows)
    return sheets


def _relative(groups: Sequence[list[Result]], looks: dict[str, Look], dtype: str) -> Figure:
    """Horizontal bars from 1 to x, a group for each measurement."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    shown = [[row for row in rows if row.rival != OURS] for rows in groups]
    lines = sum(len(rows) + 1.4 for rows in shown)
    figure = new_figure(8.6, 1.0 + _INCHES * lines)
    axes = figure.add_subplot()
    tidy(axes, f"Time as a multiple of fastssl's, {dtype}", grid="x")
    axes.set_xscale("log")
    axes.set_xlim(*_ends([row for rows in shown for row in rows]))
    names, y = [], 0.0
    for rows in shown:
        head = f"{rows[0].case}  {shape_words(rows[0].shape)}"
        names.append((y, plain(head), True))
        for row in rows:
            y += 1
            names.append((y, plain(row.rival), False))
            _bar(axes, y, row, looks[row.rival])
        y += 1.4
    axes.axvline(1, color=looks[OURS].colour, linewidth=1.6)
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
        said = "no time of fastssl" if row.status == "ok" else row.status
        _say(axes, y, said, MUTED)
        return
    axes.barh(
        y,
        row.x - 1,
        left=1,
        height=0.72,
        color="white" if row.tie else look.colour,
        edgecolor=look.colour,
        hatch="////" if row.tie else None,
        linewidth=0.8,
    )
    low, high = row.x_low or row.x, row.x_high or row.x
    axes.plot([low, high], [y, y], color=INK, linewidth=1.1, solid_capstyle="butt")
    axes.plot([low, high], [y, y], color=INK, marker="|", markersize=5, linestyle="")
    _say(axes, y, f"{number(row.x)}{' tie' if row.tie else ''}", INK)


def _say(axes: Axes, y: float, words: str, colour: str) -> None:
    axes.annotate(
        words,
        (1.01, y),
        xycoords=axes.get_yaxis_transform(),  # x as a share of the panel, y in data
        va="center",
        fontsize=8,
        color=colour,
        annotation_clip=False,
    )


def _rooflines(run: Run, looks: dict[str, Look]) -> Iterator[Picture]:
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


def _roofline(
    points: Sequence[Result], copy: Ceiling, product: Ceiling, looks: dict[str, Look]
) -> Figure:
    from matplotlib.ticker import FuncFormatter

    figure = new_figure(8.6, 5.2)
    axes = figure.add_subplot()
    longest = max(len(row.case) for row in points)
    tidy(axes, f"Roofline, {points[0].dtype}", pad=10 + 3.4 * longest)
    axes.set_xscale("log")
    axes.set_yscale("log")
    xs = [_intensity(row) for row in points]
    ridge = product.measured * 1e3 / copy.measured
    ends = min(*xs, ridge) / 3, max(*xs, ridge) * 3
    factor, unit = formatting.scale(product)
    _roofs(axes, ends, copy, product)
    for rival in dict.fromkeys(row.rival for row in points):
        mine = [row for row in points if row.rival == rival]
        axes.plot(
            [_intensity(row) for row in mine],
            [factor * (row.tflops or 0) for row in mine],
            linestyle="",
            color=looks[rival].colour,
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
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8, labelcolor=INK)
    _name_cases(figure, axes, points, factor)
    return figure


def _roofs(axes: Axes, ends: tuple[float, float], copy: Ceiling, product: Ceiling) -> None:
    """Measured, and dashed what the datasheet states; named in the legend, out of the way."""
    factor, unit = formatting.scale(product)
    for line, colour, gbs, tflops, head in (
        ("-", INK, copy.measured, product.measured, "measured"),
        ("--", MUTED, copy.datasheet, product.datasheet, "datasheet"),
    ):
        if gbs and tflops:
            said = f"{head}: {gbs:.4g} GB/s, {factor * tflops:.4g} {unit}"
            xs = [ends[0] * (ends[1] / ends[0]) ** (i / 200) for i in range(201)]
            ys = [factor * min(gbs * x / 1e3, tflops) for x in xs]
            axes.plot(xs, ys, color=colour, linestyle=line, linewidth=1.2, label=said)


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
    """The ascending places moved as little as may be until neighbours are `least` apart.

    >>> _apart([0.0, 1.0, 50.0], 10.0)
    [-4.5, 5.5, 50.0]
    """
    groups: list[list[float]] = []
    for place in places:
        groups.append([place])
        while len(groups) > 1 and _start(groups[-1], least) < _end(groups[-2], least) + least:
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_start(group, least) + i * least for group in groups for i in range(len(group))]


def _start(group: Sequence[float], least: float) -> float:
    return sum(group) / len(group) - least * (len(group) - 1) / 2


def _end(group: Sequence[float], least: float) -> float:
    return _start(group, least) + least * (len(group) - 1)
