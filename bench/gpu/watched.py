"""A child's side: its cases one after another, a line for each, and no case after a lost context.

An illegal address leaves the GPU's context of a process in an error that stays: all that it does
afterwards fails as well, and proves nothing.  The process ends at once with LOST, and its parent
(children.py) starts it again after that case.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastssl.bench.gpu import carried, lines

CHILD, SKIP = "FASTSSL_GPU_CHILD", "FASTSSL_GPU_SKIP"  # told by the parent
REHEARSAL = "FASTSSL_GPU_REHEARSAL"  # on a CPU, at tiny shapes
LOST = 86  # exit code
MOST_KEPT = 4 << 30  # bytes
STICKY = ("illegal", "misaligned", "launch failure", "device-side assert", "launch timed out")
STICKY += ("hardware", "uncorrectable", "context is destroyed", "unspecified", "MMU")
Case = tuple[str, Callable[[], "Mapping[str, Any] | None"]]


def rehearsing() -> bool:
    """Whether there is no GPU, and all is done small on a CPU to prove how it is done."""
    return os.environ.get(REHEARSAL) == "1"


@dataclass(frozen=True)
class Watch:
    """What the parent told: where lines go, this child's name, and how many cases are done."""

    path: Path
    child: str
    began: float
    skip: int = 0

    @staticmethod
    def told() -> Watch:
        """From the environment; by hand, lines go to ./gpu.jsonl."""
        env = os.environ
        path = Path(env.get(lines.PATH) or "gpu.jsonl")
        began = float(env.get(lines.BEGAN) or time.time())
        return Watch(path, env.get(CHILD, "alone"), began, int(env.get(SKIP) or 0))

    def write(self, kind: str, **fields: Any) -> None:
        """Add a line of this child's."""
        lines.write(self.path, self.child, kind, self.began, **fields)

    def plan(self, names: Sequence[str]) -> None:
        """Tell what is going to be done, once what was compiled elsewhere is found."""
        self.write("plan", names=list(names), cache=carried.adopt())

    def end(
        self, n: int, case: str, s: float, error: BaseException | str | None, **found: Any
    ) -> None:
        """Write the line of a case that is over; where it lost the context, end this process."""
        why = error if isinstance(error, str) else describe(error) if error else ""
        lost = bool(error) and is_lost(why)
        fields = {"why": why} if why else {}
        fields |= {"lost": True} if lost else {}
        self.write("case", n=n, case=case, ok=not why, s=round(s, 2), **fields, **found)
        if lost:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(LOST)


def run(cases: Sequence[Case], watch: Watch | None = None) -> int:
    """Run the cases that are left; a case returns what it found, with `why` where that is wrong."""
    watch = watch or Watch.told()
    watch.plan([name for name, _ in cases])
    for n, (name, call) in enumerate(cases):
        if n < watch.skip:
            continue
        begun, found, error = time.monotonic(), {}, None
        try:
            found = dict(call() or {})
            settle()
        except Exception as raised:  # whatever it is, it is this case's
            error = raised
        why = found.pop("why", "") if error is None else error
        watch.end(n, name, time.monotonic() - begun, why or None, **found)
    return 0


def settle() -> None:
    """Until the GPU has done all that was launched: what went wrong in it is raised here.

    Memory that is kept for later is given back where it is much: others work beside this process.
    """
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        if torch.cuda.memory_reserved() > MOST_KEPT:
            torch.cuda.empty_cache()


def is_lost(why: str) -> bool:
    """Whether the context is gone: the error says so, or the GPU no longer answers."""
    if "CUDA error" in why and any(word in why for word in STICKY):
        return True
    try:
        settle()
    except Exception:
        return True
    return False


def describe(error: BaseException) -> str:
    """An error's type and its first lines that say something."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' | '.join(said[:3])}"[:500]


def share(text: str) -> tuple[int, int]:
    """ "2/8" is the third of eight.

    >>> share("2/8")
    (2, 8)
    """
    part, _, parts = text.partition("/")
    return int(part), int(parts)
