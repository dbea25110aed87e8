"""What a masked autoencoder saw and what it made of it."""

from pathlib import Path

from torch import Tensor

from fastssl.report._figure import plot_sheet


def plot_reconstructions(
    images: Tensor, masked: Tensor, reconstructions: Tensor, path: Path, kind: str = "image"
) -> None:
    """Write `path` (PNG): one column per image; original, masked input, reconstruction below.

    All three: (n, C, H, W) floats in [0, 1], C 1 or 3; values outside are clipped.
    Raises ValueError: shapes that disagree, no image, another number of channels.
    """
    shapes = [tuple(t.shape) for t in (images, masked, reconstructions)]
    if images.ndim != 4 or len(images) == 0 or len(set(shapes)) != 1:
        raise ValueError(f"want three tensors of one shape (n, C, H, W), n > 0, got {shapes}")
    rows = [list(images), list(masked), list(reconstructions)]
    plot_sheet(rows, path, row_labels=["original", "masked", "reconstruction"])
