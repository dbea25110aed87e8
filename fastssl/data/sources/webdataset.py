"""WebDataset shards: tar files whose members of one key are a sample, read at random.

A sample's image is its first member with an image's extension (`seg.png` after `jpg`, whatever the
order), its label the whole number in its `cls` or the "label" in its `json`.  An index of each
shard (tars.py) is read from beside it, or made and left there: any order costs one read an image.
"""

import json
import logging
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from fastssl.data.errors import BadItem, DataError
from fastssl.data.sources import tars
from fastssl.data.sources.base import Source, SourceOptions
from fastssl.data.sources.decode import SUFFIXES
from fastssl.data.sources.files import (
    Files,
    absolute_pattern,
    expand,
    is_folder,
    read_all,
    write_beside,
)
from fastssl.data.sources.records import (
    Found,
    Label,
    Part,
    build,
    checked,
    kept_labels,
    status_or_none,
)
from fastssl.data.sources.remote import Status
from fastssl.data.sources.tars import Component, Sample

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
TESTS = ("val", "test", "valid", "validation")
_EXTENSIONS = frozenset(suffix[1:] for suffix in SUFFIXES)
_LONGEST_LABEL = 2**24


def _image(sample: Sample) -> Component | None:
    """The image among a sample's members; one of a plain extension before one such as seg.png."""
    second = None
    for part in sample:
        plain, _, last = part.extension.rpartition(".")
        if last.lower() in _EXTENSIONS:
            if not plain:
                return part
            second = second or part
    return second


def parse_label(extension: str, data: bytes) -> Label:
    """The label in a member called .cls or .json; None where there is none to be read."""
    try:
        if extension == "cls":
            return int(data)
        label = json.loads(data)["label"]
        return label if isinstance(label, str) or type(label) is int else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _label(files: Files, k: int, sample: Sample) -> Label:
    for part in sample:
        extension = part.extension.lower()
        if extension in ("cls", "json") and 0 <= part.size <= _LONGEST_LABEL:
            try:
                return parse_label(extension, files.record(k, part.offset, part.size, ""))
            except BadItem:
                return None
    return None


def _scanned(files: Files, k: int, told: Status) -> list[Sample]:
    """The samples of shard k by its headers, with an index left beside it if it is whole."""
    found = list(tars.samples(tars.members(files, k, told.size)))
    cut = [
        part.name for sample in found[-1:] for part in sample if part.offset + part.size > told.size
    ]
    if cut:
        log.warning("%s is cut off in its member %s", files.paths[k], cut[0])
    elif found:
        write_beside(tars.index_path(files.paths[k]), tars.index_text(found))
    return found


def _shard(files: Files, k: int, labelled: bool) -> Iterator[tuple[int, Found]]:
    path = files.paths[k]
    told, _ = checked(files, k, "shard")
    found = tars.read_index(files, k, told, status_or_none(tars.index_path(path)))
    if found is None:
        found = _scanned(files, k, told)
    images = [(n, image) for n, s in enumerate(found) if (image := _image(s)) is not None]
    if len(images) < len(found):
        log.warning("%d samples of %s have no image", len(found) - len(images), path)
    labels: list[Label] = [None] * len(images)
    if labelled:
        labels = kept_labels(
            path, len(images), told, lambda: [_label(files, k, found[n]) for n, _ in images]
        )
    for (n, image), label in zip(images, labels, strict=True):
        name = tars.split_name(image.name)[0] or str(n)
        yield k, Found(name, image.offset, image.size, label)


def _part(paths: list[str], labelled: bool) -> Part:
    files = Files(paths)
    part = Part(files)
    part.add_all(pair for k in range(len(files)) for pair in _shard(files, k, labelled))
    if not len(part.names):
        raise DataError(
            f"no image in {len(paths)} shards such as {paths[0]!r}: a sample has a member with an "
            f"image's extension, such as 0001.jpg"
        )
    return part


def _classes(paths: list[str]) -> tuple[str, ...] | None:
    """The class names in a manifest beside the shards, or above them."""
    folder = paths[0].rsplit("/", 1)[0]
    for place in (folder, folder.rsplit("/", 1)[0]):
        try:
            told = json.loads(read_all(f"{place}/{MANIFEST}"))["classes"]
            return tuple(map(str, told)) if told else None
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def own_split(path: str, suffixes: tuple[str, ...]) -> list[str]:
    """[path], or its folders train/ and val/ (or test/) where both have such files."""
    if is_folder(path, suffixes) and is_folder(f"{path}/train", suffixes):
        for test in TESTS:
            if is_folder(f"{path}/{test}", suffixes) and expand(f"{path}/{test}", suffixes):
                return [f"{path}/train", f"{path}/{test}"]
    return [path]


def shards(path: str, val: str | None, suffixes: tuple[str, ...]) -> list[list[str]]:
    """The files of the source, or of its train and its test part.

    Raises DataError where a pattern names none.
    """
    patterns = own_split(path, suffixes) if val is None else [path, val]
    found = [expand(pattern, suffixes) for pattern in patterns]
    for pattern, some in zip(patterns, found, strict=True):
        if not some:
            raise DataError(
                f"no {suffixes[0]} file at {pattern!r}: give a folder of them, or a pattern such "
                f"as /data/train-{{000000..000099}}{suffixes[0]}"
            )
    return found


class WebDatasetSource(SourceOptions):
    """Tar files in the WebDataset layout."""

    name: Literal["webdataset"] = Field(default="webdataset", description="which source this is")
    path: Annotated[str, AfterValidator(absolute_pattern)] = Field(
        description="a folder of .tar files, perhaps in train/ and val/; or a pattern with "
        "{0000..0099} or *; or such a URL"
    )
    val: Annotated[str, AfterValidator(absolute_pattern)] | None = Field(
        default=None, description="the test part's, like path; None: its val/, or split by a seed"
    )
    labels: bool = Field(default=True, description="whether to read labels")

    def open(self) -> tuple[Source, ...]:
        found = shards(self.path, self.val, (".tar",))
        parts = [_part(paths, self.labels) for paths in found]
        return build(parts, _classes(found[0]))
