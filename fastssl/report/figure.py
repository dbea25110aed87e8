"""What every picture shares: colors, a figure without global state, an atomic save.

matplotlib's object interface only: no pyplot, no backend choice, nothing kept between calls.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray
from torch import Tensor

from fastssl.files import write_atomically

# Okabe and Ito's palette: told apart under every common color blindness.
BLUE, ORANGE, GREEN, RED, PURPLE = "#0072b2", "#d55e00", "#009e73", "#c2185b", "#7b4fa0"
INK, MUTED, RULE = "#1f2933", "#5f6b76", "#d9dee3"
GRAY = "#808080"  # labels of transparent sheets: read as well on white as on black


def new_figure(width: float, height: float, dpi: int = 160) -> Figure:
    """An empty figure of so many inches, bound to the Agg canvas."""
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, wspace=0.04, hspace=0.06)
    figure = Figure(figsize=(width, height), dpi=dpi, layout=layout)
    FigureCanvasAgg(figure)
    return figure


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
    """`words` as they stand: matplotlib sets what is between two dollars as mathematics."""
    return words.replace("$", r"\$")


def png_of(figure: Figure, *, transparent: bool = False) -> bytes:
    """The figure as the bytes of a PNG."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", transparent=transparent)
    return picture.getvalue()


def save(figure: Figure, path: Path, *, transparent: bool = False) -> None:
    """Write the PNG beside `path` and move it there, so that nobody ever reads half a picture."""
    write_atomically(path, png_of(figure, transparent=transparent))


def plot_sheet(
    cells: Sequence[Sequence[Tensor]],
    path: Path,
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
) -> None:
    """A contact sheet on a transparent ground: cells[row][column] is an image (C, H, W) in [0, 1].

    C is 1 or 3.  Images smaller than the largest are centered in their cell.
    """
    tall = max(image.shape[1] for row in cells for image in row)
    wide = max(image.shape[2] for row in cells for image in row)
    rows, columns, gap = len(cells), max(map(len, cells)), max(1, round(0.06 * wide))
    step_y, step_x = tall + gap, wide + gap
    sheet = np.zeros((rows * step_y - gap, columns * step_x - gap, 4), dtype=np.float32)
    for r, row in enumerate(cells):
        for c, image in enumerate(row):
            pixels = _rgba(image)
            top = r * step_y + (tall - pixels.shape[0]) // 2
            left = c * step_x + (wide - pixels.shape[1]) // 2
            sheet[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    scale = min(0.8, 9.0 / columns) / step_x  # inches a pixel
    margin = 1.1 if row_labels else 0.1
    figure = new_figure(sheet.shape[1] * scale + margin, sheet.shape[0] * scale + 0.35)
    axes = figure.add_subplot()
    axes.imshow(sheet, interpolation="nearest")
    axes.set_xticks([c * step_x + wide / 2 for c in range(len(column_labels))], column_labels)
    axes.set_yticks([r * step_y + tall / 2 for r in range(len(row_labels))], row_labels)
    axes.tick_params(colors=GRAY, labelsize=9, length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    save(figure, path, transparent=True)


def _rgba(image: Tensor) -> NDArray[np.float32]:
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"an image must be (1 or 3, H, W), got {tuple(image.shape)}")
    pixels = image.detach().float().nan_to_num().clamp(0, 1).cpu().expand(3, -1, -1)
    opaque = np.ones((*pixels.shape[1:], 1), dtype=np.float32)
    return np.concatenate([pixels.permute(1, 2, 0).numpy(), opaque], axis=2)
