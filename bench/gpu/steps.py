"""Commands run one after another, each within its time and all within one end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

LEAST_S = 15.0  # with less left, a step is not begun
GRACE_S = 10.0  # from the interrupt to the kill
KEPT = 4000  # last lines of a step's output that are looked at
OK, FAILED, CUT, NOT_RUN = "passed", "failed", "cut short", "not run"
Ending = tuple[int | None, list[str], float]  # exit code (None: stopped), lines, seconds
Runner = Callable[[Sequence[str], float, Mapping[str, str]], Ending]
Judge = Callable[[int | None, Sequence[str]], tuple[str, str]]


def judge_exit(code: int | None, lines: Sequence[str]) -> tuple[str, str]:
    """(status, note) of a command of which nothing is known but its exit code."""
    if code is None:
        return CUT, ""
    last = next((line for line in reversed(lines) if line.strip()), "")
    return (OK, "") if code == 0 else (FAILED, f"exit code {code}: {last.strip()[:200]}")


def judge_pytest(code: int | None, lines: Sequence[str]) -> tuple[str, str]:
    """pytest's own last line is the note."""
    pattern = re.compile(r"\b\d+ (passed|failed|errors?|skipped|deselected)\b.* in [\d.]+s")
    last = next((line for line in reversed(lines) if pattern.search(line)), "")
    status, note = judge_exit(code, lines)
    return status, last.strip("= ") or note


def judge_sanitizer(code: int | None, lines: Sequence[str]) -> tuple[str, str]:
    """Only its own summary, of no errors, is a pass; a GPU it cannot watch is a tool not run."""
    if code is None:
        return CUT, ""
    text = "\n".join(lines)
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", text)
    if summaries:
        errors = [int(n) for line in summaries for n in re.findall(r"(\d+) errors?\b", line)]
        clean = code == 0 and errors and not any(errors)
        return OK if clean else FAILED, summaries[-1].strip()
    if re.search(r"(?i)device not supported", text):
        return NOT_RUN, "compute-sanitizer does not support this machine's GPU"
    return FAILED, f"no summary, {judge_exit(code, lines)[1] or 'exit code 0'}"


@dataclass(frozen=True)
class Step:
    """A command of a slice.

    most     seconds it may take, however many are left.
    env      what its environment has beside this process's.
    judge    (exit code, its last lines) -> (status, a note of a few words).
    missing  why it cannot be run here; "" when it can.
    """

    name: str
    argv: tuple[str, ...]
    most: float
    env: Mapping[str, str] = field(default_factory=dict)
    judge: Judge = judge_exit
    missing: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a step: passed, failed, cut short or not run; `tail`: its last lines, unless
    it passed."""

    name: str
    status: str
    seconds: float
    note: str = ""
    argv: tuple[str, ...] = ()
    tail: tuple[str, ...] = ()


def run_steps(
    steps: Sequence[Step],
    end: float,
    *,
    run: Runner | None = None,
    clock: Callable[[], float] = time.monotonic,
    after: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Run the steps in order, none beyond `end` (seconds of `clock`); `after` sees each outcome.

    A step is told to stop GRACE_S before the end, and is not begun with less than LEAST_S left.
    """
    done = []
    for step in steps:
        left = min(step.most, end - clock() - GRACE_S)
        if step.missing:
            outcome = Outcome(step.name, NOT_RUN, 0.0, step.missing, step.argv)
        elif left < LEAST_S:
            outcome = Outcome(step.name, NOT_RUN, 0.0, "no time left", step.argv)
        else:
            code, lines, seconds = (run or run_command)(step.argv, left, step.env)
            status, note = step.judge(code, lines)
            tail = () if status == OK else tuple(lines[-40:])
            outcome = Outcome(step.name, status, round(seconds, 1), note, step.argv, tail)
        done.append(outcome)
        after(outcome)
    return done


def run_command(argv: Sequence[str], seconds: float, env: Mapping[str, str]) -> Ending:
    """Run a command, its output going on to this process's as it comes.

    After `seconds` it is interrupted, as by a keyboard, so that it can say how far it came; what
    still runs GRACE_S later is killed, with all that it has started.
    """
    print(f"\n$ {' '.join(argv)}", flush=True)
    start, lines = time.monotonic(), deque(maxlen=KEPT)
    process = subprocess.Popen(
        argv,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=_interruptible,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **env},
    )
    assert process.stdout is not None
    reader = threading.Thread(target=_pass_on, args=(process.stdout, lines), daemon=True)
    reader.start()
    code: int | None = None
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        _signal(process, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    finally:
        _signal(process, signal.SIGKILL)  # also what it left behind
        process.wait()
        reader.join(2.0)
        if not reader.is_alive():  # else somebody of another session holds the other end
            process.stdout.close()
    return code, list(lines), time.monotonic() - start


def _interruptible() -> None:
    """What a shell starts in the background ignores interrupts, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _pass_on(stream: IO[str], lines: deque[str]) -> None:
    for line in stream:
        lines.append(line.rstrip("\n"))
        sys.stdout.write(line)
        sys.stdout.flush()


def _signal(process: subprocess.Popen, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def table(outcomes: Sequence[Outcome]) -> str:
    """A line for each step.

    >>> print(table([Outcome("memcheck", "passed", 41.25, "0 errors")]))
    memcheck  passed       41.2 s  0 errors
    """
    width = max((len(o.name) for o in outcomes), default=0)
    return "\n".join(
        f"{o.name:{width}}  {o.status:9}  {o.seconds:6.1f} s  {o.note}".rstrip() for o in outcomes
    )


def fresh_lines(path: Path) -> list[str]:
    """The whole lines of a file that a stopped command may have left unfinished; [] without one."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    return text[: text.rfind("\n") + 1].splitlines()
