"""What a run tells: metrics.jsonl, one JSON object a line, and whoever watches it live.

{"kind": "train", "step", "epoch", "loss", "lr", "images_per_s", "data_wait", "grad_norm", ...}
{"kind": "eval",  "step", "epoch", "knn", "linear", "rankme", "uniformity", "alignment", ...}
{"kind": "event", "step", "what", "detail"}
A value that is not finite is null, and texts hold no control characters.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from fastssl.distributed import broadcast_object, gather_objects
from fastssl.files import printable, write_atomically
from fastssl.report import read_metrics


class Watch(Protocol):
    """Where live news goes: the command line's progress bar, or nowhere."""

    def say(self, text: str) -> None: ...
    def begin(self, total: int, done: int) -> None: ...
    def advance(self, step: int, row: dict[str, Any] | None) -> None: ...
    def end(self) -> None: ...


class Silent:
    """Watches nothing: other ranks than the first, and tests."""

    def say(self, text: str) -> None: ...
    def begin(self, total: int, done: int) -> None: ...
    def advance(self, step: int, row: dict[str, Any] | None) -> None: ...
    def end(self) -> None: ...


class LogError(RuntimeError):
    """The disk refuses the log, as it soon would the next checkpoint."""

    exit_code = 4  # raised by the first rank alone, or by all of them


class RunLog:
    """Appends to RUN/metrics.jsonl; `writing` is true on the first rank alone."""

    def __init__(self, run: Path, watch: Watch, *, writing: bool):
        self.path, self.watch, self.writing = run / "metrics.jsonl", watch, writing
        self.bad: dict[str, str] = {}

    def row(self, kind: str, step: int, **values: Any) -> dict[str, Any]:
        row = {"kind": kind, "step": step, **values}
        if self.writing:
            try:
                with open(self.path, "a") as file:
                    file.write(_line(row))
            except OSError as error:
                raise LogError(f"cannot write {self.path} at step {step}: {error}") from error
        return row

    def rows(self) -> list[dict[str, Any]]:
        """What was logged, as far as it can be read."""
        return read_metrics(self.path) if self.path.is_file() else []

    def sync(self, step: int) -> None:
        """Bring to the disk what was logged so far, as a checkpoint's run without it is none."""
        if not self.writing:
            return
        try:
            with open(self.path, "a") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise LogError(f"cannot write {self.path} at step {step}: {error}") from error

    def event(self, step: int, what: str, detail: str) -> None:
        self.row("event", step, what=what, detail=detail)
        self.watch.say(detail)

    def bad_images(self, step: int, found: list[tuple[str, str]]) -> None:
        """Count the unreadable images that any rank found, and name each once.  Collective."""
        for name, reason in (map(printable, e) for part in gather_objects(found) for e in part):
            if name not in self.bad:
                self.bad[name] = reason
                self.event(step, "bad_image", f"skipped {name}: {reason}")

    def cut(self, step: int) -> None:
        """Forget what was logged after `step`, which a resumed run does again."""
        rows = [row for row in self.rows() if row["step"] <= step]
        self.bad.clear()
        for row in rows:
            if row["kind"] == "event" and row["what"] == "bad_image":
                name, _, reason = row["detail"].removeprefix("skipped ").partition(": ")
                self.bad[name] = reason
        if self.writing:
            try:
                write_atomically(self.path, "".join(map(_line, rows)))
            except OSError as error:
                raise LogError(f"cannot write {self.path} at step {step}: {error}") from error


@contextlib.contextmanager
def first_rank_writes(sentence: str) -> Iterator[None]:
    """A disk that refuses the first rank is a LogError on every rank, not a hang on the others."""
    problem = ""
    try:
        yield
    except OSError as error:
        problem = f"{sentence}: {error}"
    problem = broadcast_object(problem)
    if problem:
        raise LogError(problem)


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """The same, with None for each number that is not finite, which JSON does not know."""
    broken = {k: None for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)}
    return values | broken


def _line(row: dict[str, Any]) -> str:
    return json.dumps(finite(row), allow_nan=False) + "\n"
