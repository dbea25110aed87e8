"""Where the members of a tar file lie, and the index that keeps it: read, checked, written.

A tar file is blocks of 512 bytes: a header (name, size, checksum), the data padded to whole blocks,
and zeros at the end.  Names of more than 100 bytes come in a member before (GNU's L, PAX's x).

An index in DALI's format (wds2idx writes it) has a line `v1.2 <samples>`, then for each sample
`<extension> <offset> <size> <name>` for each of its members in turn; v1.1 has no names.  A name
with white space cannot be written so: then all names are quoted as in a URL, and the first line
ends in ` quoted`, which other readers pass over.
Sources: POSIX.1-2008, pax, "ustar Interchange Format"; NVIDIA DALI, tools/wds2idx.py.
"""

import logging
import os
import posixpath
from collections.abc import Iterable, Iterator
from typing import NamedTuple
from urllib.parse import quote, unquote_to_bytes

from fastssl.data.errors import DataError
from fastssl.data.sources.files import Files, Window, read_all
from fastssl.data.sources.remote import Status

log = logging.getLogger(__name__)

BLOCK = 512
_ZEROS = bytes(BLOCK)
_WITHOUT_DATA = b"123456"  # links, devices, folders
_LONGEST_NAME = 2**20
_LARGEST = 2**62  # bytes: what a damaged header says beyond is no size
INDEX = "v1.2"


class Member(NamedTuple):
    name: str
    offset: int  # of its data, bytes
    size: int

    @property
    def end(self) -> int:
        return self.offset + self.size


class Component(NamedTuple):
    """A member of a sample; `name` is empty where the index has none."""

    extension: str
    offset: int
    size: int
    name: str


Sample = list[Component]


