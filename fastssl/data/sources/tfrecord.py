"""TFRecord files of tf.train.Example, read at random and without TensorFlow.

    record   length (uint64), masked CRC-32C of it (uint32), data, masked CRC-32C of the data

A file's index is FILE.idx (or, for x.tfrecord, x.idx), as DALI's tfrecord2idx writes it: a line
`<offset> <size>` for each record, the 16 bytes around its data included.  It is read, or made and
left there.  Lengths are checked by their sum; the data by whether they can be decoded.
Sources: tensorflow/core/lib/io/record_writer.cc, tensorflow/core/example/example.proto.
"""

import logging
import struct
from collections.abc import Iterator
from functools import cache, partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from fastssl.data.errors import BadItem, DataError
from fastssl.data.sources.base import Source, SourceOptions
from fastssl.data.sources.decode import MOST_BYTES
from fastssl.data.sources.files import Files, Window, absolute_pattern, read_all, write_beside
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
from fastssl.data.sources.webdataset import shards

log = logging.getLogger(__name__)

_HEAD, _AROUND = 12, 16
SUFFIXES = (".tfrecord", ".tfrecords", ".tfrec")
_EXAMPLE = {  # message: {number: (name, type, whether repeated)}
    "Example": {1: ("features", "Features", False)},
    "Features": {1: ("feature", "Entry", True)},
    "Entry": {1: ("key", "bytes", False), 2: ("value", "Feature", False)},
    "Feature": {1: ("bytes_list", "Bytes", False), 3: ("int64_list", "Int64s", False)},
    "Bytes": {1: ("value", "bytes", True)},
    "Int64s": {1: ("value", "int64", True)},
}
Span = tuple[int, int]  # a record's offset and size


@cache
def _example_class() -> Any:
    """The class of tf.train.Example, of the parts that are read here: what is wire-compatible with
    example.proto, with bytes for its map's keys."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="example.proto", syntax="proto3")
    for message, fields in _EXAMPLE.items():
        made = file.message_type.add(name=message)
        for number, (name, kind, repeated) in fields.items():
            one = made.field.add(name=name, number=number, label=3 if repeated else 1)
            if kind in _EXAMPLE:
                one.type, one.type_name = one.TYPE_MESSAGE, kind
            else:
                one.type = one.TYPE_BYTES if kind == "bytes" else one.TYPE_INT64
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("Example"))


def _length(head: bytes) -> int | None:
    """The data's bytes, of a record's first 12; None where these are damaged."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    if len(head) < _HEAD:
        return None
    length, crc = struct.unpack("<QI", head[:_HEAD])
    return length if crc == masked_crc32c(head[:8]) and length < 2**62 else None


def parse_example(record: bytes) -> Any:
    """The Example in a record.  Raises ValueError saying what is wrong with it."""
    from google.protobuf.message import DecodeError

    if _length(record) != len(record) - _AROUND:
        raise ValueError("its record is damaged: the length does not fit")
    try:
        return _example_class().FromString(record[_HEAD:-4])
    except DecodeError as error:
        raise ValueError(f"its record is no readable tf.train.Example: {error}") from error


def example_bytes(example: Any, key: str) -> bytes:
    """The first bytes of feature `key` of an Example.  Raises ValueError saying what is wrong."""
    entries = example.features.feature
    feature = next((entry.value for entry in entries if entry.key == key.encode()), None)
    if feature is None:
        known = ", ".join(repr(entry.key.decode(errors="replace")) for entry in entries)
        raise ValueError(f"it has no feature {key!r}, but {known or 'none'}")
    if not feature.bytes_list.value:
        raise ValueError(f"its feature {key!r} has no bytes")
    return feature.bytes_list.value[0]


def example_label(example: Any, key: str) -> Label:
    """The first number, or text, of feature `key` of an Example; None where there is none."""
    for entry in example.features.feature:
        if entry.key == key.encode():
            texts, numbers = entry.value.bytes_list.value, entry.value.int64_list.value
            if texts:
                return texts[0].decode()
            return numbers[0] if numbers and numbers[0] >= 0 else None
    return None


def _label(window: Window, at: int, size: int, key: str) -> Label:
    try:
        record = window.read(at, size) if size < MOST_BYTES else b""
        return example_label(parse_example(record), key)
    except DataError:  # the store failed
        raise
    except ValueError:  # damaged: a bad item when its image is asked for
        return None


