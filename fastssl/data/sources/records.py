"""Encoded images that are stretches of large files, and how such a source is put together.

The labels of a file's samples are kept beside it, in FILE.labels: finding them means a read for
each sample.  Its first line is `labels 1 <samples> <bytes of the file>`, then there is a line for
each sample: a whole number, a text as JSON writes it, or `-` where there is none.
"""

import gc
import json
import logging
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastssl.data.errors import BadItem, DataError
from fastssl.data.sources.decode import EncodedItems
from fastssl.data.sources.files import Files, read_all, status, write_beside
from fastssl.data.sources.names import Names
from fastssl.data.sources.remote import Status

log = logging.getLogger(__name__)

Label = int | str | None
Payload = Callable[[bytes, str], bytes]
MOST_CLASSES = 2**20
FLAWS = ("", "it has no label, as others do: set labels=false to use it without")
SUFFIX = ".labels"


# Where an item is: number of the file, offset and size in bytes, and what is wrong, of FLAWS.
PLACE = np.dtype([("file", "i4"), ("offset", "i8"), ("size", "i8"), ("flaw", "i1")])


@dataclass(eq=False)
class Records(EncodedItems):
    """Images at places of large files, read when asked for.  `labels` is None where there are none.

    payload(record, name) is the encoded image in a record, which raises BadItem; None: all of it.
    """

    files: Files
    places: np.ndarray  # (N,) PLACE
    names: Names
    labels: Tensor | None = None
    classes: tuple[str, ...] | None = None
    payload: Payload | None = None
    per_item = ("places", "names", "labels")

    def name(self, i: int) -> str:
        """The file's name and that of the sample in it."""
        return f"{self.files.name(int(self.places['file'][i]))}/{self.names[i]}"

    def encoded(self, i: int) -> bytes:
        """The bytes of image i as stored.  Raises BadItem."""
        name, (file, offset, size, flaw) = self.name(i), self.places[i].tolist()
        record = self.files.record(file, offset, size, name)
        image = record if self.payload is None else self.payload(record, name)
        if flaw:
            raise BadItem(name, FLAWS[flaw])
        return image


class Found(NamedTuple):
    """A sample that a file is found to hold."""

    name: str
    offset: int
    size: int
    label: Label


class Part:
    """The samples of a source's files, collected one by one."""

    def __init__(self, files: Files, payload: Payload | None = None):
        self.files, self.payload = files, payload
        self.file, self.offset, self.size = array("i"), array("q"), array("q")
        self.label = array("q")  # -1: none; -2 - k: text k
        self.texts: dict[str, int] = {}
        self.names = Names([])

    def add_all(self, found: Iterable[tuple[int, Found]]) -> None:
        """The (file, sample) pairs of all files."""
        collecting = gc.isenabled()
        gc.disable()  # an index makes millions of tuples, none in a circle: half of the time
        try:
            self.names = Names(self._noted(found))
        finally:
            if collecting:
                gc.enable()

    def _noted(self, found: Iterable[tuple[int, Found]]) -> Iterator[str]:
        for file, sample in found:
            self.file.append(file)
            self.offset.append(sample.offset)
            self.size.append(sample.size)
            self.label.append(self._code(sample.label))
            yield sample.name

    def _code(self, label: Label) -> int:
        if isinstance(label, str):
            return -2 - self.texts.setdefault(label, len(self.texts))
        return label if label is not None and 0 <= label < 2**62 else -1

    def built(self, labels: np.ndarray | None, classes: tuple[str, ...] | None) -> Records:
        """labels (N,) int64, -1 where there is none: such a sample is a bad item."""
        places = np.zeros(len(self.file), PLACE)
        places["file"], places["offset"], places["size"] = self.file, self.offset, self.size
        if labels is not None:
            places["flaw"] = labels < 0
        made = None if labels is None else torch.from_numpy(labels.clip(0))
        return Records(self.files, places, self.names, made, classes, self.payload)


