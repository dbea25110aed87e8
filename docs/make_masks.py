"""A contact sheet of every mask generator: which places it hides, seed by seed.

python docs/make_masks.py docs/masks.png
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastssl import masking as m
from fastssl.report.figure import BLUE, ORANGE, RULE, plot_sheet

_GRID, _CLIP, _PIXELS = (14, 14), (8, 14, 14), 6
_HIDDEN, _SHOWN, _ASKED = 0, 1, 2  # what a place is: an index into the colors
_COLORS = (RULE, BLUE, ORANGE)


def _shown(masking: m.Masking) -> Tensor:
    return (masking.restore < masking.visible.shape[1]).long()


def _weights(seeds: Tensor) -> Tensor:
    """A bright disc in the middle, as a saliency map might be."""
    rows, columns = torch.meshgrid(*[torch.linspace(-1, 1, 14)] * 2, indexing="ij")
    return (-6 * (rows**2 + columns**2)).exp().flatten().expand(len(seeds), -1)


def _multi_block(seeds: Tensor) -> Tensor:
    made = m.multi_block_masking(seeds, _GRID, context=60, target=34)
    places = torch.full((len(seeds), 196), _HIDDEN)
    places.scatter_(1, made.targets.flatten(1), _ASKED)
    return places.scatter_(1, made.context, _SHOWN)


def _dual(seeds: Tensor) -> Tensor:
    made = m.dual_masking(seeds, _CLIP, 20, 704)
    return _shown(made.masking).scatter_(1, made.decoded, _ASKED)


_ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "random, 75 %": lambda s: _shown(m.random_masking(s, 196, 49)),
    "block, 40 %": lambda s: _shown(m.block_masking(s, _GRID, 118)),
    "connected, 50 %": lambda s: _shown(m.connected_masking(s, _GRID, 98)),
    "context, targets": _multi_block,
    "units, 60 %": lambda s: _shown(m.unit_masking(s, _GRID, 2, 20)),
    "grid": lambda s: _shown(m.grid_masking(s, _GRID, 2)),
    "weighted": lambda s: _shown(m.weighted_masking(s, _weights(s), 49)),
    "noise, low": lambda s: _shown(m.noise_masking(s, _GRID, 49, "low")),
    "noise, band": lambda s: _shown(m.noise_masking(s, _GRID, 49, "band")),
    "noise, high": lambda s: _shown(m.noise_masking(s, _GRID, 49, "high")),
    "noise, stop": lambda s: _shown(m.noise_masking(s, _GRID, 49, "stop")),
    "time, frequency": lambda s: _shown(m.time_frequency_masking(s, _GRID, 4, 3)),
    "spans of 4": lambda s: _shown(m.span_masking(s, 196, 98, 4)),
}
_FRAMES: dict[str, Callable[[Tensor], Tensor]] = {
    "tube, 8 frames": lambda s: _shown(m.tube_masking(s, _CLIP, 20)),
    "dual, 8 frames": _dual,
}


def plot_masks(path: Path, first_seed: int = 0) -> None:
    """Write `path` (PNG): one row a generator, eight seeds of 14 x 14 places, clips at the bottom.

    Blue is what an encoder sees, orange what it is asked for (all that is hidden where nothing is
    orange).  The last rows are the eight frames of one clip.
    """
    seeds = torch.arange(first_seed, first_seed + 8)
    rows = [make(seeds).view(8, *_GRID) for make in _ROWS.values()]
    rows += [make(seeds[:1]).view(*_CLIP) for make in _FRAMES.values()]
    cells = [[_picture(places) for places in row] for row in rows]
    plot_sheet(cells, path, row_labels=[*_ROWS, *_FRAMES])


def _picture(places: Tensor) -> Tensor:
    """(H, W) indices of colors as an image (3, H * 6, W * 6) in [0, 1]."""
    table = [[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in _COLORS]
    pixels = torch.tensor(table)[places].permute(2, 0, 1)
    return pixels.repeat_interleave(_PIXELS, 1).repeat_interleave(_PIXELS, 2)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("give the picture to write: python docs/make_masks.py OUT.png")
    plot_masks(Path(sys.argv[1]))
