"""Files that are whole or absent, also after a power cut; and names that are safe to show."""

import os
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace the file `path` in one step; on return it is on the disk.

    Text is UTF-8; a file's name in it that is no Unicode is written with escapes.  Raises OSError,
    and what was there stays as it was.
    """
    if isinstance(content, str):
        content = content.encode("utf-8", "backslashreplace")
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Bring a file's content, or a directory's list of names, to the disk.  Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def printable(text: str, keep: str = "") -> str:
    r"""`text` with escapes for what a terminal would obey or could not show; `keep` stays.

    >>> printable("a\x1b[2Jb\n")
    'a\\x1b[2Jb\\n'
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )
