"""TFRecord files of tf.train.Example, read at random and without TensorFlow.

    record   length (uint64), masked CRC-32C of it (uint32), data, masked CRC-32C of the data
    masked   rotate_right(crc, 15) + 0xa282ead8
    Example  1: Features { 1: entry { 1: key  2: Feature { 1: bytes  2: floats  3: int64s } } }

A file's index is FILE.idx (or, for x.tfrecord, x.idx), as DALI's tfrecord2idx writes it: a line
`<offset> <size>` for each record, the 16 bytes around its data included.  It is read, or made and
left there.  Lengths are checked by their sum; the data by whether they can be decoded.
Sources: tensorflow/core/lib/io/record_writer.cc, tensorflow/core/example/example.proto.
"""

import logging
import struct
from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, Field

from fastssl.data.errors import BadItem, DataError
from fastssl.data.sources.base import Source, SourceOptions
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
Span = tuple[int, int]  # a record's offset and size


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_TABLE = _crc_table()


def masked_crc(data: bytes) -> int:
    """The masked CRC-32C that TFRecord files keep; slow, for a few bytes.

    >>> hex(masked_crc(b"123456789"))
    '0xc78ab0e5'
    """
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _length(head: bytes) -> int | None:
    """The data's bytes, of a record's first 12; None where these are damaged."""
    if len(head) < _HEAD:
        return None
    length, crc = struct.unpack("<QI", head[:_HEAD])
    return length if crc == masked_crc(head[:8]) and length < 2**62 else None


class _Lazy:
    """A stretch of a file that is sliced as bytes are, and read as far as it is looked at."""

    def __init__(self, window: Window, start: int):
        self.window, self.start = window, start

    def __getitem__(self, at: slice) -> bytes:
        return self.window.read(self.start + at.start, at.stop - at.start)


class Value(NamedTuple):
    """A field of a message: its number, and either a whole number or where its bytes are."""

    field: int
    number: int
    start: int
    end: int


def _varint(head: bytes, at: int) -> tuple[int, int]:
    value = 0
    for k in range(10):
        if at + k >= len(head):
            break
        value |= (head[at + k] & 127) << 7 * k
        if head[at + k] < 128:
            return value, at + k + 1
    raise ValueError("a number without an end")


def _fields(data: Any, at: int, end: int) -> Iterator[Value]:
    """The fields of a protobuf message in data[at:end].  Raises ValueError where it is none."""
    while at < end:
        head = data[at : min(at + 20, end)]
        tag, used = _varint(head, 0)
        kind, number, start = tag & 7, 0, at + used
        if kind == 0:
            number, used = _varint(head, used)
            start = stop = at + used
        elif kind == 2:
            size, used = _varint(head, used)
            start, stop = at + used, at + used + size
        elif kind in (1, 5):
            stop = start + (8 if kind == 1 else 4)
        else:
            raise ValueError(f"wire type {kind}")
        if stop > end:
            raise ValueError("a field that is longer than what it is in")
        yield Value(tag >> 3, number, start, stop)
        at = stop


def _features(data: Any, size: int) -> Iterator[tuple[bytes, Value]]:
    """The key of each feature of an Example in data[:size], and its list of values."""
    for features in _fields(data, 0, size):
        if features.field != 1:
            continue
        for entry in _fields(data, features.start, features.end):
            parts = {part.field: part for part in _fields(data, entry.start, entry.end)}
            if 1 in parts and 2 in parts:
                key, value = parts[1], parts[2]
                some = next(_fields(data, value.start, value.end), None)
                if some is not None:
                    yield data[key.start : key.end], some


def _first(data: Any, values: Value) -> Value | None:
    return next((v for v in _fields(data, values.start, values.end) if v.field == 1), None)


def example_bytes(data: bytes, key: str) -> bytes:
    """The first bytes of feature `key` of an Example.  Raises ValueError saying what is wrong."""
    known = []
    for name, values in _features(data, len(data)):
        known.append(name.decode(errors="replace"))
        if known[-1] == key:
            first = _first(data, values) if values.field == 1 else None
            if first is None:
                raise ValueError(f"its feature {key!r} has no bytes")
            return data[first.start : first.end]
    raise ValueError(f"it has no feature {key!r}, but {', '.join(map(repr, known)) or 'none'}")


def example_label(data: Any, size: int, key: str) -> Label:
    """The first number, or text, of feature `key` of an Example; None where there is none."""
    try:
        for name, values in _features(data, size):
            if name == key.encode():
                first = _first(data, values)
                if values.field == 1 and first is not None:
                    return data[first.start : first.end].decode()
                if values.field != 3 or first is None:
                    return None
                packed = data[first.start : min(first.start + 10, first.end)]
                number = _varint(packed, 0)[0] if packed else first.number
                return number if number < 2**63 else None
    except DataError:  # the store failed
        raise
    except ValueError:  # damaged: a bad item when its image is asked for
        pass
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
    if _length(record) != len(record) - _AROUND:
        raise BadItem(name, "its record is damaged: the length does not fit")
    try:
        return example_bytes(record[_HEAD:-4], key)
    except ValueError as error:
        raise BadItem(name, f"its record is no readable tf.train.Example: {error}") from error


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
            return [
                example_label(_Lazy(window, at + _HEAD), size - _AROUND, label)
                for at, size in found
            ]

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
