"""Sources of items, each split into train and test by a seed.

A source (source.py) is a sequence of items with names, and labels where it has them.  Its config
says which; `open_source` opens it:

    digits      scikit-learn's 1,797 handwritten digits, 8 x 8 gray: real data, no download
    fractals    generated, any size and count, ten thousand classes if need be (sources/fractals.py)
    folder      image files: one folder a class, or flat (sources/folder.py)
    clips       generated clips whose class is a motion (clips.py)
    signals     generated waveforms (signals.py)
    webdataset  tar shards, local or remote (sources/webdataset.py)
    tfrecord    TFRecord files of tf.train.Example, local or remote (sources/tfrecord.py)
    lmdb        an LMDB database, one image a key (sources/lmdbs.py)
    hf_datasets a data set of Hugging Face's `datasets`, on the local disk (sources/hf_datasets.py)
    arrays      a .npy or .npz file of images (sources/arrays.py)
    frames      clips as folders of frames (sources/frames.py)
    wavs        .wav files, in folders as images are (sources/wavs.py)
    table       rows of a table that scikit-learn ships, or of a .csv file (tables.py)
    clouds      generated clouds of points on surfaces (clouds.py)
    volumes     generated volumes of solids (volumes.py)
    npy         .npy files of volumes, in folders as images are (sources/npy.py)
    paired      folders of files, one a stream, matched by name (sources/paired.py)
    paths       a .csv file with a column of files for each stream (sources/paths.py)
    reliefs     generated surfaces: an image and its depth (synthetic/reliefs.py)
    given       a torch Dataset, from Python (sources/given.py)
"""

import hashlib
from collections.abc import Iterable
from typing import Annotated, Any

import numpy as np
from torch import Tensor

from fastssl.data.sources.arrays import ArrayImages as ArrayImages
from fastssl.data.sources.arrays import ArraysSource
from fastssl.data.sources.base import Source, SourceOptions, Split
from fastssl.data.sources.digits import DigitsSource
from fastssl.data.sources.folder import FolderSource
from fastssl.data.sources.frames import FramesSource
from fastssl.data.sources.given import GivenSource
from fastssl.data.sources.hf_datasets import HFDatasetsSource
from fastssl.data.sources.lmdbs import LmdbSource
from fastssl.data.sources.npy import NpySource
from fastssl.data.sources.paired import PairedSource
from fastssl.data.sources.paths import PathsSource
from fastssl.data.sources.tables import TableSource
from fastssl.data.sources.tfrecord import TFRecordSource
from fastssl.data.sources.wavs import WavsSource
from fastssl.data.sources.webdataset import WebDatasetSource
from fastssl.data.streams import chosen, each_part
from fastssl.data.synthetic.clips import ClipsSource
from fastssl.data.synthetic.clouds import CloudsSource
from fastssl.data.synthetic.fractals import FractalsSource
from fastssl.data.synthetic.reliefs import ReliefsSource
from fastssl.data.synthetic.signals import SignalsSource
from fastssl.data.synthetic.volumes import VolumesSource
from fastssl.random import SPLIT, mix
from fastssl.registry import OneOf, Registry

SOURCES: Registry[type[SourceOptions]] = Registry("source", "data.source.name")


def register_source(source: type[SourceOptions]) -> type[SourceOptions]:
    """A class decorator: a `SourceOptions`, which opens itself, that data.source.name asks for.

    Raises PluginError where there is a source of that name.
    """
    SOURCES.add(source.model_fields["name"].default, source, source)
    return source


for _source in (
    DigitsSource,
    FractalsSource,
    FolderSource,
    WebDatasetSource,
    TFRecordSource,
    LmdbSource,
    HFDatasetsSource,
    ArraysSource,
    FramesSource,
    ClipsSource,
    SignalsSource,
    WavsSource,
    TableSource,
    CloudsSource,
    VolumesSource,
    NpySource,
    PairedSource,
    PathsSource,
    ReliefsSource,
    GivenSource,
):
    register_source(_source)
SourceConfig = Annotated[SourceOptions, OneOf(SOURCES)]


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


def open_source(cfg: SourceConfig, seed: int, streams: Iterable[str] = ()) -> Split:
    """The train and test parts of a source, fixed by `seed` and stratified by class.

    streams: of a source with several those to read, in that order; of one alone items are plain.

    A folder with its own train/ and val/ keeps them.  A source with `fitted(train)` (a table, which
    is standardized by its training rows) is given the training part's indices.
    Raises DataError, saying what to do, for data that cannot be used.
    """
    names = tuple(streams)
    return each_part(divided(cfg.open(), cfg, seed), lambda part: chosen(part, names))


def divided(found: tuple[Source, ...], cfg: SourceConfig, seed: int) -> Split:
    """The train and test parts of what a source has opened, which may have come apart already."""
    if len(found) == 2:
        return Split(*found)
    (whole,) = found
    train, test = split_indices(whole.labels, len(whole), cfg.test_fraction, seed)
    fitted = getattr(whole, "fitted", None)
    whole = whole if fitted is None else fitted(train)
    return Split(whole.select(train), whole.select(test))


def fingerprint(split: Split) -> dict[str, Any]:
    """What tells these data from others, wherever they lie, at little cost.

    The counts of both parts, and a hash of their labels, the classes' names and a thousand items'
    names, from the root of the data on; not of the items themselves.
    """
    told = hashlib.sha256(repr(split.train.classes).encode("utf-8", "surrogateescape"))
    for part in split:
        if part.labels is not None:
            told.update(part.labels.numpy().tobytes())
        places = np.linspace(0, len(part) - 1, min(len(part), 1000), dtype=np.int64)
        for i in places:
            told.update(part.name(int(i)).encode("utf-8", "surrogateescape") + b"\0")
    return {"train": len(split.train), "test": len(split.test), "names": told.hexdigest()[:16]}
