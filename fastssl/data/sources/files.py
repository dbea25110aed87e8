"""Files by path or URL, named by a pattern and read at any place.

A path is the local disk's; a text with `://` (s3, gs, https, ...) is read as remote.py says.
"""

import errno
import glob
import logging
import os
import re
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from fastssl.data.errors import BadItem, DataError
from fastssl.data.sources import remote
from fastssl.data.sources.base import absolute
from fastssl.data.sources.decode import MOST_BYTES, of_the_machine
from fastssl.data.sources.remote import Remote, Status
from fastssl.files import write_atomically

log = logging.getLogger(__name__)

_OPEN = 64  # descriptors that one process keeps of one set of files
_MOST_FILES = 1_000_000
_BESIDE = (".idx", ".labels", ".partial")  # what lies beside a file, and is none of the data
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def is_remote(path: str) -> bool:
    return "://" in path


def absolute_pattern(path: str) -> str:
    """A path or pattern that means the same wherever a saved config is read; a URL as it is."""
    return path if is_remote(path) else str(absolute(Path(path)))


def status(path: str) -> Status:
    """Raises OSError where the file is not there."""
    if is_remote(path):
        return remote.status(path)
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise PermissionError(errno.EACCES, "It is a pipe or a device, and no file", path)
    return Status(found.st_size, found.st_mtime)


def read_all(path: str) -> bytes:
    """A whole, small file.  Raises OSError."""
    return remote.read_all(path) if is_remote(path) else Path(path).read_bytes()


def write_beside(path: str, data: bytes, own: Callable[[bytes], bool]) -> bool:
    """Write a local file, whole or not at all; False where that cannot be done.

    own(first bytes) -> whether a file that is there is of this kind: another's is left as it is.
    """
    if is_remote(path):
        return False
    if os.path.lexists(path):
        ours = False
        with suppress(OSError):
            head = Path(path).read_bytes()[:64] if os.path.isfile(path) else b"?"
            ours = not head or own(head)
        if not ours:
            log.warning("%s is another's file and left as it is: no index is kept there", path)
            return False
    try:
        write_atomically(Path(path), data)
    except OSError:
        return False
    return True


def _choices(text: str) -> list[str]:
    span = _RANGE.fullmatch(text)
    if span is None:
        return text.split(",") if "," in text else ["{" + text + "}"]
    first, last = map(int, span.groups())
    if last - first >= _MOST_FILES:
        raise DataError(f"{{{text}}} names more than {_MOST_FILES} files: narrow it")
    return [f"{k:0{len(span[1])}d}" for k in range(first, last + 1)]


def braces(pattern: str) -> list[str]:
    """The texts that a pattern with {000..099} or {a,b} stands for, in order.

    >>> braces("a{08..10}.{x,y}")[1:4]
    ['a08.y', 'a09.x', 'a09.y']
    """
    parts = _BRACES.split(pattern)  # plain, choice, plain, choice, ..., plain
    choices = [[part] if k % 2 == 0 else _choices(part) for k, part in enumerate(parts)]
    count = 1
    for some in choices:
        count *= len(some)
    if count > _MOST_FILES:
        raise DataError(f"{pattern!r} names {count} files, above {_MOST_FILES}: narrow it")
    return ["".join(chosen) for chosen in product(*choices)]


def _listed(pattern: str) -> list[str]:
    """The files that a pattern without braces matches; itself if it has no wildcard."""
    if not any(c in pattern for c in "*?["):
        return [pattern]
    find = remote.matching if is_remote(pattern) else partial(glob.glob, recursive=True)
    found = find(pattern)
    return sorted(path for path in found if not path.endswith(_BESIDE))


def is_folder(path: str, suffixes: Sequence[str]) -> bool:
    """A URL that ends as the files do is one: a web server, asked for a folder, would send it."""
    if is_remote(path):
        return not path.endswith(tuple(suffixes)) and remote.is_folder(path)
    return os.path.isdir(path)


def in_folder(folder: str, suffixes: Sequence[str]) -> list[str]:
    """The files of these suffixes directly in a folder, sorted; hidden ones are passed over."""
    if is_remote(folder):
        found = remote.listed(folder)
    else:
        try:
            found = [os.path.join(folder, name) for name in os.listdir(folder)]
        except OSError as error:
            raise DataError(f"cannot list folder {folder!r} ({error.strerror})") from error
    names = ((path, path.rstrip("/").rsplit("/", 1)[-1]) for path in found)
    return sorted(p for p, n in names if n.lower().endswith(tuple(suffixes)) and n[0] != ".")