def _number(field: bytes) -> int:
    """An octal text, or a big-endian number whose first byte is 128.  Raises ValueError."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


class _Header(NamedTuple):
    kind: bytes
    name: bytes
    size: int
    target: bytes  # of a link


def _header(block: bytes) -> _Header | None:
    """What a block says if it is a header."""
    if len(block) < BLOCK:
        return None
    try:
        told = _number(block[148:156])
        total = sum(block[:148]) + 256 + sum(block[156:])
        if told != total:
            return None
        name, size = block[:100].split(b"\0", 1)[0], _number(block[124:136])
    except ValueError:
        return None
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    target = block[157:257].split(b"\0", 1)[0]
    return _Header(block[156:157], name, size, target) if 0 <= size < _LARGEST else None


def _pax(data: bytes) -> dict[bytes, bytes]:
    """The records `<length> <key>=<value>\\n` of a PAX header; those before the first bad one."""
    found, at = {}, 0
    while at < len(data):
        length, _, _ = data[at:].partition(b" ")
        try:
            size = int(length)
            key, value = data[at + len(length) + 1 : at + size - 1].split(b"=", 1)
        except ValueError:
            break
        if size < len(length) + 4:
            break
        found[key] = value
        at += size
    return found


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _next_header(window: Window, start: int) -> int | None:
    """Where a header follows a damaged one."""
    for place, block in window.blocks(start, BLOCK):
        if _header(block) is not None:
            return place
    return None


def _linked(kind: bytes, name: bytes, target: bytes) -> bytes:
    """The member that a link stands for: a hard link has its name, a symbolic one the way to it."""
    way = os.path.join(os.path.dirname(name), target) if kind == b"2" else target
    return posixpath.normpath(way)


def _members(window: Window, title: str) -> Iterator[Member]:
    at, before, left_out = 0, {}, []
    places: dict[bytes, tuple[int, int]] = {}  # of the data of each name, for links to it
    while at + BLOCK <= window.end:
        block = window.read(at, BLOCK)
        if block == _ZEROS:
            break
        header = _header(block)
        if header is None:
            if at == 0:
                raise DataError(f"{title} is no tar file: remove it, or unpack it if it is packed")
            found = _next_header(window, at + BLOCK)
            log.warning("%s is damaged at byte %d; next member at %s", title, at, found)
            if found is None:
                break
            at, before = found, {}
            continue
        kind, name, size, target = header
        data = at + BLOCK
        if kind in (b"L", b"K", b"x") and size <= _LONGEST_NAME:
            text, key = window.read(data, size), b"path" if kind == b"L" else b"linkpath"
            before |= _pax(text) if kind == b"x" else {key: text.rstrip(b"\0")}
        elif kind not in (b"g", b"K", b"L", b"x"):
            name, target = before.get(b"path", name), before.get(b"linkpath", target)
            told = before.get(b"size", b"")
            size = min(int(told[:20]), _LARGEST) if told.isdigit() else size
            sparse = any(k.startswith(b"GNU.sparse") for k in before)
            place = (data, size) if kind in (b"0", b"\0", b"7") and not sparse else None
            if kind in (b"1", b"2"):
                place = places.get(_linked(kind, name, target))
            if place is not None:
                places[posixpath.normpath(name)] = place
                yield Member(os.fsdecode(name), *place)
            elif kind not in (b"3", b"4", b"5", b"6"):  # devices and folders have no data
                left_out.append(os.fsdecode(name))
            before = {}
        at = data + (0 if kind in _WITHOUT_DATA else _padded(size))
    if left_out:
        log.warning(
            "%s: %d members are left out, such as %r: sparse files, or links to what is not there",
            *(title, len(left_out), left_out[0]),
        )


def members(files: Files, k: int, size: int) -> Iterator[Member]:
    """The regular files in tar file k, of `size` bytes, in order; the last may be cut off.

    After a damaged header the next sound one is looked for; a warning says so.
    Raises DataError for what is no tar file.
    """
    title = repr(files.paths[k])
    if size == 0:
        raise DataError(f"{title} is empty: remove it, or fetch it again")
    if files.read(k, 0, 2) == b"\x1f\x8b":
        raise DataError(f"{title} is compressed, and has no random access: gunzip it first")
    return _members(Window(files, k, size), title)


def split_name(name: str, *, last: bool = False) -> tuple[str, str]:
    """The sample that a member belongs to and its extension, from the base name's first dot on.

    last: from its last dot on.

    >>> split_name("a.b/c.seg.png"), split_name("c.seg.png", last=True)
    (('a.b/c', 'seg.png'), ('c.seg', 'png'))
    """
    base = name.rfind("/") + 1
    dot = name.rfind(".", base) if last else name.find(".", base)
    return (name, "") if dot < 0 else (name[:dot], name[dot + 1 :])


def samples(found: Iterable[tuple[str, int, int]], *, last: bool = False) -> Iterator[Sample]:
    """Members in a row of one key, grouped.  Hidden files are passed over.

    found: name, offset and size of each.  A name that comes again begins another sample.
    last: keys end at the last dot.
    """
    sample, extensions, before = [], set(), None
    for name, offset, size in found:
        key, extension = split_name(name, last=last)
        if not key or key.endswith("/"):
            continue
        if (key != before or extension in extensions) and sample:
            yield sample
            sample, extensions = [], set()
        before = key
        extensions.add(extension)
        sample.append(Component(extension, offset, size, name))
    if sample:
        yield sample


def is_index(head: bytes) -> bool:
    """Whether a file that begins so is an index of a tar file, whole or not."""
    return head.startswith((b"v1.1 ", b"v1.2 "))


def index_text(found: list[Sample]) -> bytes:
    """The index of a tar file's samples, as this file's head says."""
    plain = [
        [(os.fsencode(c.extension) or b".", c.offset, c.size, os.fsencode(c.name)) for c in sample]
        for sample in found
    ]
    spaced = any(row[3].split() != [row[3]] for rows in plain for row in rows)
    lines = [f"{INDEX} {len(found)}{' quoted' if spaced else ''}".encode()]
    for rows in plain:
        if spaced:
            rows = [
                (quote(e).encode(), offset, size, quote(n).encode()) for e, offset, size, n in rows
            ]
        lines.append(b" ".join(b"%s %d %d %s" % row for row in rows))
    return b"\n".join(lines) + b"\n"


def parse_index(text: bytes) -> list[Sample]:
    """The samples of an index.  Raises ValueError for what is none."""
    head, *lines = text.decode("utf-8", "surrogateescape").split("\n")
    version, count, *more = head.split()
    if version not in ("v1.1", INDEX):
        raise ValueError(f"version {version!r}")
    width, quoted = (3 if version == "v1.1" else 4), more == ["quoted"]
    found = []
    for line in lines[: int(count)]:
        words = line.split(" ")
        if len(words) % width:
            raise ValueError(f"{len(words)} words in a line")
        if quoted:
            words = [os.fsdecode(unquote_to_bytes(word)) for word in words]
        sample = []
        for i in range(0, len(words), width):
            name = words[i + 3] if width == 4 else ""
            extension = words[i] if words[i] != "." else ""
            offset, size = int(words[i + 1]), int(words[i + 2])
            if not (0 <= offset < _LARGEST and 0 <= size < _LARGEST):
                raise ValueError(f"a member of {size} bytes at {offset}")
            sample.append(Component(extension, offset, size, name))
        found.append(sample)
    if len(found) != int(count):
        raise ValueError(f"{len(found)} samples of {int(count)}")
    return found


def _fits(found: list[Sample], files: Files, k: int, size: int) -> bool:
    """Whether headers lie where the index wants them, and none behind its last member."""
    every = [c for sample in (found[:1] + found[-1:]) for c in sample]
    middle = found[len(found) // 2] if found else []
    for part in (*every, *middle):
        if part.offset % BLOCK or part.offset < BLOCK:
            return False
        if part.offset <= size:
            header = _header(files.read(k, part.offset - BLOCK, BLOCK))
            if header is None or header.size != part.size:
                return False
    if not every:
        return False
    end = max(part.offset + _padded(part.size) for part in every)
    return end + BLOCK > size or files.read(k, end, BLOCK) == _ZEROS


def index_path(path: str) -> str:
    """Where the index of a tar file is: beside it, .tar replaced by .idx."""
    return os.path.splitext(path)[0] + ".idx"


def read_index(files: Files, k: int, told: Status, of: Status | None) -> list[Sample] | None:
    """The index beside tar file k, or None where it is missing, older than it, or does not fit.

    told: the tar file's status; of: the index's, None where there is none.
    """
    if of is None or (of.modified or 0) < (told.modified or 0):
        return None
    try:
        found = parse_index(read_all(index_path(files.paths[k])))
        return found if _fits(found, files, k, told.size) else None
    except (OSError, ValueError):
        return None
