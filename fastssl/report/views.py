"""What the augmentation makes of the images: the method's true input."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from fastssl.report._figure import plot_sheet

PICTURED = ("image",)  # kinds of views that there are pictures of


def plot_views(views: Sequence[Tensor], path: Path, kind: str = "image") -> None:
    """Write `path` (PNG): one row per image, one column per view.

    views: V tensors (n, C, H, W) of floats in [0, 1] (not normalised), C 1 or 3; sizes may differ
    between views.  A batch's `views` limited to a few images is what is meant.
    Raises ValueError: no view, no image, views of different numbers of images.
    """
    counts = sorted({len(view) for view in views})
    if len(counts) != 1 or counts[0] == 0:
        raise ValueError(f"every view must hold the same images, at least one, got {counts}")
    rows = [[view[i] for view in views] for i in range(counts[0])]
    plot_sheet(rows, path, column_labels=[f"view {v + 1}" for v in range(len(views))])
