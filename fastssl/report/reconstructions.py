"""What a masked autoencoder saw and what it made of it."""

from pathlib import Path

from torch import Tensor

from fastssl.report._panels import plot_panels, plot_strips
from fastssl.report.figure import plot_sheet

LABELS = ["original", "masked", "reconstruction"]
_CLIPS, _COLUMNS = 3, 6  # shown of clips, and of signals and clouds


def plot_reconstructions(
    images: Tensor, masked: Tensor, reconstructions: Tensor, path: Path, kind: str = "image"
) -> None:
    """Write `path` (PNG): one column per item; original, masked input, reconstruction below.

    All three by kind, as `plot_views` takes them: of images (n, C, H, W) floats in [0, 1], C 1 or
    3; values outside are clipped.  A clip has three rows of its own, with a column a frame, a
    volume a slice; the three clouds may have different numbers of points.
    Raises ValueError: shapes that disagree, no item, another number of channels.
    """
    three = (images, masked, reconstructions)
    shapes = [tuple(t.shape) for t in three]
    ndim = {"image": 4, "clip": 5, "volume": 5}.get(kind, 3)
    alike = [(s[0], s[2:]) if kind == "cloud" else s for s in shapes]
    if images.ndim != ndim or len(images) == 0 or len(set(alike)) != 1:
        raise ValueError(f"want three tensors of one shape (n, C, H, W), n > 0, got {shapes}")
    if kind == "image":
        plot_sheet([list(t) for t in three], path, row_labels=LABELS)
    elif kind in ("clip", "volume"):
        shown = range(min(_CLIPS, len(images)))
        labels = ["original", "masked", "predicted"] * len(shown)
        plot_strips([[t[i]] for i in shown for t in three], path, labels)
    else:
        plot_panels([list(t[:_COLUMNS]) for t in three], path, kind, row_labels=LABELS)
