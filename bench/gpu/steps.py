"""The steps of the two commands: which children at once, and how much time others must be left.

A phase's `leave` is the share of the command's time that must be left when it ends: what comes
after it has that much at least, whatever hangs before.  What a phase does not use, the next may.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastssl.bench.gpu.children import Child, python
from fastssl.bench.gpu.watched import REHEARSAL

MINUTES = {"first": 8.0, "second": 4.5}
ROOM = "tests/gpu/test_"
CUDA_BIN = "/usr/local/cuda/bin"
PROFILED = "_fwd|_bwd|_summarize|_weigh"  # the functions of pairwise_lse's two schedules
FIGURES = (
    "Duration",
    "Throughput",
    "Registers Per",
    "Achieved Occupancy",
    "Shared Memory Per",
)


@dataclass(frozen=True)
class Phase:
    """Children that run at once."""

    children: tuple[Child, ...]
    leave: float


@dataclass(frozen=True)
class Maker:
    """Makes children for a GPU, or for its rehearsal, which has few cases of each kind."""

    rehearsal: bool = False

    @property
    def env(self) -> dict[str, str]:
        """What all of them are told."""
        one = {"OMP_NUM_THREADS": "1", REHEARSAL: "1", "TRITON_INTERPRET": "1"}
        return one if self.rehearsal else {"OMP_NUM_THREADS": "2"}

    def tests(self, name: str, path: str, parts: int, few: str) -> list[Child]:
        """pytest on these files, in shares.  Warnings are no errors: other versions have others."""
        parts, some = (1, ("-k", few)) if self.rehearsal else (parts, ())
        words = ("-m", "pytest", "-p", "fastssl.bench.gpu.plugin", "-p", "no:cacheprovider")
        words += ("-W", "default", "--tb=short", *some, path)
        missing = "" if Path(path).exists() else "run it from the root of the source tree"
        missing = missing or ("" if find_spec("pytest") else "pytest is not installed")
        return [
            Child(f"{name}-{i}", python(*words, "--share", f"{i}/{parts}"), 60, self.env, missing)
            for i in range(parts)
        ]

    def module(self, name: str, *words: str, patience: float = 60.0) -> Child:
        """A module of this package; by its first word."""
        module, *rest = words
        argv = python("-m", f"fastssl.bench.gpu.{module}", *rest)
        return Child(name, argv, patience, self.env)

    def sanitizers(self, tool: str, parts: int) -> list[Child]:
        """compute-sanitizer's tool over every Triton kernel; a rehearsal runs them unwatched."""
        parts = 1 if self.rehearsal else parts
        path = _tool("compute-sanitizer")
        options = (path or "", "--tool", tool, "--error-exitcode", "9", "--print-limit", "20")
        options += ("--target-processes", "application-only", "--launch-timeout", "60")
        options += ("--report-api-errors", "no")  # torch asks, and is refused
        missing = "" if path else "compute-sanitizer is not on PATH"
        missing = missing if Path("tests/gpu").is_dir() else "run it from the source tree's root"
        judge, env = judge_sanitizer, {**self.env, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        if self.rehearsal:
            options, missing, judge = (), "", None
        shares = [
            python("-m", "tests.gpu.sanitize", "--share", f"{i}/{parts}") for i in range(parts)
        ]
        return [
            Child(f"{tool}-{i}", (*options, *argv), 90, env, missing, judge)
            for i, argv in enumerate(shares)
        ]

    def profiler(self) -> Child:
        """ncu over the kernels of pairwise_lse's second call."""
        path = _tool("ncu")
        argv = (path or "ncu", "--set", "basic", "--clock-control", "none")
        argv += ("--kernel-name", f"regex:^({PROFILED})$", "--launch-count", "6")
        argv += python("-m", "fastssl.bench.gpu.times", "profile")
        missing = "" if path else "ncu is not on PATH"
        return Child("ncu", argv, 60, self.env, missing, judge_profiler)


def _tool(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), CUDA_BIN]))


def first(make: Maker, table: Path) -> list[Phase]:
    """Is it right, how fast is it, which configurations are faster, and how fast is it then."""
    workers = max(2, min(12, (os.cpu_count() or 4) - 2))
    check = make.tests("check", f"{ROOM}accuracy.py", workers, "chamfer or gather_bias")
    after = make.module("after", "times", "after", "--table", str(table))
    return [
        Phase(tuple(check), 0.58),
        Phase((make.module("before", "times", "before"),), 0.38),
        Phase((make.module("tune", "tuning", patience=40.0),), 0.17),
        Phase((after,), 0.01),
    ]


def second(make: Maker) -> list[Phase]:
    """How it is launched, 2^31 elements, memory; training; a profile; and with time the rest."""
    watched = make.tests("launch", f"{ROOM}launch.py", 4, "bits")
    watched += make.tests("large", f"{ROOM}large.py", 2, "similarities")
    watched += make.sanitizers("memcheck", 4)
    rest = make.tests("compile", f"{ROOM}compile.py", 4, "barlow")
    if not make.rehearsal:
        rest += make.sanitizers("racecheck", 4) + make.tests("kernels", "tests/kernels", 6, "")
    return [
        Phase(tuple(watched), 0.45),
        Phase((make.module("train", "train", patience=90.0),), 0.2),
        Phase((make.profiler(),), 0.08),
        Phase(tuple(rest), 0.01),
    ]


def judge_sanitizer(said: str, code: int | None) -> Mapping[str, Any] | None:
    """Only its own summary, of no errors, is a pass; a GPU it cannot watch is a tool not run."""
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", said)
    if not summaries and re.search(r"(?i)device not supported", said):
        return {"refused": "compute-sanitizer does not support this machine's GPU"}
    errors = [int(n) for line in summaries for n in re.findall(r"(\d+) errors?\b", line)]
    clean = code == 0 and bool(errors) and not any(errors)
    last = summaries[-1].strip() if summaries else f"no summary, exit code {code}"
    faults = re.findall(r"Invalid .*|Race reported.*", said)[:1]
    why = {} if clean else {"why": " | ".join([last, *faults])}
    return {"case": "the sanitizer's summary", "ok": clean, "s": 0, **why}


def judge_profiler(said: str, code: int | None) -> Mapping[str, Any] | None:
    """Its figures by kernel; where it may not read the counters it is a tool not run."""
    metrics = [
        " ".join(line.split())
        for line in said.splitlines()
        if any(word in line for word in FIGURES) or re.match(r"\s+\w+ \(\d+, \d+, \d+\)", line)
    ]
    if not metrics:
        errors = [line.strip() for line in said.splitlines() if "==ERROR==" in line]
        return {"refused": (errors or [f"ncu wrote no figures, exit code {code}"])[0][:120]}
    return {"case": "the profiler's figures", "ok": True, "s": 0, "metrics": metrics}
