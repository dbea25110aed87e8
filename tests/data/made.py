"""Files of each format, made for the tests."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def encoded(k: int = 0, kind: str = "PNG", size: tuple[int, int] = (6, 5), **options) -> bytes:
    """A flat image whose red is k."""
    file = io.BytesIO()
    Image.new("RGB", size, (k, 0, 0)).save(file, kind, **options)
    return file.getvalue()


def noise(kind: str, side: int = 16, **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def tar(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def shard(path: Path, first: int, count: int, labels: bool = True) -> Path:
    """Samples first, ..., of key 000k: a PNG whose red is k, and the label k % 3."""
    members = []
    for k in range(first, first + count):
        members.append((f"{k:04d}.png", encoded(k)))
        if labels:
            members.append((f"{k:04d}.cls", str(k % 3).encode()))
    return tar(path, members)


def reds(source) -> list[int]:
    return [int(source.item(i)[0, 0, 0]) for i in range(len(source))]


def names(source) -> list[str]:
    return [source.name(i) for i in range(len(source))]
