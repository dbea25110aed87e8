"""The parent's side: children at once, each started again after the case that ended it.

A child ends early when a case loses it the GPU's context (it says so itself), kills it without a
word (a segmentation fault), or keeps it silent beyond its patience (a kernel that never ends: then
it is killed).  Its next process goes on after that case, whose line the parent writes where the
child could not.  Nobody is waited for beyond `end`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from fastssl.bench.gpu import lines
from fastssl.bench.gpu.watched import CHILD, SKIP

LEAST_S = 8.0  # with less left, nothing is started: a child takes as long to come up
POLL_S = 0.05
MOST_SAID = 1 << 18  # last bytes of what a process printed that are kept
COME_UP_S = 90.0  # for a process that imports, as many others may beside it
QUIT_S = 10.0  # for a process that has done all
TRIES = 2  # of a child that ends without having begun a case
Judge = Callable[[str, "int | None"], "Mapping[str, Any] | None"]


@dataclass(frozen=True)
class Child:
    """A command whose process is watched (watched.py, or plugin.py in pytest).

    patience  seconds without a line after which it is taken to hang.
    missing   why it cannot run here; "" when it can.
    judge     (what a process of it printed, its exit code) -> fields of a line, or None; one with
              `refused` says why the command cannot do its work here, and it is not started again.
    """

    name: str
    argv: tuple[str, ...]
    patience: float = 60.0
    env: Mapping[str, str] = field(default_factory=dict)
    missing: str = ""
    judge: Judge | None = None


@dataclass
class Record:
    """Where lines go, all that children print, and when the command began (time.time())."""

    path: Path
    log: Path
    began: float

    def write(self, child: str, kind: str, **fields: Any) -> None:
        """Add a line on behalf of a child, or of the parent itself."""
        lines.write(self.path, child, kind, self.began, **fields)


class _Running:
    """A child's present process, and how far it has come."""

    def __init__(self, child: Child, record: Record) -> None:
        self.child, self.record = child, record
        self.names: list[str] | None = None  # until it has told its plan
        self.next, self.tries, self.lost = 0, 0, False
        self.tail = lines.Tail(record.path)
        self.tail.new()
        self.start()

    def start(self) -> None:
        """A process that skips what is done."""
        self.output: IO[bytes] = tempfile.TemporaryFile()
        self.tries, self.lost, self.heard = self.tries + 1, False, time.monotonic()
        told = {
            lines.PATH: str(self.record.path),
            lines.BEGAN: str(self.record.began),
            CHILD: self.child.name,
            SKIP: str(self.next),
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
        }
        try:
            self.process = subprocess.Popen(
                self.child.argv,
                stdin=subprocess.DEVNULL,
                stdout=self.output,
                stderr=subprocess.STDOUT,
                preexec_fn=_lead,
                env={**os.environ, **told, **self.child.env},
            )
        except OSError:
            self.output.close()
            raise

    def listen(self) -> None:
        """Take note of the lines that have come."""
        for line in self.tail.new():
            if line["child"] != self.child.name:
                continue
            self.heard = time.monotonic()
            if line["kind"] == "plan":
                self.names = line["names"]
            elif line["kind"] == "case" and "n" in line:
                self.next, self.tries, self.lost = line["n"] + 1, 0, bool(line.get("lost"))

    @property
    def done(self) -> bool:
        """Whether every case has its line."""
        return self.names is not None and self.next >= len(self.names)

    @property
    def patience(self) -> float:
        """Seconds of silence until it is taken to hang: longer while it imports."""
        if self.names is None:
            return max(self.child.patience, COME_UP_S)
        return QUIT_S if self.done else self.child.patience

    def finish(self, why: str) -> str:
        """End the process, keep what it printed, and return that."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # also what it has started
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(2.0)  # one that hangs in the driver is left to itself
        self.listen()
        size = self.output.seek(0, os.SEEK_END)
        self.output.seek(max(0, size - MOST_SAID))
        said = self.output.read().decode(errors="replace")
        self.output.close()
        with self.record.log.open("a", encoding="utf-8") as log:
            log.write(f"\n==== {self.child.name}: {why or 'ended'}\n$ {self.command}\n{said}")
        return said

    @property
    def command(self) -> str:
        return " ".join(self.child.argv)

    def blame(self, why: str, seconds: float) -> None:
        """Write the line that the child could not write, of the case that ended it."""
        begun = self.names is not None
        case = self.names[self.next] if self.names else f"{self.child.name}, its first steps"
        fields = {"n": self.next} if begun else {}
        s = round(seconds, 2)
        self.record.write(self.child.name, "case", case=case, ok=False, s=s, why=why, **fields)
        if begun:
            self.next, self.tries = self.next + 1, 0

    def step(self, end: float) -> bool:
        """Look at the child once; whether it is over."""
        self.listen()
        now, code = time.monotonic(), self.process.poll()
        silent, late = now - self.heard, now >= end
        if code is None and not late and silent <= self.patience:
            return False
        words = "no time left" if late else "done" if self.done else "silent"
        words = words if code is None else _ending(code)
        said = self.finish(words)
        verdict = self.child.judge(said, code) if self.child.judge and not late else None
        refused = bool(verdict) and "refused" in verdict
        if verdict:
            self.record.write(self.child.name, "note" if refused else "case", **verdict)
        if refused or self.done or (late and code is None):
            return True
        if code is None:
            self.blame(f"silent for {silent:.0f} s, then killed; {_last(said)}", silent)
        elif not self.lost:
            self.blame(f"the process ended, {words}; {_last(said)}", silent)
        if self.done or self.tries >= TRIES or end - time.monotonic() < LEAST_S:
            return True
        try:
            self.start()
        except OSError:  # no memory for a process: what is left is said to be left
            return True
        return False

    def close(self) -> None:
        """Say what was not reached."""
        if left := [self.child.name] if self.names is None else self.names[self.next :]:
            self.record.write(self.child.name, "left", names=left)


def _lead() -> None:
    """A group of its own, to be ended with all that it starts; interrupts are heard again."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        return f"signal {signal.Signals(-code).name}"
    return f"signal {-code}"


def _last(said: str) -> str:
    """The words of a process that say most: of an error's type, else the last."""
    found = [line.strip() for line in said.splitlines() if line.strip()]
    telling = [line for line in found if "Error" in line or "Fatal" in line]
    return (telling or found or ["it printed nothing"])[-1][:200]


def run_children(
    children: Sequence[Child], end: float, record: Record, show: Callable[[list], None]
) -> None:
    """Run them all at once until `end` (time.monotonic()); their lines are recorded, and shown."""
    running, tail = [], lines.Tail(record.path)
    tail.new()
    for child in children:
        if child.missing:
            record.write(child.name, "note", refused=child.missing)
        elif end - time.monotonic() < LEAST_S:
            record.write(child.name, "left", names=[child.name])
        else:
            try:
                running.append(_Running(child, record))
            except OSError as error:
                record.write(child.name, "case", case=child.name, ok=False, s=0, why=str(error))
    try:
        while running:
            for one in [one for one in running if one.step(end)]:
                one.close()
                running.remove(one)
            show(tail.new())
            time.sleep(POLL_S)
        show(tail.new())
    finally:  # also when interrupted: nobody is left behind
        for one in running:
            one.finish("interrupted")


def python(*words: str) -> tuple[str, ...]:
    """A command line of this interpreter."""
    return (sys.executable, *words)