def _is_index(head: bytes) -> bool:
    return not head.strip(b"0123456789 \n")


def _scanned(files: Files, k: int, size: int) -> list[Span]:
    """The records of file k by their lengths; behind a damaged one the rest counts as one."""
    window, found, at = Window(files, k, size), [], 0
    while at < size:
        length = _length(window.read(at, _HEAD))
        if length is None:
            log.warning("%s is damaged at byte %d: the rest is not read", files.paths[k], at)
            return [*found, (at, size - at)]
        found.append((at, length + _AROUND))
        at += length + _AROUND
    if at > size:
        log.warning("%s is cut off in its record %d", files.paths[k], len(found) - 1)
    else:
        text = "".join(f"{offset} {length}\n" for offset, length in found)
        write_beside(files.paths[k] + ".idx", text.encode(), _is_index)
    return found


def _fits(found: list[Span], files: Files, k: int, size: int) -> bool:
    if not found or found[0][0] != 0 or sum(found[-1]) < size:
        return False
    for offset, length in (found[0], found[len(found) // 2], found[-1]):
        if length < _AROUND or offset < 0:
            return False
        if offset + _HEAD <= size and _length(files.read(k, offset, _HEAD)) != length - _AROUND:
            return False
    return True


def _read_index(files: Files, k: int, told: Status) -> list[Span] | None:
    """The index beside file k, or None where it is missing, older than it, or does not fit."""
    path = files.paths[k]
    stem = next((path.removesuffix(s) for s in SUFFIXES if path.endswith(s)), path)
    for place in dict.fromkeys((path + ".idx", stem + ".idx")):
        kept = status_or_none(place)
        if kept is None or (kept.modified or 0) < (told.modified or 0):
            continue
        try:
            words = [int(word) for word in read_all(place).split()]
        except (OSError, ValueError):
            continue
        found = list(zip(words[::2], words[1::2], strict=False))
        if len(words) % 2 == 0 and _fits(found, files, k, told.size):
            return found
    return None


def _image(record: bytes, name: str, key: str) -> bytes:
    try:
        return example_bytes(parse_example(record), key)
    except ValueError as error:
        raise BadItem(name, str(error)) from error


def _file(files: Files, k: int, label: str | None) -> Iterator[tuple[int, Found]]:
    path = files.paths[k]
    told, head = checked(files, k, "TFRecord file")
    if told.size and _length(head) is None:
        hint = "gunzip it first" if head[:2] == b"\x1f\x8b" else "remove it, or fetch it again"
        raise DataError(f"{path!r} is no TFRecord file, or damaged at its start: {hint}")
    found = _read_index(files, k, told) or _scanned(files, k, told.size)
    labels: list[Label] = [None] * len(found)
    if label is not None:
        window = Window(files, k, told.size)

        def find() -> list[Label]:
            return [_label(window, at, size, label) for at, size in found]

        labels = kept_labels(path, len(found), told, find)
    for n, ((offset, size), known) in enumerate(zip(found, labels, strict=True)):
        yield k, Found(str(n), offset, size, known)


def _part(paths: list[str], image: str, label: str | None) -> Part:
    files = Files(paths)
    part = Part(files, partial(_image, key=image))
    part.add_all(pair for k in range(len(files)) for pair in _file(files, k, label))
    if not len(part.names):
        raise DataError(f"no record in {len(paths)} files such as {paths[0]!r}: they are empty")
    return part


class TFRecordSource(SourceOptions):
    """TFRecord files of tf.train.Example."""

    name: Literal["tfrecord"] = Field(default="tfrecord", description="which source this is")
    path: Annotated[str, AfterValidator(absolute_pattern)] = Field(
        description="a folder of .tfrecord files, perhaps in train/ and val/; or a pattern with "
        "{0000..0099} or *; or such a URL"
    )
    val: Annotated[str, AfterValidator(absolute_pattern)] | None = Field(
        default=None, description="the test part's, like path; None: its val/, or split by a seed"
    )
    image: str = Field(default="image/encoded", description="key of the encoded image")
    label: str = Field(default="image/class/label", description="key of the label, number or text")
    labels: bool = Field(default=True, description="whether to read labels")

    def open(self) -> tuple[Source, ...]:
        label = self.label if self.labels else None
        found = shards(self.path, self.val, SUFFIXES)
        return build([_part(paths, self.image, label) for paths in found])
