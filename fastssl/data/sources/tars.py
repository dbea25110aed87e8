"""Where the members of a tar file lie, and the index that keeps it: read, checked, written.

A tar file is blocks of 512 bytes: a header (name, size, checksum), the data padded to whole blocks,
and zeros at the end.  The standard library's tarfile reads the headers; what it refuses is damage.

An index in DALI's format (wds2idx writes it) has a line `v1.2 <samples>`, then for each sample
`<extension> <offset> <size> <name>` for each of its members in turn; v1.1 has no names.  A name
with white space cannot be written so: then all names are quoted as in a URL, and the first line
ends in ` quoted`, which other readers pass over.
Sources: POSIX.1-2008, pax, "ustar Interchange Format"; NVIDIA DALI, tools/wds2idx.py.
"""

import logging
import os
import posixpath
import tarfile
from collections.abc import Iterable, Iterator
from typing import NamedTuple
from urllib.parse import quote, unquote_to_bytes

from fastssl.data.errors import DataError
from fastssl.data.sources.files import Files, Window, read_all
from fastssl.data.sources.remote import Status

log = logging.getLogger(__name__)

BLOCK = 512
_ZEROS = bytes(BLOCK)
_LONGEST_NAME = 2**20
_LARGEST = 2**62  # bytes: what a damaged header says beyond is no size
INDEX = "v1.2"


class Member(NamedTuple):
    name: str
    offset: int  # of its data, bytes
    size: int


class Component(NamedTuple):
    """A member of a sample; `name` is empty where the index has none."""

    extension: str
    offset: int
    size: int
    name: str


Sample = list[Component]


class _Stream:
    """A window as the file that tarfile reads headers from."""

    def __init__(self, window: Window):
        self.window, self.at = window, 0

    def tell(self) -> int:
        return self.at

    def seek(self, at: int) -> None:
        self.at = at

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _LONGEST_NAME:
            raise tarfile.HeaderError(f"a name of {size} bytes")
        data = self.window.read(self.at, size)
        self.at += len(data)
        return data


def _header(block: bytes) -> tarfile.TarInfo | None:
    """What a block says if it is a header."""
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None


def _read_header(archive: tarfile.TarFile, at: int, title: str) -> tarfile.TarInfo | None:
    """The member whose headers, those of a long name included, begin at byte `at`; None: damage."""
    archive.fileobj.seek(at)  # type: ignore[union-attr]
    try:
        info = tarfile.TarInfo.fromtarfile(archive)
    except (DataError, OSError, MemoryError):
        raise
    except RecursionError as error:
        raise DataError(f"{title} has headers of headers without end: remove it") from error
    except Exception:  # a damaged header leads the reader anywhere
        return None
    return info if archive.offset > at and info.size >= 0 else None


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _next_header(window: Window, start: int) -> int | None:
    """Where a header follows a damaged one."""
    for place, block in window.blocks(start, BLOCK):
        if _header(block) is not None:
            return place
    return None


def _linked(info: tarfile.TarInfo) -> str:
    """The member that a link stands for: a hard link has its name, a symbolic one the way to it."""
    way = posixpath.dirname(info.name) if info.issym() else ""
    return posixpath.normpath(posixpath.join(way, info.linkname))


def _members(window: Window, title: str) -> Iterator[Member]:
    # To write, since a TarFile to read reads a header at once
    archive = tarfile.TarFile(fileobj=_Stream(window), mode="w", encoding="utf-8")  # type: ignore
    at, left_out = 0, []
    places: dict[str, tuple[int, int]] = {}  # of the data of each name, for links to it
    while at + BLOCK <= window.end and window.read(at, BLOCK) != _ZEROS:
        info = _read_header(archive, at, title)
        if info is None:
            if at == 0 and _header(window.read(0, BLOCK)) is None:
                raise DataError(f"{title} is no tar file: remove it, or unpack it if it is packed")
            found = _next_header(window, at + BLOCK)
            log.warning("%s is damaged at byte %d; next member at %s", title, at, found)
            if found is None:
                break
            at = found
            continue
        at = archive.offset
        sparse = info.issparse() or any(key.startswith("GNU.sparse") for key in info.pax_headers)
        place = None
        if info.islnk() or info.issym():
            place = places.get(_linked(info))
        elif info.isreg() and not sparse:
            place = (info.offset_data, min(info.size, _LARGEST))
        if place is not None:
            places[posixpath.normpath(info.name)] = place
            yield Member(info.name, *place)
        elif not (info.isdev() or info.isdir()):
            left_out.append(info.name)
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
