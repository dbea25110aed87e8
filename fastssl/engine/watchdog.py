"""Where a process stands in its run, and what is said of ranks that no longer move.

The loop and the engine say where they are and that they move (`heart`); the thread that watches
over the ranks (peers.py) asks.  A run hangs where no rank has moved for `engine.watchdog` seconds:
one that still does keeps all others patient.  What takes as long as it takes, an evaluation, a
checkpoint, the first step's compilation, is not watched.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

DATA, STEP, SAVING = "waiting for data", "in the step", "saving, after data did not come"
EXIT = 6
_GAP = 10.0  # seconds without a look at the clock: the process was stopped, or the machine asleep
_MOST = 8  # hosts that are named
_LEAST_SAVE = 600.0  # seconds that a save may take after the data have stalled
_ELSEWHERE = (  # where a thread waits for others -> in words
    ("torch/distributed/", "in a collective"),
    ("deepspeed/comm/", "in a collective"),
    ("torch/cuda/streams.py", "waiting for the device, as in a collective"),
)


class Stalled(RuntimeError):
    """Nothing has moved for engine.watchdog seconds: says who waits for what."""

    exit_code, on_every_rank = EXIT, True


class Heart:
    """Where this process is: `place`, "" where it is not watched, of the step under way."""

    def __init__(self) -> None:
        self.limit, self.place, self.step, self.beats = 0.0, "", 0, 0
        self.since = self.looked = 0.0
        self.asked_to_stop = False  # this rank, or another one
        self.thread = 0

    @contextlib.contextmanager
    def watched(self, limit: float) -> Iterator[None]:
        """Inside, places count; limit: seconds, 0 for none."""
        self.asked_to_stop, self.thread = False, threading.get_ident()
        self.place, self.limit = "", limit
        try:
            yield
        finally:
            self.place, self.limit, self.asked_to_stop = "", 0.0, False

    def at(self, place: str, step: int) -> None:
        """This process has come to a place of step `step`."""
        self.beats, self.step = 0, step
        self.since = self.looked = time.monotonic()
        self.place = place

    def beat(self) -> None:
        """It moves."""
        self.beats += 1
        self.since = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, it takes as long as it takes."""
        place, self.place = self.place, ""
        try:
            yield
        finally:
            self.at(place, self.step)

    def idle(self) -> float:
        """Seconds for which it has not moved, less those in which the process was stopped."""
        now = time.monotonic()
        if now - self.looked > _GAP:
            self.since += now - self.looked
        self.looked = now
        return now - self.since if self.place and self.limit else 0.0

    def starved(self) -> bool:
        """Whether it has waited for data for too long: the loop saves and leaves."""
        return self.place == DATA and self.idle() > self.limit > 0

    def late(self) -> bool:
        """Whether it hangs.  Who waits for data may still leave by itself, and save."""
        allowed = {DATA: 2 * self.limit, SAVING: max(self.limit, _LEAST_SAVE)}
        return self.idle() > allowed.get(self.place, self.limit) > 0

    def status(self) -> dict[str, Any]:
        """What a rank tells of itself: JSON."""
        waits = _elsewhere(self.thread) if self.place == STEP else ""
        where = {"place": waits or self.place, "waits": bool(waits), "idle": self.idle()}
        return {"step": self.step, "beats": self.beats, "late": self.late(), **where}


heart = Heart()


def _elsewhere(thread: int) -> str:
    """In which collective a thread is, in words; empty where it is in none."""
    frame, found = sys._current_frames().get(thread), ""
    while frame is not None:
        name = frame.f_code.co_name
        for part, words in _ELSEWHERE:
            if part in frame.f_code.co_filename and not (found and "wrapper" in name):
                found = f"{words} ({name})"
        frame = frame.f_back
    return found


def verdict(ranks: dict[int, dict[str, Any] | None], limit: float, hosts: dict[int, str]) -> str:
    """Who holds the run up, of each rank's `Heart.status`, None where it did not answer.

    hosts: of the ranks, as far as they are known.
    """
    silent = [rank for rank, said in ranks.items() if said is None]
    heard = {rank: said for rank, said in ranks.items() if said is not None}
    busy = [rank for rank, said in heard.items() if not said["waits"]]
    behind = min((said["step"], said["beats"]) for said in heard.values())
    slow = [rank for rank, said in heard.items() if (said["step"], said["beats"]) == behind]
    if silent:
        what = f"{_named(silent, hosts)} does not answer: its process or its machine hangs"
    elif len(heard) == 1:
        what = _where(next(iter(heard.values())))
    elif busy and len(busy) < len(heard):
        what = f"{_named(busy, hosts)} is {_where(heard[busy[0]])}, and the others wait for it"
    elif len(slow) < len(heard):
        what = f"{_named(slow, hosts)} is behind, {_where(heard[slow[0]])}"
    else:
        what = f"every rank is {_where(heard[min(heard)])}"
    return (
        f"nothing has moved for {limit:g} s (engine.watchdog): {what}; a step that hangs cannot be "
        "left, so that nothing is saved: resume=auto goes on from the last checkpoint"
    )


def _named(ranks: list[int], hosts: dict[int, str]) -> str:
    names = [*dict.fromkeys(hosts[rank] for rank in ranks if rank in hosts)]
    on = f" on {', '.join(names[:_MOST])}{' and others' * (len(names) > _MOST)}" if names else ""
    return (f"rank {ranks[0]}" if len(ranks) == 1 else f"one of the ranks {ranks}") + on


def _where(said: dict[str, Any]) -> str:
    return f"{said['place']} (step {said['step']})"


def end(rank: int, sentence: str) -> None:
    """Say it, show what every thread of this process is at, and end with EXIT.

    Its readers go as well: one that hangs would hold the run's lock.
    """
    said, who = heart.status(), f"rank {rank} on {socket.gethostname()}"
    here = f"{who} is {_where(said)} and has not moved for {said['idle']:.0f} s"
    os.write(2, f"fastssl, rank {rank}: {sentence}\n{here}; its threads:\n".encode())
    faulthandler.dump_traceback(2, all_threads=True)
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(EXIT)
