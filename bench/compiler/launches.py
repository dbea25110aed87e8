"""Every launch of the benchmark's kernels and losses, specialized as on a GPU, without one.

    python -m fastssl.bench.compiler.launches                      on sm_80, sm_90 and sm_100
    python -m fastssl.bench.compiler.launches clip --target sm_90 --machine-code

Each case is called at its shapes for a GPU, and at an odd one, forward and backward, on tensors
that hold nothing (recording.py).  Each different kernel that this would launch is put through
Triton's front end, with --machine-code through all of the compiler, where it must not spill nor ask
for more memory than the chip has.  What waits for the GPU, and a grid that none takes, fail too.

The exit status is 1 when something failed, and 2 when the command could not be understood.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from fnmatch import fnmatchcase
from multiprocessing import get_context
from typing import NamedTuple

import torch

from fastssl.bench.cases import select
from fastssl.bench.compiler import aot
from fastssl.bench.compiler.recording import Launch, compile_launch, lower, recorded
from fastssl.bench.measure.gate import step
from fastssl.bench.registry import APART, OURS, Absent, Case, Shape
from fastssl.kernels.common.gpu import Gpu

PROGRAM = "python -m fastssl.bench.compiler.launches"
GPUS = {"sm_80": Gpu("sm_80", 108), "sm_90": Gpu("sm_90", 132), "sm_100": Gpu("sm_100", 148)}
SPILL = 32  # bytes a thread, at an uneven shape: there loads go number by number, to more registers
UNEVEN = frozenset("BDGHLMN")  # sides of a shape that need not be divisible by anything


class Task(NamedTuple):
    """What a process does at a time, by names."""

    case: str
    dtype: str
    target: str
    machine_code: bool
    quick: bool


class Outcome(NamedTuple):
    """Of a task: the keys of its launches, lines to print, and how many of them failed."""

    keys: frozenset[str]
    lines: tuple[str, ...]
    failed: int


def shapes_of(case: Case, quick: bool) -> list[Shape]:
    """Those for a GPU, or with `quick` the first, and one whose sides are divisible by nothing."""
    shapes = case.shapes["cuda"][: 1 if quick else None]
    few = case.gate(shapes[0], torch.device("cpu"))
    return [*shapes, {side: size + (side in UNEVEN) for side, size in few.items()}]


def launches_of(case: Case, shape: Shape, dtype: torch.dtype, gpu: Gpu) -> dict[str, Launch]:
    """What a forward and a backward of ours launch; none where ours is not installed."""
    with recorded(gpu) as launches:
        torch.manual_seed(0)
        problem = case.make(dict(shape), dtype, torch.device("cpu"))
        ours = problem.rivals[OURS]
        if not isinstance(ours, Absent):
            step(ours, problem.inputs)
    return launches


def examine(launch: Launch, target: str, machine_code: bool, spare: int) -> list[str]:
    """What is wrong with a launch, each in a line.  spare: bytes that it may spill."""
    try:
        if not machine_code:
            lower(launch, GPUS[target])
            return []
        facts = aot.read(compile_launch(launch, GPUS[target]))
    except OSError:
        raise
    except Exception as error:  # the compiler raises what it likes: all of it is a verdict
        lines = [line for line in str(error).splitlines() if line.strip()][-12:]
        return ["\n    ".join([f"does not compile: {type(error).__name__}", *lines])]
    return [*aot.scarcities(facts, target, spare)]


def run(task: Task) -> Outcome:
    """All launches of a case, each different one once."""
    (case,) = select([task.case])
    known: dict[str, Launch] = {}
    lines: list[str] = []
    shapes = shapes_of(case, task.quick)
    for shape in shapes:
        sides = "x".join(map(str, shape.values()))
        what = f"{task.case} {sides} {task.dtype} {task.target}"
        try:
            found = launches_of(case, shape, getattr(torch, task.dtype), GPUS[task.target])
        except Exception as error:
            lines.append(f"FAILED {what}: {type(error).__name__}: {error}")
            continue
        for key, launch in found.items():
            if key not in known:
                known[key] = launch
                spare = SPILL if shape is shapes[-1] else 0
                wrong = examine(launch, task.target, task.machine_code, spare)
                lines += [f"FAILED {what}, {launch.name}: {fault}" for fault in wrong]
    failed = len(lines)
    names = sorted({launch.name for launch in known.values()})
    lines += [f"{task.case} {task.dtype} {task.target}: {len(known)} of {', '.join(names)}"]
    return Outcome(frozenset(known), tuple(lines), failed)


def run_all(tasks: Sequence[Task], jobs: int) -> Iterator[Outcome]:
    """The outcomes in order: here for one job, else from that many processes."""
    if jobs == 1:
        yield from map(run, tasks)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        yield from pool.map(run, tasks)


def plan(patterns: Iterable[str], dtype: str, targets: Sequence[str], *how: bool) -> list[Task]:
    """Every case of kernels and losses that is asked for, in each of its dtypes.

    how: machine_code and quick, as in Task.
    Raises ValueError for a pattern that matches nothing.
    """
    cases = [c for c in select(patterns) if not any(fnmatchcase(c.name, p) for p in APART)]
    return [
        Task(case.name, each, target, *how)
        for target in targets
        for case in cases
        for each in case.dtypes
        if fnmatchcase(each, dtype)
    ]


def _parser() -> argparse.ArgumentParser:
    first, _, rest = (__doc__ or "").partition("\n\n")
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(PROGRAM, None, first, rest, formatter_class=plain)
    known, add = list(GPUS), parser.add_argument
    add("case", nargs="*", help="which cases, by name or pattern; all")
    add("--dtype", default="*", metavar="PATTERN", help="which dtypes, by name")
    add("--target", nargs="+", choices=known, default=known, help="chips")
    add("--machine-code", action="store_true", help="compile to the end, and look at the result")
    add("--quick", action="store_true", help="the first of a case's shapes, and the odd one")
    add("--jobs", type=int, default=2, help="processes (2)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        aot.choose_kernels("*", None, PROGRAM)
        tasks = plan(args.case, args.dtype, args.target, args.machine_code, args.quick)
    except ValueError as error:
        parser.error(str(error))
    start, failed, keys = time.perf_counter(), 0, set()
    for task, outcome in zip(tasks, run_all(tasks, args.jobs), strict=True):
        print(*outcome.lines, sep="\n", flush=True)
        keys |= {(task.target, key) for key in outcome.keys}
        failed += outcome.failed
    print(f"{len(keys)} launches, {failed} failed, {time.perf_counter() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
