"""A run's curves from the rows of its metrics.jsonl, one panel for each thing that was measured.

{"kind": "train", "step", "epoch", "loss", "lr", "images_per_s", ...}     with "time/loss", ...,
    milliseconds a step since the row before, where they were measured: stacked in one panel
{"kind": "eval", "step", "epoch", "knn", "linear", "rankme", ...}
{"kind": "baseline", "encoder", "knn", "linear", "rankme", ...}     drawn as a dashed line
{"kind": "event", "step", "what", "detail"}                some are marked on the loss
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FuncFormatter

from fastssl.report import figure
from fastssl.report.figure import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, RED

Row = dict[str, Any]
_BASELINES = {"random initialization": (MUTED, (0, (4, 2))), "raw input": (INK, (0, (1, 1.5)))}
# From below in the order of a step; others above them.
_TIMES = {
    "time/data": ("waiting for data", RED),
    "time/encode": ("encode", BLUE),
    "time/loss": ("loss", GREEN),
    "time/backward": ("backward", "#56b4e9"),
    "time/reduction": ("reduction, waited for", ORANGE),
    "time/optimizer": ("optimizer", PURPLE),
    "time/on_step": ("teachers, queues", "#e69f00"),
    "time/other": ("other", "#b8c0c8"),
}
_MARKED_EVENTS = ("resumed", "extended", "nonfinite", "spike", "returned", "collapse")


@dataclass(frozen=True)
class _Panel:
    kind: str
    key: str
    title: str
    color: str
    smooth: bool = False


_PANELS = [
    _Panel("train", "loss", "Loss", BLUE, smooth=True),
    _Panel("eval", "knn", "kNN accuracy, held out", GREEN),
    _Panel("eval", "linear", "Linear probe accuracy, held out", ORANGE),
    _Panel("eval", "rankme", "RankMe (effective dimensions)", PURPLE),
    _Panel("train", "lr", "Learning rate", BLUE),
    _Panel("train", "images_per_s", "Samples per second", RED, smooth=True),
]


def plot_curves(rows: Sequence[Row], path: Path) -> bool:
    """Write `path` (PNG) with the panels that have data; False, and no file, when none has.

    Of two rows of one kind and step the later counts: a resumed run repeats its last steps.
    """
    latest = {(row.get("kind"), row.get("step")): row for row in rows if "step" in row}
    ordered = sorted(latest.values(), key=lambda row: row["step"])
    series = [(panel, _series(ordered, panel)) for panel in _PANELS]
    drawn = [(panel, points) for panel, points in series if len(points)]
    times = [row for row in ordered if row.get("kind") == "train" and _TIMES.keys() & row.keys()]
    if not drawn:
        return False
    columns = min(2, len(drawn))
    lines = math.ceil(len(drawn) / columns) + bool(times)
    drawing = figure.new_figure(5.0 * columns, 2.45 * lines + 0.2)
    grid = drawing.add_gridspec(lines, columns)
    baselines = [row for row in rows if row.get("kind") == "baseline"]
    for place, (panel, points) in enumerate(drawn):
        axes = drawing.add_subplot(grid[place // columns, place % columns])
        figure.tidy(axes, panel.title, grid="y")
        _draw(axes, panel, points)
        _draw_baselines(axes, panel.key, baselines)
        if panel.key == "loss":
            _mark_events(axes, [row for row in rows if row.get("what") in _MARKED_EVENTS])
        if place >= len(drawn) - columns and not times:
            axes.set_xlabel("step", fontsize=8, color=MUTED)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if times:
        _stack(drawing.add_subplot(grid[-1, :]), times)
    figure.save(drawing, path)
    return True


def smoothed(values: np.ndarray, reach: int) -> np.ndarray:
    """The mean over `reach` neighbors to each side; blind to non-finite values.

    Nothing lags: the window is centered.  It is narrow at the steep start, to keep the first value,
    and lopsided at the flat end, to keep noise out of the last one.

    >>> smoothed(np.array([0.0, 1.0, 2.0, 3.0, 10.0]), reach=1).tolist()
    [0.0, 1.0, 2.0, 5.0, 6.5]
    """
    known = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(known)])
    place = np.arange(len(values))
    before = np.minimum(reach, place)
    after = np.minimum(before, len(values) - 1 - place)
    low, high = place - before, place + after + 1
    seen = count[high] - count[low]
    return np.where(seen > 0, (total[high] - total[low]) / np.maximum(seen, 1), np.nan)


def _series(rows: Sequence[Row], panel: _Panel) -> np.ndarray:
    """(n, 2) of step and value: the rows of the panel's kind that hold a number for its key."""
    found = [
        (row["step"], row[panel.key])
        for row in rows
        if row.get("kind") == panel.kind and isinstance(row.get(panel.key), int | float)
    ]
    return np.array(found, dtype=float).reshape(-1, 2)


