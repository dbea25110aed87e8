"""WebDataset shards: tar files whose members of one key are a sample, read at random.

A key ends at the first dot of a file's name.  A sample's image is its one member with an image's
extension (`jpg` before `seg.png`, whatever the order), its label the number or text in its `cls` or
the "label" in its `json`, wherever in the shard that is.  An index of each shard (tars.py) is read
from beside it, or made and left there: any order costs one read an image.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator

from fastssl.data.errors import BadItem, DataError
from fastssl.data.sources import tars
from fastssl.data.sources.base import SourceOptions
from fastssl.data.sources.decode import SUFFIXES
from fastssl.data.sources.files import (
    Files,
    absolute_pattern,
    expand,
    is_folder,
    read_all,
    write_beside,
)
from fastssl.data.sources.reading import Read, check_read, read_as
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
from fastssl.data.streams import Joined

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
TESTS = ("val", "test", "valid", "validation")
_EXTENSIONS = frozenset(suffix[1:] for suffix in SUFFIXES)
_LONGEST_LABEL = 2**24


def _image(sample: Sample, path: str, chosen: str | None) -> Component | None:
    """The image among a sample's members: the one of extension `chosen`, if that is given; else the
    one of a plain extension, or of one such as seg.png.

    Raises DataError where there are several.
    """
    if chosen is not None:
        return next((part for part in sample if part.extension == chosen), None)
    split = [(part, part.extension.lower().rpartition(".")) for part in sample]
    found = [(part, plain) for part, (plain, _, last) in split if last in _EXTENSIONS]
    images = [part for part, plain in found if not plain] or [part for part, _ in found]
    if len(images) > 1:
        names = ", ".join(repr(part.name or part.extension) for part in images[:3])
        raise DataError(
            f"{path!r}: a sample has {len(images)} images ({names}{' ...' * (len(images) > 3)}), "
            "for a name up to its first dot is a sample's key: data.source.key=last takes names up "
            f"to their last dot, data.source.image={images[0].extension} one image of each sample"
        )
    return images[0] if images else None


def parse_label(extension: str, data: bytes) -> Label:
    """The label in a member called .cls or .json; None where there is none to be read."""
    try:
        if extension == "cls":
            text = data.decode().strip()
            return int(text) if text.lstrip("+-").isdecimal() else text or None
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
        write_beside(tars.index_path(files.paths[k]), tars.index_text(found), tars.is_index)
    return found


def _by_last_dot(found: list[Sample]) -> list[Sample]:
    return list(tars.samples(((c.name, c.offset, c.size) for s in found for c in s), last=True))


def _joined(found: list[Sample], images: list[Component | None], last: bool) -> None:
    """Give members apart from their image, as where all labels follow all images, to its sample."""
    own: dict[str, Sample] = {}
    for sample, image in zip(found, images, strict=True):
        if image is not None:
            own.setdefault(tars.split_name(image.name, last=last)[0], sample)
    for sample, image in zip(found, images, strict=True):
        to = own.get(tars.split_name(sample[0].name, last=last)[0]) if image is None else None
        if to is not None and sample[0].name:  # an index of version 1.1 has no names
            to += sample
            sample.clear()


def _complete(found: list[Sample], wanted: Sequence[str], path: str) -> list[Sample]:
    """The samples that have a member of each of these extensions."""
    whole = [s for s in found if set(wanted) <= {part.extension for part in s}]
    lost = sum(map(bool, found)) - len(whole)
    if lost:
        told = ", ".join(wanted)
        log.warning("%d samples of %s have not all of %s, and are left out", lost, path, told)
    return whole


def _shard(
    files: Files, k: int, cfg: "WebDatasetSource", chosen: str | None
) -> Iterator[tuple[int, Found]]:
    path, last = files.paths[k], cfg.key == "last"
    told, _ = checked(files, k, "shard")
    keep = True
    found = tars.read_index(files, k, told, status_or_none(tars.index_path(path)))
    repeated = found and any(len({c.extension for c in s}) < len(s) for s in found)
    if found is None or repeated or (last and not all(c.name for s in found for c in s)):
        found = _scanned(files, k, told)
    found = _by_last_dot(found) if last else found
    streams = list(cfg.image.values()) if isinstance(cfg.image, dict) else []
    every = [_image(sample, path, streams[0] if streams else chosen) for sample in found]
    if streams:
        _joined(found, every, last)
        known, found = len(found), _complete(found, streams, path)
        every = [_image(sample, path, chosen) for sample in found]
        keep = len(found) == known
    elif None in every:
        _joined(found, every, last)
        lost = sum(image is None and bool(s) for s, image in zip(found, every, strict=True))
        if lost:
            log.warning("%d samples of %s have no image", lost, path)
    images = [(n, image) for n, image in enumerate(every) if image is not None]
    labels: list[Label] = [None] * len(images)
    if cfg.labels and not keep:  # what is kept is of other samples
        labels = [_label(files, k, found[n]) for n, _ in images]
    elif cfg.labels:
        labels = kept_labels(
            path, len(images), told, lambda: [_label(files, k, found[n]) for n, _ in images]
        )
    for (n, image), label in zip(images, labels, strict=True):
        name = tars.split_name(image.name, last=last)[0] or str(n)
        yield k, Found(name, image.offset, image.size, label)


def _part(paths: list[str], cfg: "WebDatasetSource", chosen: str | None) -> Part:
    files = Files(paths)
    part = Part(files)
    part.add_all(pair for k in range(len(files)) for pair in _shard(files, k, cfg, chosen))
    if not len(part.names) and isinstance(cfg.image, dict):
        wanted = ", ".join(cfg.image.values())
        raise DataError(
            f"no sample of {len(paths)} shards such as {paths[0]!r} has all of {wanted}"
        )
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
    key: Literal["first", "last"] = Field(
        default="first", description="the dot of a file's name that ends its sample's key"
    )
    image: str | dict[str, str] | None = Field(
        default=None,
        description="extension of the image, such as left.jpg, where there are several; or one for "
        "each stream, as {image: jpg, depth: depth.png}",
    )
    read: dict[str, Read] = Field(
        default={}, description="by stream: color, gray, or values (float32, units of their own)"
    )

    @field_validator("image")
    @classmethod
    def _streams(cls, image: Any) -> Any:
        if isinstance(image, dict) and len(set(image.values())) < max(len(image), 1):
            raise ValueError(f"want an extension for each stream, each once, got {image}")
        return image

    def open(self) -> tuple[Any, ...]:
        found = shards(self.path, self.val, (".tar",))
        classes = _classes(found[0])
        if not isinstance(self.image, dict):
            check_read(self.read, {})
            return build([_part(paths, self, self.image) for paths in found], classes)
        check_read(self.read, self.image)
        streams: dict[str, list[Any]] = {}
        for name, extension in self.image.items():
            records = build([_part(paths, self, extension) for paths in found], classes)
            how = self.read.get(name, "color")
            streams[name] = [read_as(part, how, name) for part in records]
        parts = range(len(found))
        return tuple(Joined({name: own[k] for name, own in streams.items()}) for k in parts)
