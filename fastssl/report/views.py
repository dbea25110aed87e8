"""What the augmentation makes of the data: the method's true input."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from fastssl.report._panels import plot_panels, plot_strips
from fastssl.report.figure import plot_sheet

# Kinds of views that there are pictures of.
PICTURED = ("image", "clip", "volume", "signal", "cloud")


def plot_views(views: Sequence[Tensor], path: Path, kind: str = "image") -> None:
    """Write `path` (PNG): one row per item, one column per view.

    views: V tensors, not normalized; sizes may differ between views.  A batch's `views` limited to
    a few items is what is meant.  By kind:
    "image"   (n, C, H, W) in [0, 1], C 1 or 3
    "clip"    (n, C, T, H, W) in [0, 1]: a strip of frames each
    "volume"  (n, C, D, H, W) in [0, 1]: a strip of slices each
    "signal"  (n, C, W): a line a channel
    "cloud"   (n, N, 3): points in space
    Raises ValueError: no view, no item, views of different numbers of items, another kind.
    """
    counts = sorted({len(view) for view in views})
    if len(counts) != 1 or counts[0] == 0:
        raise ValueError(f"every view must hold the same images, at least one, got {counts}")
    if kind not in PICTURED:
        raise ValueError(f"kind must be one of {PICTURED}, got {kind!r}")
    rows = [[view[i] for view in views] for i in range(counts[0])]
    labels = [f"view {v + 1}" for v in range(len(views))]
    if kind == "image":
        plot_sheet(rows, path, column_labels=labels)
    elif kind in ("clip", "volume"):
        plot_strips(rows, path)
    else:
        plot_panels(rows, path, kind, column_labels=labels)
