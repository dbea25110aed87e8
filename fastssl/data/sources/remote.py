"""What lies at a URL (s3, gs, https, ...), through fsspec, and what to do when a store is slow.

fsspec is imported here alone.  A store that fails for a moment (a dropped connection, a 503) is
asked again for about a minute; a lasting error (no such file, not permitted) is raised at once.
"""

import errno
import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypeVar

from fastssl.data.errors import DataError

log = logging.getLogger(__name__)

SILENCE = 20.0  # seconds that an HTTP server may keep silent
WAITS = (0.5, 1, 2, 4, 8, 16, 32)  # seconds between tries
_FOR_GOOD = (
    *(FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError),
    *(ImportError, NotImplementedError, AttributeError, LookupError, TypeError, ValueError),
    MemoryError,
)
_jitter = random.SystemRandom()  # workers that failed together do not ask again together
T = TypeVar("T")


class Status(NamedTuple):
    size: int  # bytes
    modified: float | None  # seconds since 1970; None where a store does not tell


def filesystem(path: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it.

    Raises DataError naming what to install.
    """
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(path, **_http_options(path))
    except ImportError as error:
        missing = "" if "fsspec" in str(error) else f" ({error})"
        raise DataError(
            f"{path!r} is remote and needs a package{missing}: pip install fsspec, and the one for "
            "its protocol (s3fs, gcsfs, adlfs, aiohttp ...)"
        ) from error
    except Exception as error:  # each protocol's own, for an address without its parts
        raise DataError(f"{path!r} cannot be opened ({error}): mend the address") from error


def _http_options(path: str) -> dict[str, Any]:
    if not path.startswith(("http://", "https://")):
        return {}
    from aiohttp import ClientTimeout

    timeout = ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
    return {"client_kwargs": {"timeout": timeout}}


@contextmanager
def _sound(path: str) -> Iterator[None]:
    """What a library says of an address that makes no sense to it, as a sentence."""
    try:
        yield
    except DataError:
        raise
    except (ValueError, TypeError, LookupError) as error:
        raise DataError(f"{path!r} cannot be read ({error!r}): mend the address") from error


def _code(error: Exception) -> int | None:
    """The HTTP status that an error carries: aiohttp, gcsfs and requests name it so."""
    code = getattr(error, "status", None) or getattr(error, "code", None)
    return code if isinstance(code, int) else None


def _final_error(path: str, error: Exception) -> Exception | None:
    """The error to raise at once; None where asking again may help.

    fsspec's HTTP file system raises FileNotFoundError for any failure to get a file's size: then
    the cause decides.
    """
    cause = error.__cause__ if isinstance(error, FileNotFoundError) else None
    if not isinstance(cause, Exception):
        cause = error
    code = _code(cause) or 0
    if isinstance(cause, _FOR_GOOD) or code in (404, 410):
        return error
    if code in (401, 403):
        return PermissionError(errno.EACCES, f"Not permitted (HTTP {code})", path)
    if code == 416:
        return EOFError(path)
    if 400 <= code < 500 and code not in (408, 425, 429):
        return DataError(f"{path!r} is refused by its store ({cause}): mend the address")
    return None


def patiently(path: str, ask: Callable[[], T]) -> T:
    """What ask() of the store of `path` gives, asked again while the store fails.

    Raises DataError when it fails to the end, or refuses; PermissionError; EOFError for a part that
    begins behind the file's end; and the file system's own lasting errors (_FOR_GOOD) as they are.
    """
    waits = iter(WAITS)
    while True:
        try:
            return ask()
        except Exception as error:  # each library has its own
            if (error_to_raise := _final_error(path, error)) is not None:
                raise error_to_raise from error
            told = f"{type(error).__name__}: {error}"
            wait = next(waits, None)
            if wait is None:
                raise DataError(
                    f"{path!r} could not be read in {len(WAITS) + 1} tries over {sum(WAITS):.0f} s "
                    f"({told}): see that its store answers, then go on with resume=auto"
                ) from error
            wait *= 0.75 + 0.5 * _jitter.random()
            log.warning("%s: %s; asked again in %.1f s", path, told, wait)
            time.sleep(wait)


def status(path: str) -> Status:
    """Raises OSError where the file is not there, DataError where the store fails."""
    fs, inner = filesystem(path)
    with _sound(path):
        size = patiently(path, lambda: fs.size(inner))
    if size is None:
        raise DataError(
            f"{path!r} is of no known size: its server sends no Content-Length; use one that does, "
            "or a local copy"
        )
    try:
        modified = patiently(path, lambda: fs.modified(inner).timestamp())
    except (NotImplementedError, KeyError, AttributeError):
        modified = None
    return Status(int(size), modified)


def read_all(path: str) -> bytes:
    fs, inner = filesystem(path)
    return patiently(path, lambda: fs.cat_file(inner))


def is_folder(path: str) -> bool:
    """False also where the store does not let its folders be listed."""
    fs, inner = filesystem(path)
    with suppress(PermissionError), _sound(path):
        return patiently(path, lambda: fs.isdir(inner))
    return False


def _found(path: str, find: Callable[[Any, str], list[str]]) -> list[str]:
    fs, inner = filesystem(path)
    try:
        with _sound(path):
            return [fs.unstrip_protocol(each) for each in patiently(path, lambda: find(fs, inner))]
    except PermissionError as error:
        raise DataError(
            f"{path!r} may not be listed: name its files by a range, as in x-{{000..099}}.tar"
        ) from error


def matching(pattern: str) -> list[str]:
    """The URLs that a pattern with wildcards matches."""
    return _found(pattern, lambda fs, inner: fs.glob(inner))


def listed(folder: str) -> list[str]:
    """The URLs directly in a folder."""
    return _found(folder, lambda fs, inner: fs.ls(inner, detail=False))


class Remote:
    """A file at a URL, read at any place."""

    def __init__(self, path: str):
        self.path = path
        self.fs, self.inner = filesystem(path)

    def read(self, offset: int, size: int) -> bytes:
        """size bytes from offset on; fewer where the file ends.

        Raises OSError for a file that is not there; DataError where the store fails, or sends more
        than was asked for.
        """
        end = offset + size
        try:
            data = patiently(self.path, lambda: self.fs.cat_file(self.inner, start=offset, end=end))
        except EOFError:
            return b""
        if len(data) > size:
            raise DataError(
                f"{self.path!r} was asked for {size} bytes and sent {len(data)}: its server does "
                "not serve parts of files (Range requests); use one that does, or a local copy"
            )
        return data
