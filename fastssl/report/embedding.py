"""A map of the features: each sample a point, near when the encoder finds them alike."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from torch import Tensor

from fastssl.report.figure import INK, MUTED, new_figure, plain, save

# Paul Tol's muted scheme, its pale colors darkened until thin signs can be read on white.
_COLORS = [
    *("#332288", "#3399cc", "#2a9d8f", "#117733", "#8a8a1f"),
    *("#c98a00", "#cc5566", "#882255", "#aa4499", "#444444"),
]
_MARKERS = "os^DvPX<>*"
_TSNE_LIMIT = 3000  # more samples: PCA alone, in a second instead of minutes


def plot_embedding(
    features: Tensor, labels: Tensor | None, class_names: Sequence[str], path: Path, title: str
) -> None:
    """Write `path` (PNG): features (N, D), any float, on a plane; labels (N,) int64 or None.

    Directions only (rows are L2-normalized): PCA to 50 dimensions, then t-SNE with a fixed seed;
    beyond 3000 samples the first two principal components.  Label c is called class_names[c].
    Every class has its own color and its own sign, its name when that is one or two characters.
    Raises ValueError: fewer than 3 samples, non-finite features, labels that do not fit.
    """
    if features.ndim != 2 or len(features) < 3:
        raise ValueError(f"features must be (N, D) with N >= 3, got {tuple(features.shape)}")
    x = features.detach().double().cpu().numpy()
    if not np.isfinite(x).all():
        raise ValueError(f"features has {np.sum(~np.isfinite(x))} non-finite values")
    y = np.zeros(len(x), dtype=int) if labels is None else labels.cpu().numpy()
    if y.shape != (len(x),) or y.min() < 0:
        raise ValueError(f"labels must be {len(x)} numbers from 0 up, got shape {y.shape}")
    known = dict(enumerate(class_names))
    names = {c: _plain(str(known.get(c, c))) for c in np.unique(y).tolist()}
    points, method = _to_plane(x)
    figure = new_figure(5.2, 5.2)
    axes = figure.add_subplot()
    if labels is None:
        axes.scatter(*points.T, s=9, color=_COLORS[0], alpha=0.6, linewidths=0)
    else:
        _draw_classes(axes, points, y, names)
    axes.set_title(_plain(title), loc="left", pad=18, fontsize=11, fontweight="bold", color=INK)
    note = f"{method}, {len(x)} samples"
    axes.text(0, 1.015, note, transform=axes.transAxes, fontsize=8.5, color=MUTED)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_aspect("equal", adjustable="datalim")
    save(figure, path)


def _plain(text: str) -> str:
    """`text` as matplotlib shows it literally: no mathematics, not hidden from the legend."""
    return (" " if text.startswith("_") else "") + plain(text)


def _to_plane(x: np.ndarray) -> tuple[np.ndarray, str]:
    """Coordinates (N, 2) of features (N, D), and the name of what made them."""
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    x = np.pad(x, ((0, 0), (0, max(0, 2 - x.shape[1]))))
    if not np.ptp(x, axis=0).any():  # collapsed features: one point, and no variance to divide by
        return np.zeros((len(x), 2)), "PCA"
    from sklearn.decomposition import PCA  # a second to import, for this picture alone
    from sklearn.manifold import TSNE

    flat = PCA(min(50, *x.shape), random_state=0).fit_transform(x)
    if len(x) > _TSNE_LIMIT or len(x) < 10:
        return flat[:, :2], "PCA"
    perplexity = min(30.0, (len(x) - 1) / 3)
    tsne = TSNE(2, perplexity=perplexity, init="pca", random_state=0)
    return tsne.fit_transform(flat), "t-SNE"


def _draw_classes(axes: Axes, points: np.ndarray, y: np.ndarray, names: dict[int, str]) -> None:
    size = 22 if len(points) <= 1000 else 9
    short = all(len(name) <= 2 and name.isascii() and name.isalnum() for name in names.values())
    halo = [withStroke(linewidth=3, foreground="white")]
    for place, (label, name) in enumerate(names.items()):
        color = _COLORS[place % 10]
        # Beyond ten classes the colors repeat with another sign, so that pairs stay unique.
        marker = rf"$\mathsf{{{name}}}$" if short else _MARKERS[(place + place // 10) % 10]
        mine = points[y == label]
        axes.scatter(
            *mine.T,
            s=size * 1.6 if short else size,
            color=color,
            marker=marker,  # pyright: ignore[reportArgumentType]
            linewidths=0.2 if short else 0,
            alpha=0.85,
            label=name,
        )
        if not short and len(names) <= 20:
            top = (
                float(np.median(mine[:, 0])),
                float(np.quantile(mine[:, 1], 0.95)),
            )  # above, not upon, its class
            style = {"fontsize": 9, "color": INK, "ha": "center", "va": "bottom"}
            axes.annotate(name, top, (0, 4), textcoords="offset points", path_effects=halo, **style)
    if not short and len(names) <= 20:
        axes.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, 0.0),
            ncols=min(5, len(names)),
            fontsize=8,
            frameon=False,
            labelcolor=MUTED,
            handletextpad=0.1,
            columnspacing=1.0,
        )
