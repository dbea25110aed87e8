"""Sheets of what is no image: clips as strips of frames, signals as lines, clouds as points in 3-D.

Transparent as the sheets of images are.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

from fastssl.report.figure import BLUE, GRAY, new_figure, plot_sheet, save

FRAMES = 8  # of a clip, evenly spaced, in its strip
MOST = 4096  # points of a cloud that are drawn
_LABEL: dict[str, Any] = {
    "fontsize": 9,
    "color": GRAY,
    "rotation": 90,
    "ha": "right",
    "va": "center",
}


def strip(clip: Tensor) -> list[Tensor]:
    """Up to FRAMES frames (C, H, W) of a clip (C, T, H, W), the first and the last among them."""
    T = clip.shape[1]
    at = np.unique(np.linspace(0, T - 1, min(T, FRAMES)).round().astype(int))
    return [clip[:, t] for t in at.tolist()]


def plot_strips(
    rows: Sequence[Sequence[Tensor]], path: Path, row_labels: Sequence[str] = ()
) -> None:
    """Write `path` (PNG): the clips of rows[r], (C, T, H, W) each in [0, 1], side by side; every
    clip a strip of its frames.  C is 1 or 3.
    """
    cells = [[frame for clip in row for frame in strip(clip)] for row in rows]
    plot_sheet(cells, path, row_labels=row_labels)


def plot_panels(
    cells: Sequence[Sequence[Tensor]],
    path: Path,
    kind: str,
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
) -> None:
    """Write `path` (PNG): a panel for each of cells[row][column].

    kind: "signal", (C, W) as a line a channel, or "cloud", (N, 3) as points, colored by height.
    """
    rows, columns, flat = len(cells), max(map(len, cells)), kind == "signal"
    wide, tall = (2.4, 1.0) if flat else (1.5, 1.5)
    figure = new_figure(columns * wide + 0.6, rows * tall + 0.3)
    for r, row in enumerate(cells):
        for c, values in enumerate(row):
            place = (rows, columns, r * columns + c + 1)
            axes = figure.add_subplot(*place, projection=None if flat else "3d")
            (_lines if flat else _points)(axes, values.detach().float().cpu().numpy())
            axes.set_axis_off()
            if r == 0 and c < len(column_labels):
                axes.set_title(column_labels[c], fontsize=9, color=GRAY)
            if c == 0 and r < len(row_labels):
                write = axes.text if flat else axes.text2D  # type: ignore[attr-defined]
                write(-0.03, 0.5, row_labels[r], transform=axes.transAxes, **_LABEL)
    save(figure, path, transparent=True)


def _lines(axes: Axes, values: np.ndarray) -> None:
    axes.plot(np.nan_to_num(values).T, color=BLUE, linewidth=0.6)
    axes.margins(x=0)


def _points(axes: Any, values: np.ndarray) -> None:
    x, y, z = np.nan_to_num(values[:: -(-len(values) // MOST)]).T
    axes.scatter(x, y, z, c=z, s=1.5, cmap="viridis", depthshade=False)
    reach = max(float(np.abs([x, y, z]).max()), 1e-6)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), zlim=(-reach, reach))
    axes.set_box_aspect((1, 1, 1), zoom=1.3)
