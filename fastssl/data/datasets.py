"""Sources of items, each split into train and test by a seed.

A source (source.py) is a sequence of items with names, and labels where it has them.  Its config
says which; `open_source` opens it:

    digits      scikit-learn's 1,797 handwritten digits, 8 x 8 grey: real data, no download
    fractals    generated, any size and count, ten thousand classes if need be (fractals.py)
    folder      image files: one folder a class, or flat (folder.py)
    clips       generated clips whose class is a motion (clips.py)
    signals     generated waveforms (signals.py)
    wavs        .wav files, in folders as images are (wavs.py)
    table       rows of a table that scikit-learn ships, or of a .csv file (tables.py)
    clouds      generated clouds of points on surfaces (clouds.py)
"""

import fcntl
import logging
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import AfterValidator, Field
from torch import Tensor

from .clips import ClipsSource
from .clouds import CloudsSource
from .errors import DataError
from .folder import scan_folder
from .fractals import fractal
from .seeds import SPLIT, mix
from .signals import SignalsSource
from .source import Source, SourceOptions, Split, absolute
from .tables import TableSource
from .wavs import WavsSource

log = logging.getLogger(__name__)


class DigitsSource(SourceOptions):
    """scikit-learn's handwritten digits."""

    name: Literal["digits"] = Field(default="digits", description="which source this is")

    def open(self) -> tuple[Source, ...]:
        return (_digits(),)


class FractalsSource(SourceOptions):
    """Generated images of iterated function systems."""

    name: Literal["fractals"] = Field(default="fractals", description="which source this is")
    classes: int = Field(default=10, ge=1, le=100_000, description="how many classes")
    per_class: int = Field(default=100, ge=1, le=100_000, description="images of each class")
    size: int = Field(default=64, ge=8, le=1024, description="height and width, pixels")
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="which fractals; the split has the run's seed"
    )
    cache: Path | None = Field(
        default=None,
        description="folder to keep them in as JPEG; without it they are drawn at each use",
    )

    def open(self) -> tuple[Source, ...]:
        if self.cache is None:
            return (FractalImages(self),)
        folder = cache_fractals(self, self.cache)
        (whole,) = scan_folder(folder)
        if len(whole) != self.classes * self.per_class:
            raise DataError(f"the fractals' cache {str(folder)!r} lost images: delete that folder")
        return (whole,)


class FolderSource(SourceOptions):
    """Image files below a folder."""

    name: Literal["folder"] = Field(default="folder", description="which source this is")
    path: Annotated[Path, AfterValidator(absolute)] = Field(
        description="class folders, or images alone; train/ and val/ (or test/) in it are the split"
    )
    flat: bool = Field(default=False, description="take every image below path, without labels")

    def open(self) -> tuple[Source, ...]:
        return tuple(scan_folder(self.path, flat=self.flat))


SourceConfig = Annotated[
    DigitsSource
    | FractalsSource
    | FolderSource
    | ClipsSource
    | SignalsSource
    | WavsSource
    | TableSource
    | CloudsSource,
    Field(discriminator="name"),
]


class ArrayImages:
    """Images held in memory, uint8 (N, C, H, W)."""

    def __init__(self, pixels: Tensor, labels: Tensor, classes: tuple[str, ...], names: list[str]):
        self.pixels, self.labels, self.classes, self._names = pixels, labels, classes, names
        self.channels = pixels.shape[1]

    def __len__(self) -> int:
        return len(self.pixels)

    def item(self, i: int) -> Tensor:
        return self.pixels[i]

    def name(self, i: int) -> str:
        return self._names[i]

    def select(self, indices: np.ndarray) -> "ArrayImages":
        at = torch.from_numpy(indices)
        names = [self._names[i] for i in indices.tolist()]
        return ArrayImages(self.pixels[at], self.labels[at], self.classes, names)


