"""Peak memory of one call on a CPU: the high-water mark of a process of its own.

torch's CPU allocator keeps no count, so the operating system's is read: a child process builds the
inputs, sets its high-water mark back (Linux: /proc/self/clear_refs), makes the call, and reports
how far the mark rose.  The child may use the memory that is free and no more: a rival that wants
more fails there, in its own process, and nothing else does.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from fastssl.bench.measure.gate import step
from fastssl.bench.registry import Absent, Make, Problem, Rival, Shape

SPARE = 1 << 30  # bytes left to everybody else
CHILD_LIMIT_S = 300.0
# Imported once, before the children fork; what is not installed is passed over.  The cases add
# themselves.
PRELOAD = ["torch", "fastssl.losses", "fastssl.bench.measure.gate", "fastssl.methods"]
PRELOAD += ["lightly.loss", "open_clip.loss", "pytorch_metric_learning.losses"]


@dataclass(frozen=True)
class Peak:
    """Bytes the call held at most beyond what was held before it; or why there is no figure."""

    extra: int | None = None
    status: str = "ok"  # or "failed", "out of memory"
    why: str = ""


def peaks_in_child(
    make: Make, shape: Shape, dtype: torch.dtype, rivals: Sequence[str], *, threads: int
) -> dict[str, Peak]:
    """Peak memory of one call of each rival on the CPU, one after another in one child process.

    `make` must be importable by its name.  When a rival takes the process down with it, another one
    goes on with the rest.
    """
    peaks: dict[str, Peak] = {}
    while left := [name for name in rivals if name not in peaks]:
        peaks |= _peaks(make, shape, dtype, left, threads)
    return peaks


def _peaks(
    make: Make, shape: Shape, dtype: torch.dtype, rivals: Sequence[str], threads: int
) -> dict[str, Peak]:
    """What one child finds, up to the first rival that it does not outlive."""
    context = forkserver()
    here, there = context.Pipe(duplex=False)
    name = str(dtype).removeprefix("torch.")
    child = context.Process(target=_child, args=(there, make, shape, name, rivals, threads))
    child.start()
    there.close()
    peaks: dict[str, Peak] = {}
    try:
        for rival in rivals:
            if not here.poll(CHILD_LIMIT_S):
                child.kill()
                peaks[rival] = Peak(None, "failed", f"no answer in {CHILD_LIMIT_S:.0f} s")
                break
            peaks[rival] = here.recv()
    except EOFError:
        child.join()
        peaks[rivals[len(peaks)]] = _explain_exit(child.exitcode)
    finally:
        child.join()
        here.close()
    return peaks


def forkserver() -> Any:
    """Where processes start quickly: forked from one that has imported PRELOAD, and no CUDA."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def _explain_exit(code: int | None) -> Peak:
    if code == -9:
        return Peak(None, "out of memory", "killed by the operating system")
    return Peak(None, "failed", f"the process ended with exit code {code}")


def _child(
    pipe: Connection, make: Make, shape: Shape, dtype: str, rivals: Sequence[str], threads: int
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    try:
        problem = make(shape, getattr(torch, dtype), torch.device("cpu"))
    except Exception as error:
        for _ in rivals:
            pipe.send(explain_failure(error))
        return
    limit_memory(free_bytes() - SPARE)
    for name in rivals:
        run = problem.rivals[name]
        pipe.send(Peak(None, "absent", run.why) if isinstance(run, Absent) else _peak(run, problem))


def _peak(rival: Rival, problem: Problem) -> Peak:
    try:
        step(rival, problem.inputs)  # what the first call sets up for good is not the step's
        _settle()
        before = _status("VmRSS")
        step(rival, problem.inputs)
        return Peak(max(0, _status("VmHWM") - before))
    except Exception as error:
        return explain_failure(error)


def explain_failure(error: Exception) -> Peak:
    """What an exception of a rival means: out of memory, or failed with its first line."""
    text = (str(error).strip().splitlines() or [""])[0][:160]
    name = type(error).__name__
    memory = isinstance(error, MemoryError | torch.cuda.OutOfMemoryError)
    if memory or "can't allocate memory" in str(error) or "out of memory" in str(error).lower():
        return Peak(None, "out of memory", text)
    return Peak(None, "failed", f"{name}: {text}" if text else name)


def free_bytes() -> int:
    """What the machine, or the container, can still give."""
    if sys.platform != "linux":
        return 1 << 40
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(x.split()[1]) << 10 for x in lines if x.startswith("MemAvailable"))
    limit, used = (_cgroup(name) for name in ("memory.max", "memory.current"))
    return free if limit is None or used is None else min(free, limit - used)


def _cgroup(name: str) -> int | None:
    try:
        return int((Path("/sys/fs/cgroup") / name).read_text())
    except (OSError, ValueError):  # no cgroup, or "max"
        return None


def limit_memory(extra: int) -> None:
    """Let this process allocate `extra` bytes from here on, and refuse it more."""
    if sys.platform == "linux":
        limit = _status("VmData") + max(extra, 0)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))


def _settle() -> None:
    """Give back what building the inputs left over, and set the high-water mark back."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    if sys.platform != "linux":  # bytes on macOS, and the mark of the whole process at that
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) << 10 for x in lines if x.startswith(field + ":"))
