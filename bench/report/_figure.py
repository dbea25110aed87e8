"""What every picture of a run shares: a look for each rival, a figure without global state.

matplotlib is imported when a picture is drawn and not before.  The palette is Okabe and Ito's, told
apart under every common colour blindness, and every rival has a marker of its own besides.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fastssl.bench.record import Result
from fastssl.bench.registry import OURS
from fastssl.bench.report.formatting import size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, RULE = "#1f2933", "#5f6b76", "#d9dee3"
_KNOWN = {
    OURS: ("#0072b2", "o"),
    "reference": ("#6b7480", "s"),
    "compile": ("#e69f00", "^"),
    "lightly": ("#d55e00", "D"),
    "open_clip": ("#009e73", "v"),
    "pytorch-metric-learning": ("#cc79a7", "P"),
    "siglip-kernel": ("#56b4e9", "X"),
    "cut-cross-entropy": ("#7b4fa0", "*"),
}
_SPARE = ("#a6761d", "#332288", "#999933", "#aa4499", "#44aa99", "#000000")
_SPARE_MARKERS = "<>hpd8"


@dataclass(frozen=True)
class Picture:
    """A PNG with the name of its theme, the heading it belongs under, and what it shows."""

    name: str
    heading: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class Look:
    """How a rival is drawn, in every picture."""

    colour: str
    marker: str


def looks_of(results: Iterable[Result]) -> dict[str, Look]:
    """A look for every rival: known names have their own, the others follow in alphabetic order."""
    looks = {name: Look(*look) for name, look in _KNOWN.items()}
    for i, name in enumerate(sorted({row.rival for row in results} - set(_KNOWN))):
        looks[name] = Look(_SPARE[i % len(_SPARE)], _SPARE_MARKERS[i % len(_SPARE_MARKERS)])
    return looks


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches on the Agg canvas."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, wspace=0.04, hspace=0.06)
    figure = Figure(figsize=(width, height), dpi=150, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def png_of(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG."""
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def tidy(
    axes: Axes, title: str, grid: Literal["both", "x", "y"] = "both", *, pad: float = 6
) -> None:
    """A quiet frame: title at the left (`pad` points up), thin rules, no box."""
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK, pad=pad)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.tick_params(which="both", colors=MUTED, labelsize=8, length=0)
    axes.grid(axis=grid, color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)


def plain(words: str) -> str:
    """matplotlib would set what stands between two dollars as mathematics."""
    return words.replace("$", r"\$")


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
