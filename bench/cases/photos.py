"""Photographs to feed a data pipeline with: JPEG files on disk, the same as shards or as pixels.

Cut at random from scikit-learn's two sample photographs (640 x 427), some mirrored, and resized:
real edges, skies and textures, at the cost of a photo's decoding.  Made once a process, in a folder
of its own that goes when Python ends.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from random import Random

import torch
from torch import Tensor

NEEDS = ("sklearn", "PIL", "numpy")
_QUALITY = 92


def height(width: int) -> int:
    """Of a photo so wide: 4 : 3.

    >>> height(500)
    375
    """
    return round(width * 3 / 4)


@cache
def folder(count: int, width: int) -> Path:
    """A folder with `count` JPEG files of width x height(width) pixels, quality 92."""
    from PIL import Image

    sources = [Image.fromarray(x) for x in _samples()]
    out = Path(_room().name) / f"{count}-of-{width}"
    out.mkdir()
    for k in range(count):
        cut = _cut(sources[k % len(sources)], Random(k))
        photo = cut.resize((width, height(width)), Image.Resampling.BICUBIC)
        photo.save(out / f"{k:06}.jpg", quality=_QUALITY)
    return out


@cache
def shards(count: int, width: int) -> Path:
    """The same files as WebDataset shards, in a folder."""
    from fastssl.data.sources import pack
    from fastssl.data.sources.folder import scan_folder

    out = Path(_room().name) / f"{count}-of-{width}-packed"
    pack.pack(scan_folder(folder(count, width)), out, pack.PackOptions(check=False))
    return out


@cache
def pixels(count: int, width: int) -> Tensor:
    """The same photos decoded: (count, 3, height, width) uint8."""
    from fastssl.data.sources.decode import decode

    return torch.stack([decode(path, path.name) for path in files(count, width)])


def files(count: int, width: int) -> list[Path]:
    """The paths of the photos in `folder`, in order."""
    return sorted(folder(count, width).iterdir())


def nbytes(count: int, width: int) -> int:
    """What the files of `folder` hold together, bytes."""
    return sum(path.stat().st_size for path in files(count, width))


@cache
def _room() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fastssl-photos-")


@cache
def _samples() -> list:
    from sklearn.datasets import load_sample_images

    return load_sample_images().images


def _cut(photo, rng: Random):
    """0.6 to 1 of the largest part of a photo that is 4 : 3, anywhere in it, perhaps mirrored."""
    from PIL.Image import Transpose

    most = min(photo.width, photo.height * 4 // 3)
    wide = int(most * (0.6 + 0.4 * rng.random()))
    high = height(wide)
    left, top = (int(rng.random() * room) for room in (photo.width - wide, photo.height - high))
    cut = photo.crop((left, top, left + wide, top + high))
    return cut.transpose(Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else cut