def _draw(axes: Axes, panel: _Panel, points: np.ndarray) -> None:
    steps, values = points.T
    finite = values[np.isfinite(values)]
    if panel.smooth and len(values) > 20:
        axes.plot(steps, values, color=panel.color, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smoothed(values, max(3, len(values) // 50)), color=panel.color)
    else:
        marker = "o" if len(values) < 40 and panel.kind == "eval" or len(values) == 1 else None
        axes.plot(steps, values, color=panel.color, marker=marker, markersize=3.5)
    if panel.key == "loss" and len(finite) and finite.min() > 0:
        if finite.max() > 20 * finite.min():
            axes.set_yscale("log")
    if panel.key in ("lr", "images_per_s"):
        axes.set_ylim(bottom=0)
    if panel.key in ("lr", "images_per_s", "rankme"):
        axes.yaxis.set_major_formatter("{x:g}")
    if panel.key in ("knn", "linear"):
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.4g} %"))
        if len(finite):  # at least 4 points of accuracy: a few images must not fill the panel
            middle = (finite.min() + finite.max()) / 2
            axes.update_datalim([(steps[0], middle - 0.02), (steps[0], middle + 0.02)])
            axes.autoscale_view()
    if panel.kind == "eval" and len(finite):
        last = finite[-1]
        text = f"{last:.1f}" if panel.key == "rankme" else f"{100 * last:.1f} %"
        axes.set_title(text, loc="right", fontsize=10, fontweight="bold", color=panel.color)


def _stack(axes: Axes, rows: Sequence[Row]) -> None:
    """Milliseconds a step by part; a row's are those of the steps since the row before it."""
    figure.tidy(axes, "Milliseconds a step", grid="y")
    steps = [row["step"] for row in rows]
    begin = max(0, 2 * steps[0] - steps[1]) if len(steps) > 1 else 0
    keys = [key for key in _TIMES if any(row.get(key) for row in rows)]
    parts = np.array([[row.get(key) or 0.0 for row in rows] for key in keys])
    labels = [f"{_TIMES[k][0]}  {np.median(ms):.3g}" for k, ms in zip(keys, parts, strict=True)]
    axes.stackplot(
        [begin, *steps],
        np.concatenate([parts[:, :1], parts], axis=1),
        labels=labels,
        colors=[_TIMES[key][1] for key in keys],
        step="pre",
        linewidth=0,
    )
    total = parts.sum(0)
    axes.set(xlim=(begin, steps[-1]), ylim=(0, min(1.05 * total.max(), 2 * np.median(total))))
    axes.set_xlabel("step", fontsize=8, color=MUTED)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    quiet: dict[str, Any] = {"fontsize": 8, "frameon": False, "labelcolor": MUTED}
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (0.0, -0.18), "ncols": 4}
    axes.legend(**quiet, **place, handlelength=1.0)


def _draw_baselines(axes: Axes, key: str, baselines: Sequence[Row]) -> None:
    known = [row for row in baselines if isinstance(row.get(key), int | float)]
    for row in known:
        color, dashes = _BASELINES.get(row.get("encoder", ""), (MUTED, (0, (2, 2))))
        label = str(row.get("encoder", "baseline"))
        axes.axhline(row[key], color=color, linestyle=dashes, linewidth=1.2, label=label)
    if known:
        axes.margins(y=0.12)
        axes.legend(fontsize=7.5, frameon=False, labelcolor=MUTED, loc="best", handlelength=2.6)


def _mark_events(axes: Axes, events: Sequence[Row]) -> None:
    for event in events:
        color = RED if event["what"] == "nonfinite" else MUTED
        axes.axvline(event["step"], color=color, linewidth=0.8, linestyle=":")
        axes.annotate(
            event["what"],
            (event["step"], 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(2, -2),
            textcoords="offset points",
            fontsize=7,
            color=color,
            va="top",
        )