def _coded(parts: list[Part]) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """Labels as numbers of the classes that they name: all texts, if any is one."""
    codes = [np.array(part.label, np.int64) for part in parts]
    if not any(part.texts for part in parts):
        last = max(int(code.max(initial=-1)) for code in codes)
        if last >= MOST_CLASSES:
            raise DataError(
                f"label {last} is above {MOST_CLASSES - 1}, and no class's number: mend the labels,"
                " or set labels=false to use none"
            )
        return codes, tuple(map(str, range(last + 1)))
    numbers = {str(k) for code in codes for k in np.unique(code[code >= 0]).tolist()}
    classes = tuple(sorted(numbers.union(*(part.texts for part in parts))))
    place = {name: k for k, name in enumerate(classes)}
    made = []
    for part, code in zip(parts, codes, strict=True):
        new = {-2 - k: place[text] for text, k in part.texts.items()} | {-1: -1}
        new |= {k: place[str(k)] for k in np.unique(code[code >= 0]).tolist()}
        values, inverse = np.unique(code, return_inverse=True)
        made.append(np.array([new[v] for v in values.tolist()], np.int64)[inverse])
    return made, classes


def build(parts: list[Part], classes: tuple[str, ...] | None = None) -> tuple[Records, ...]:
    """The sources of all parts, which share their classes.

    classes: names for the numbers that labels are; else names are the labels themselves.
    Where no sample has a label there are none; where some have, the others are bad items.
    Raises DataError for numbers that can be no classes'.
    """
    codes, found = _coded(parts)
    if all((code < 0).all() for code in codes):
        return tuple(part.built(None, None) for part in parts)
    if classes is not None and len(classes) >= len(found):
        found = classes
    lost = sum(int((code < 0).sum()) for code in codes)
    if lost:
        log.warning("%d samples have no label, as others do: they are counted as unreadable", lost)
    return tuple(part.built(code, found) for part, code in zip(parts, codes, strict=True))


def status_or_none(path: str) -> Status | None:
    try:
        return status(path)
    except OSError:
        return None


def labels_text(labels: list[Label], size: int) -> bytes:
    """What FILE.labels holds for a file of `size` bytes."""
    lines = [f"labels 1 {len(labels)} {size}"]
    lines += ["-" if label is None else json.dumps(label) for label in labels]
    return "\n".join(lines).encode() + b"\n"


def _is_labels(head: bytes) -> bool:
    return head.startswith(b"labels ")


def _parsed(line: str) -> Label:
    if line.isdigit():
        return int(line)
    return None if line == "-" else json.loads(line)


def read_labels(path: str, count: int, told: Status) -> list[Label] | None:
    """The labels kept beside a file, or None where they are missing, older, or do not fit."""
    beside = status_or_none(path + SUFFIX)
    if beside is None or (beside.modified or 0) < (told.modified or 0):
        return None
    try:
        head, *lines = read_all(path + SUFFIX).decode().split("\n")
        if head.split() != ["labels", "1", str(count), str(told.size)] or len(lines) <= count:
            return None
        labels = [_parsed(line) for line in lines[:count]]
    except (OSError, ValueError):
        return None
    sound = all(label is None or type(label) in (int, str) for label in labels)
    return labels if sound else None


def kept_labels(
    path: str, count: int, told: Status, find: Callable[[], list[Label]]
) -> list[Label]:
    """The labels kept beside a file; else those that `find` finds, which are left there."""
    labels = read_labels(path, count, told)
    if labels is None:
        labels = find()
        if any(label is not None for label in labels):
            write_beside(path + SUFFIX, labels_text(labels, told.size), _is_labels)
    return labels


def checked(files: Files, k: int, what: str) -> tuple[Status, bytes]:
    """The status and the first bytes of a file of the data.

    Raises DataError where it is not there, or may not be read.
    """
    try:
        return status(files.paths[k]), files.read(k, 0, 64)
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
        reason = error.strerror or "No such file"
        raise DataError(
            f"{what} {files.paths[k]!r} cannot be read ({reason}): mend the path, or the file"
        ) from error
