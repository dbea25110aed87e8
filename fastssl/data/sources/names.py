"""Many names, kept small."""

import os
from array import array
from collections.abc import Iterable
from typing import overload

import numpy as np


def printable(name: str) -> str:
    """A file's name as text: bytes that are no UTF-8 are written out.

    >>> printable(os.fsdecode(b"caf\\xe9"))
    'caf\\\\xe9'
    """
    return os.fsencode(name).decode(errors="backslashreplace")


class Names:
    """Many strings as one block of bytes.

    A list of a million str costs some 100 MB, and each worker ends up with a copy of its own, since
    counting references writes to every object.
    """

    def __init__(self, names: Iterable[str]):
        joined, ends = bytearray(), array("q", [0])
        for name in names:
            joined += os.fsencode(name)
            ends.append(len(joined))
        self._bytes, self._ends = np.frombuffer(bytes(joined), np.uint8), np.frombuffer(ends, "i8")

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: np.ndarray) -> "Names": ...

    def __getitem__(self, i: int | np.ndarray) -> "str | Names":
        """String i; or those at the indices i (int64), in that order."""
        if isinstance(i, np.ndarray):
            return Names(self[k] for k in i.tolist())
        i = i + len(self) if i < 0 else i
        return os.fsdecode(self._bytes[self._ends[i] : self._ends[i + 1]].tobytes())