def expand(pattern: str, suffixes: Sequence[str]) -> list[str]:
    """The files that a folder, a path or a pattern names, in order; none may be there.

    A path that exists is taken as it is, whatever braces or stars are in it.
    """
    if is_folder(pattern, suffixes):
        return in_folder(pattern, suffixes)
    if not is_remote(pattern) and os.path.lexists(pattern):
        return [pattern]
    return [path for plain in braces(pattern) for path in _listed(plain)]


class _Handle:
    """A descriptor that is closed when nobody reads from it any more."""

    fd = -1

    def __init__(self, path: str):
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # of a pipe

    def __del__(self, close: Callable[[int], None] = os.close):  # os may be gone at the end
        if self.fd >= 0:
            close(self.fd)

    def read(self, offset: int, size: int) -> bytes:
        data = os.pread(self.fd, size, offset)
        while len(data) < size:
            more = os.pread(self.fd, size - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data


class _Opened:
    """What one process has open."""

    def __init__(self):
        self.process, self.lock = os.getpid(), threading.Lock()
        self.handles: dict[int, _Handle | Remote] = {}


class Files:
    """A sequence of files, each readable at any place, by several threads at once.

    Files are opened when first read, by each process anew: copies travel by pickle and fork.
    """

    def __init__(self, paths: Sequence[str]):
        self.paths = tuple(paths)
        self._opened: _Opened | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "_opened": None}

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, k: int) -> str:
        """The last part of path k."""
        return self.paths[k].rsplit("/", 1)[-1]

    def _handle(self, k: int) -> _Handle | Remote:
        opened = self._opened
        if opened is None or opened.process != os.getpid():
            opened = self._opened = _Opened()
        with opened.lock:
            handle = opened.handles.pop(k, None)
            if handle is None:
                path = self.paths[k]
                handle = Remote(path) if is_remote(path) else _Handle(path)
            opened.handles[k] = handle  # the latest used is last
            if len(opened.handles) > _OPEN:
                del opened.handles[next(iter(opened.handles))]
        return handle

    def read(self, k: int, offset: int, size: int) -> bytes:
        """size bytes of file k from offset on; fewer where it ends.  Raises OSError."""
        return self._handle(k).read(offset, size)

    def record(self, k: int, offset: int, size: int, name: str) -> bytes:
        """`read` for an item called name.

        Raises BadItem for a file that vanished, may not be read or ends before it; DataError where
        a remote store fails; a failure of the machine as it is.
        """
        if not 0 <= size < MOST_BYTES:
            raise BadItem(name, f"{size} bytes are too many for one item")
        try:
            data = self.read(k, offset, size)
        except OSError as error:
            if of_the_machine(error):
                raise
            raise BadItem(name, error.strerror or "No such file") from error
        if len(data) < size:
            raise BadItem(name, f"its file ends {size - len(data)} bytes before it does")
        return data


class Window:
    """File k of `files` read front to back in small pieces, a block at a time.

    start: where reading begins; end: the file's size, bytes.
    """

    def __init__(self, files: Files, k: int, end: int):
        self.files, self.k, self.end = files, k, end
        self.block = 2**20 if is_remote(files.paths[k]) else 4096
        self._start, self._data = 0, b""

    def read(self, offset: int, size: int) -> bytes:
        """Fewer bytes than asked for at the end."""
        at = offset - self._start
        if not (0 <= at and at + size <= len(self._data)):
            want = min(max(size, self.block), max(self.end - offset, 0))
            self._start, self._data = offset, self.files.read(self.k, offset, want) if want else b""
            at = 0
        return self._data[at : at + size]

    def blocks(self, offset: int, size: int) -> Iterator[tuple[int, bytes]]:
        """(place, bytes) of all pieces of `size` bytes from offset on, read in long stretches."""
        step = max(2**20 // size, 1) * size
        for start in range(offset, self.end, step):
            data = self.files.read(self.k, start, min(step, self.end - start))
            for at in range(0, len(data), size):
                yield start + at, data[at : at + size]