class FractalImages:
    """Fractals drawn when asked for: image i of class i // per_class."""

    channels = 3

    def __init__(self, cfg: FractalsSource, members: np.ndarray | None = None):
        self.cfg = cfg
        self._members = np.arange(cfg.classes * cfg.per_class) if members is None else members
        self.labels = torch.from_numpy(self._members // cfg.per_class)
        self.classes = tuple(_padded(k, cfg.classes) for k in range(cfg.classes))

    def __len__(self) -> int:
        return len(self._members)

    def item(self, i: int) -> Tensor:
        label, instance = divmod(int(self._members[i]), self.cfg.per_class)
        return fractal(self.cfg.seed, label, instance, self.cfg.size)

    def name(self, i: int) -> str:
        label, instance = divmod(int(self._members[i]), self.cfg.per_class)
        return f"{self.classes[label]}/{_padded(instance, self.cfg.per_class)}.jpg"

    def select(self, indices: np.ndarray) -> "FractalImages":
        return FractalImages(self.cfg, self._members[indices])


def _padded(k: int, count: int) -> str:
    return f"{k:0{len(str(count - 1))}d}"


def _digits() -> ArrayImages:
    from sklearn.datasets import load_digits  # a second to import, for this source alone

    found: Any = load_digits()
    pixels = torch.from_numpy((found.images * (255 / 16)).round().astype(np.uint8))[:, None]
    names = [f"digits/{i}" for i in range(len(pixels))]
    labels = torch.from_numpy(found.target.astype(np.int64))
    return ArrayImages(pixels, labels, tuple(str(d) for d in range(10)), names)


def cache_fractals(cfg: FractalsSource, cache: Path) -> Path:
    """The folder of `cfg`'s images, written once below `cache`: class folders of JPEG files.

    It is renamed when complete, so that a killed run leaves no half of it; of several processes
    one writes, behind a lock, and the others wait.
    Raises DataError when it cannot be written.
    """
    name = f"fractals-{cfg.classes}x{cfg.per_class}-{cfg.size}px-seed{cfg.seed}"
    target = cache.expanduser() / name
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target.parent / f".{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_dir():
                _draw_all(cfg, target)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"cannot write the fractals' cache {str(target)!r}: {reason}") from error
    return target


def _draw_all(cfg: FractalsSource, target: Path) -> None:
    """Every image of `cfg`, written aside and renamed; what a killed process left goes first."""
    log.info("writing %d fractals to %s", cfg.classes * cfg.per_class, target)
    aside = target.with_name(f".{target.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    images = FractalImages(cfg)
    try:
        for i in range(len(images)):
            path = aside / images.name(i)
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = images.item(i).permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(path, quality=95, subsampling=0)
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def split_indices(
    labels: Tensor | None, count: int, test_fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(train, test) indices, sorted: a part of each class, chosen by the hash of (seed, index).

    A class of two or more images is in both, whatever the fraction (unless it is 0).
    """
    order = np.argsort(mix(SPLIT, seed, np.arange(count)), kind="stable")
    groups = np.zeros(count, np.int64) if labels is None else labels.numpy()
    held_out = np.zeros(count, bool)
    by_class = order[np.argsort(groups[order], kind="stable")]
    for members in np.split(by_class, np.cumsum(np.bincount(groups))[:-1]):
        if len(members) > 1 and test_fraction > 0:
            take = min(max(round(test_fraction * len(members)), 1), len(members) - 1)
            held_out[members[:take]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def open_source(cfg: SourceConfig, seed: int) -> Split:
    """The train and test parts of a source, fixed by `seed` and stratified by class.

    A folder with its own train/ and val/ keeps them.  A source with `fitted(train)` (a table, which
    is standardised by its training rows) is given the training part's indices.
    Raises DataError, saying what to do, for data that cannot be used.
    """
    found = cfg.open()
    if len(found) == 2:
        return Split(*found)
    (whole,) = found
    train, test = split_indices(whole.labels, len(whole), cfg.test_fraction, seed)
    fitted = getattr(whole, "fitted", None)
    whole = whole if fitted is None else fitted(train)
    return Split(whole.select(train), whole.select(test))
