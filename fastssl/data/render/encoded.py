"""Batches on their way to DALI: bytes of files, and what each view of them was drawn with.

A worker reads files and draws the views' parameters.  A plain JPEG file is passed on undecoded;
every other image is decoded here by sources/decode.py and passed on as a PPM file.  So the two back
ends read the same images, refuse the same ones, and draw the same views of them.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastssl.data.render.jpeg import plain_jpeg_size
from fastssl.data.render.torchvision import Drawn
from fastssl.data.sources.base import Source
from fastssl.data.sources.decode import decode_bytes
from fastssl.data.views.image import View

# The columns of `drawn_columns`: pixels of the decoded part of the image, degrees, factors.
COLUMNS = (
    *("top", "left", "height", "width", "flip"),
    *("xx", "xy", "x", "yx", "yy", "y"),  # of all that moves: from output to input, pixels
    *("hue", "saturation", "brightness", "contrast"),
    *("sigma", "solarize"),  # output pixels; the least value, of 0 to 255, that is inverted
    *("erase_top", "erase_left", "erase_height", "erase_width"),  # output pixels
)
COLUMN = {name: i for i, name in enumerate(COLUMNS)}
# Of a host batch: by stream ("" where there are none) an `Encoded` batch, and how it was read.
ON_THE_WAY = ("encoded", "items", "careful")
_NEVER = 256.0


class Encoded(NamedTuple):
    """An image as DALI reads it: bytes of a file, and the size that they decode to."""

    data: np.ndarray  # (n,) uint8
    height: int
    width: int


def encoded_item(source: Source, i: int, *, careful: bool = False) -> Encoded:
    """Image i of a source, as a plain JPEG file where it is one in color and else as PPM.

    careful: as PPM in any case.  Raises BadItem.
    """
    read = getattr(source, "encoded", None)
    if read is None or source.channels != 3:
        return ppm(source.item(i))
    data = read(i)
    size = None if careful else plain_jpeg_size(data)
    if size is None:  # nor is an image too large, which decode_bytes refuses
        return ppm(decode_bytes(data, source.name(i)))
    return Encoded(np.frombuffer(data, np.uint8), *size)


def ppm(image: Tensor) -> Encoded:
    """An image (3, H, W) or (1, H, W) uint8 behind the header of a portable pixmap."""
    channels, height, width = image.shape
    pixels = image.expand(3, -1, -1).permute(1, 2, 0).reshape(-1).numpy()
    header = f"P6 {width} {height} 255\n".encode()
    return Encoded(np.concatenate([np.frombuffer(header, np.uint8), pixels]), height, width)


def union(drawn: Sequence[Drawn]) -> tuple[int, int, int, int]:
    """Top, left, height, width of the part of an image that its views lie in."""
    top, left = min(p.top for p in drawn), min(p.left for p in drawn)
    bottom = max(p.top + p.height for p in drawn)
    right = max(p.left + p.width for p in drawn)
    return top, left, bottom - top, right - left


def drawn_columns(view: View, p: Drawn, top: int, left: int) -> list[float]:
    """One number for each of COLUMNS; top, left: where the decoded part begins."""
    change = dict(p.jitter)
    return [
        *(p.top - top, p.left - left, p.height, p.width, float(p.flip)),
        *_from_output(view.size, p),
        360 * change.get("hue", 0.0),
        0.0 if p.grayscale else change.get("saturation", 1.0),
        *(change.get("brightness", 1.0), change.get("contrast", 1.0)),
        *(p.sigma, 255 * view.solarize_threshold if p.solarize else _NEVER),
        *p.erase,
    ]


def _from_output(size: int, p: Drawn) -> tuple[float, ...]:
    """The 2 x 3 matrix, row by row, from a point of the output to where the crop has it.

    Flips, quarter turns, angle and shift, about the middle, x to the right and y down.
    """
    c, s = math.cos(math.radians(p.angle)), math.sin(math.radians(p.angle))
    quarter = ((1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0))[p.turn]
    h, v = 1 - 2 * p.flip, 1 - 2 * p.flip_vertical
    flipped = (h * quarter[0], v * quarter[1], h * quarter[2], v * quarter[3])
    # forward: (a b; d e), orthogonal, so that its transpose leads back
    a, b = c * flipped[0] - s * flipped[2], c * flipped[1] - s * flipped[3]
    d, e = s * flipped[0] + c * flipped[2], s * flipped[1] + c * flipped[3]
    middle = size / 2
    x, y = middle + p.shift[0], middle + p.shift[1]
    return a, d, middle - a * x - d * y, b, e, middle - b * x - e * y


def packed(items: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    """All bytes one after another (n,) uint8, and where each item ends (B,) int64.

    One tensor crosses from a worker by one file handle, not by one an image.
    """
    ends = np.cumsum([len(item.data) for item in items])
    return torch.from_numpy(np.concatenate([item.data for item in items])), torch.from_numpy(ends)


def unpacked(data: Tensor, ends: Tensor) -> list[np.ndarray]:
    """The items' bytes, each (n,) uint8: views of `data`."""
    return np.split(data.numpy(), ends[:-1].numpy())
