"""What a loader's readers are at, written by them into memory that the main process sees.

A reader is a worker process, or with none the thread that reads.  A row is its process id, the
items that it has begun, and the one that it is at, -1 where it is between two.
"""

import faulthandler
import os
import signal
from contextlib import suppress
from multiprocessing.sharedctypes import RawArray

from torch.utils.data import get_worker_info

_PROCESS, _COUNT, _ITEM, _COLUMNS = 0, 1, 2, 3


class Readers:
    """The table, for `workers` processes, or for none."""

    def __init__(self, workers: int):
        self.workers = workers
        self.table = RawArray("q", _COLUMNS * max(workers, 1))

    def at(self, item: int) -> None:
        """In a reader: it begins an item, or with -1 has ended one."""
        info = get_worker_info()
        row = _COLUMNS * (0 if info is None else info.id % max(self.workers, 1))
        self.table[row + _PROCESS] = os.getpid()
        self.table[row + _COUNT] += item >= 0
        self.table[row + _ITEM] = item

    def count(self) -> int:
        """How many items have been begun: while it grows, they move."""
        return sum(self.table[_COUNT::_COLUMNS])

    def busy(self) -> list[tuple[int, int]]:
        """(process, item) of the readers that have begun an item and not ended it."""
        rows = zip(*(self.table[column::_COLUMNS] for column in range(_COLUMNS)), strict=True)
        return [(process, item) for process, count, item in rows if count and item >= 0]

    def show(self) -> None:
        """Let every busy reader write what it is at to standard error."""
        for process, _ in self.busy():
            if process == os.getpid():
                faulthandler.dump_traceback(2, all_threads=True)
            else:
                with suppress(OSError):
                    os.kill(process, signal.SIGUSR2)


def show_when_asked() -> None:
    """In a worker process: SIGUSR2 is the question."""
    faulthandler.register(signal.SIGUSR2, 2, all_threads=True)
