"""Everything that needs a GPU, in four slices that each end within some minutes.

    python -m fastssl.bench.gpu test     is it right: tests/kernels, tests/gpu, compute-sanitizer
    python -m fastssl.bench.gpu tune     which configurations are fastest, ready to be pasted
    python -m fastssl.bench.gpu bench    kernels, losses and data beside their rivals
    python -m fastssl.bench.gpu train    whole training steps
    python -m fastssl.bench.gpu all      the four, one after another
    python -m fastssl.bench.gpu summary  the tables of what is in --out, without a GPU

Each slice is a list of commands; what one of them writes before it is stopped is kept.  Files go,
named by date, GPU and theme, to --out: $OUT, or else bench/results/.  They are seven at most.
The exit code is 1 when a step failed or a test was cut short, 2 when there is no GPU to run on.
Run it from the root of the source tree.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from fnmatch import fnmatchcase
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastssl.bench.gpu.steps import (
    CUT,
    FAILED,
    NOT_RUN,
    Outcome,
    Runner,
    Step,
    fresh_lines,
    judge_exit,
    judge_pytest,
    judge_sanitizer,
    run_steps,
    table,
)
from fastssl.bench.registry import APART

SLICES = ("test", "tune", "bench", "train")
FIRST = ("ntxent", "clip", "barlow-twins", "mae")  # the cases people come for
DATA = ("data-jpeg-simclr", "data-jpeg-mae")  # by DALI on the GPU: the others repeat or take long
RIVALS = (
    "fastssl torch",
    "simclr authors",
    "barlow authors",
    "mae authors",
    "lightly",
    "open_clip",
)
RIVALS += ("pytorch-metric-learning", "siglip-kernel", "cut-cross-entropy")
FEEDERS = ("fastssl torchvision", "kornia")
REHEARSAL = "FASTSSL_GPU_REHEARSAL"  # on a CPU, at the smallest shapes: proves this file
_PROBE = """
import json, torch, triton
rehearsal = {rehearsal}
there = torch.cuda.is_available()
print(json.dumps({{
    "gpu": "rehearsal" if rehearsal else torch.cuda.get_device_name(0) if there else "",
    "arch": "sm_%d%d" % torch.cuda.get_device_capability(0) if there else "",
    "cuda": torch.version.cuda or "",
    "torch": torch.__version__,
    "triton": triton.__version__,
}}))
"""


@dataclass(frozen=True)
class Place:
    """Where a slice runs and writes: the probe's answer, the folder, the names of the cases."""

    machine: Mapping[str, str]
    out: Path
    parts: Path
    today: str
    cases: tuple[str, ...] = ()
    rehearsal: bool = False

    def file(self, theme: str) -> Path:
        """A result's path, e.g. 2026-11-20-nvidia-h200-bench-bfloat16.jsonl."""
        gpu = re.sub(r"[^a-z0-9]+", "-", self.machine["gpu"].lower()).strip("-")
        return self.out / f"{self.today}-{gpu}-{theme}"


def main(argv: Sequence[str] | None = None, run: Runner | None = None) -> int:
    """Run what `argv` asks for and return the exit code; `run` stands in for the commands."""
    start = time.monotonic()
    args = _parser().parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.slice == "summary":
        print(summary(args.out))
        return 0
    rehearsal = os.environ.get(REHEARSAL) == "1"
    machine = probe(rehearsal)
    if isinstance(machine, str):
        print(f"fastssl.bench.gpu: {machine}", file=sys.stderr)
        return 2
    print(", ".join(f"{key} {value}" for key, value in machine.items() if value), flush=True)
    failed = False
    with tempfile.TemporaryDirectory() as parts:
        cases = tuple(_case_names()) if args.slice in ("bench", "train", "all") else ()
        today = date.today().isoformat()
        place = Place(machine, args.out, Path(parts), today, cases, rehearsal)
        for name in SLICES if args.slice == "all" else (args.slice,):
            failed |= run_slice(name, place, start + 60 * args.minutes, args.only, run)
            print(f"\n{summary(args.out, name)}", flush=True)
            start = time.monotonic()
    if args.slice == "all":
        print(f"\n{summary(args.out)}")
    return int(failed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastssl.bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("slice", choices=[*SLICES, "all", "summary"])
    add("--out", type=Path, default=Path(os.environ.get("OUT") or "bench/results"), metavar="DIR")
    add("--minutes", type=float, default=7.5, metavar="M", help="for each slice; 7.5")
    add("--only", default="*", metavar="PATTERN", help="the steps of these names alone")
    return parser


def probe(rehearsal: bool) -> dict[str, str] | str:
    """What the machine is, asked in a process of its own; or a sentence on what it lacks."""
    code = _PROBE.format(rehearsal=rehearsal)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    python = f"{sys.executable} (GPU_PYTHON picks another)"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["?"])[-1]
        return f"torch with CUDA, and triton, are needed by {python}: {last}"
    machine = json.loads(done.stdout.splitlines()[-1])
    if not machine["gpu"]:
        built = f"torch {machine['torch']}, built for CUDA {machine['cuda'] or 'none'}"
        return f"no GPU is seen by {python}: {built}; is there a driver (nvidia-smi)?"
    return machine


def _case_names() -> list[str]:
    from fastssl.bench.cases import all_cases

    return list(all_cases())


def run_slice(name: str, place: Place, end: float, only: str, run: Runner | None) -> bool:
    """Run a slice's steps until `end`, keep their outcomes, and say whether one failed."""
    steps = {"test": plan_test, "tune": plan_tune, "bench": plan_bench, "train": plan_train}
    chosen = [step for step in steps[name](place, end) if fnmatchcase(step.name, only)]
    outcomes: list[Outcome] = []

    def keep(outcome: Outcome) -> None:
        outcomes.append(outcome)
        gather(place)
        _note(place, name, outcomes)

    run_steps(chosen, end, run=run, after=keep)
    bad = {FAILED, CUT} if name == "test" else {FAILED}
    return any(outcome.status in bad for outcome in outcomes)


def _note(place: Place, name: str, outcomes: Sequence[Outcome]) -> None:
    """Keep the outcomes of a slice, beside those of the other slices of the same day."""
    path = place.file("gpu.json")
    notes = json.loads(path.read_text()) if path.exists() else {}
    notes |= {"machine": dict(place.machine), name: [asdict(outcome) for outcome in outcomes]}
    path.write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")


def plan_test(place: Place, end: float) -> list[Step]:
    """The tests, the most telling first.

    Compiling takes longer than running: several processes do it where pytest-xdist is installed,
    except for what measures memory or takes most of it.
    """
    room = "tests/gpu/test_"
    losses = ["reconstruction", *(["contrastive", "barlow_twins"] if find_spec("lightly") else [])]
    sanitize = (sys.executable, "-m", "tests.gpu.sanitize")
    steps = [
        _pytest("accuracy", 150, [f"{room}accuracy.py"], workers=8),
        _pytest("large", 150, [f"{room}large.py", f"{room}launch.py", f"{room}sanitize.py"]),
        *(_sanitizer(tool, sanitize) for tool in ("memcheck", "racecheck")),
        _pytest("kernels", 150, ["tests/kernels"], workers=8),
        _pytest("compile", 150, [f"{room}compile.py"], workers=4),
        _pytest("losses", 60, [f"tests/losses/test_{name}.py" for name in losses]),
    ]
    missing = "" if Path("tests/gpu").is_dir() else "run it from the root of the source tree"
    return [replace(step, missing=step.missing or missing) for step in steps]


def _pytest(name: str, most: float, paths: Sequence[str], workers: int = 0) -> Step:
    """pytest on these files.  Warnings are no errors: other versions have other ones."""
    argv = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "default")
    argv += ("--tb=short", "--show-capture=no", "--durations=5")
    if workers and find_spec("xdist"):
        argv += ("-n", str(min(workers, os.cpu_count() or 1)))
    return Step(name, (*argv, *paths), most, {"OMP_NUM_THREADS": "2"}, judge_pytest)


def _sanitizer(tool: str, command: tuple[str, ...]) -> Step:
    """compute-sanitizer's tool on the script that runs every Triton kernel."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    tool_path = shutil.which("compute-sanitizer", path=path)
    argv = (tool_path or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9")
    argv += ("--target-processes", "application-only", "--launch-timeout", "60")
    argv += ("--report-api-errors", "no", "--print-limit", "20")  # torch asks, and is refused
    missing = "" if tool_path else "compute-sanitizer is not on PATH"
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Step(tool, (*argv, *command), 90, env, judge_sanitizer, missing)


def plan_tune(place: Place, end: float) -> list[Step]:
    """The tuner, which keeps to its own minutes."""
    minutes = max(0.1, (end - time.monotonic()) / 60 - 0.5)
    path = place.file("tune.jsonl")
    argv = (sys.executable, "-m", "fastssl.bench.tune", "--json", str(path))
    argv += ("--minutes", f"{minutes:.1f}")
    return [Step("tune", argv, 60 * minutes + 20, judge=partial(judge_tuner, path))]


def judge_tuner(path: Path, code: int | None, lines: Sequence[str]) -> tuple[str, str]:
    """Judge the tuner by its exit code; the note counts configurations by what became of them."""
    counts = Counter(row["status"] for row in _records([path]) if row["kind"] == "timing")
    status, why = judge_exit(code, lines)
    return status, ", ".join(f"{count} {word}" for word, count in counts.items()) or why


def plan_bench(place: Place, end: float) -> list[Step]:
    """Kernels and losses in bfloat16, the first cases in a process each; float32; sweeps.

    A kernel that breaks the GPU's context takes its process along, and no other case.
    torch.compile, 10 s and more for each shape, comes after the others, beside the first cases.
    The data pipeline takes a round of epochs: it comes last but for the sweeps.
    """
    first = [case for case in FIRST if case in place.cases]
    rest = [c for c in place.cases if c not in first and not _is(c, APART)]
    optim = [case for case in place.cases if _is(case, ("optim-*",))]
    few = [word for name in RIVALS for word in ("--rival", name)]
    quick, sweep = ["--budget", "0.5", *few], ["--budget", "0.3", "--sweep", *few]
    compiled = ["--budget", "0.5", "--rival", "compile"]
    half, full = "bfloat16", "float32"
    plans = [(f"bench-{half}", case, [case], 90, ["--budget", "1", *few]) for case in first]
    plans += [(f"bench-{half}", "rest", rest, 120, quick)]
    plans += [(f"bench-{full}", case, [case], 60, quick) for case in first]
    plans += [(f"bench-compile-{half}", case, [case], 90, compiled) for case in first]
    plans += [(f"bench-{full}", "rest", [*rest, *optim], 90, quick)]
    feeders = ["--budget", "0.5", *(word for name in FEEDERS for word in ("--rival", name))]
    data = [case for case in DATA if case in place.cases]
    plans += [(f"bench-{full}", case, [case], 150, feeders) for case in data]
    plans += [(f"bench-sweep-{half}", case, [case], 90, sweep) for case in first]
    return [_measure(place, number, plan) for number, plan in enumerate(plans) if plan[2]]


def plan_train(place: Place, end: float) -> list[Step]:
    """Whole training steps in bfloat16, a process for each method; large models take longer."""
    cases = [case for case in place.cases if _is(case, ("train-*",))]
    most = {c: 240 if _is(c, ("*-large",)) else 150 for c in cases}
    plans = [("train-bfloat16", c, [c], most[c], ["--budget", "5"]) for c in cases]
    return [_measure(place, number, plan) for number, plan in enumerate(plans)]


def _is(case: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(case, pattern) for pattern in patterns)


Plan = tuple[str, str, Sequence[str], float, Sequence[str]]


def _measure(place: Place, number: int, plan: Plan) -> Step:
    """A run of the benchmark.  plan: theme, which ends in the dtype and names the file the lines
    go to; what, to name the step; cases; seconds at most; more words of the command."""
    theme, what, cases, most, words = plan
    part = place.parts / f"{theme}.{number:02}.{what}"
    small = ["--size", "quick", "--device", "cpu", "--no-memory"]
    size = small if place.rehearsal else ["--size", "cuda"]
    argv = [sys.executable, "-m", "fastssl.bench", *cases, *size]
    argv += ["--dtype", theme.rpartition("-")[2], "--json", str(part), *words]
    return Step(f"{theme} {what}", tuple(argv), most, judge=partial(judge_record, part))


def judge_record(part: Path, code: int | None, lines: Sequence[str]) -> tuple[str, str]:
    """Judge a benchmark by what it wrote: how many rows of ours have a time, and which have not."""
    rows = [row for row in _records([part]) if row["kind"] == "result"]
    ours = [row for row in rows if row["rival"] == "fastssl"]
    if ours and all(row["status"] == "absent" for row in ours):
        stand_in = [r for r in rows if r["rival"].startswith("fastssl ") and r["status"] == "ok"]
        if not stand_in:
            return NOT_RUN, ours[0]["why"]
        said = f"{stand_in[0]['rival']}: {len(stand_in)} measured; fastssl: {ours[0]['why']}"
        status, why = judge_exit(code, lines)
        return status, f"{why}; {said}" if why else said
    timed = [row for row in ours if row["status"] == "ok"]
    others = {f"{row['case']} {row['status']}" for row in ours if row["status"] != "ok"}
    note = ", ".join([f"{len(timed)} measured", *sorted(others)])
    status, why = judge_exit(code, lines)
    return status, note if ours else why or note


def _records(parts: Iterable[Path]) -> list[dict[str, Any]]:
    return [json.loads(line) for part in parts for line in fresh_lines(part)]


def gather(place: Place) -> None:
    """Join the parts of each theme into its file: one run, with the commands of them all."""
    themes: dict[str, list[Path]] = {}
    for part in sorted(place.parts.iterdir()):
        themes.setdefault(part.name.split(".")[0], []).append(part)
    for theme, parts in themes.items():
        lines = _records(parts)
        runs = [line for line in lines if line["kind"] == "run"]
        if not runs:
            continue
        command = " && ".join(dict.fromkeys(run["command"] for run in runs))
        joined = [{**runs[0], "command": command.replace(f"{place.parts}/", "")}]
        for kind in ("ceiling", "result", "fit", "published"):
            of_kind = [line for line in lines if line["kind"] == kind]
            joined += {_key(line): line for line in of_kind}.values()
        ends = [line["seconds"] for line in lines if line["kind"] == "end"]
        joined += [{"kind": "end", "seconds": sum(ends)}] if len(ends) == len(runs) else []
        text = "".join(json.dumps(line) + "\n" for line in joined)
        place.file(f"{theme}.jsonl").write_text(text, encoding="utf-8")


def _key(line: Mapping[str, Any]) -> str:
    """Ceilings are measured by each part: one of each stays.  Other lines differ."""
    return line["what"] if line["kind"] == "ceiling" else json.dumps(line, sort_keys=True)


def summary(out: Path, only: str = "*") -> str:
    """The newest day's steps, and for each measurement ours, its best rival and the floor.

    only: the name of a slice, whose steps and files alone are wanted.
    """
    notes = sorted(out.glob("*-gpu.json"))
    if not notes:
        return f"nothing in {out}"
    stem = notes[-1].name.removesuffix("gpu.json")
    slices = json.loads(notes[-1].read_text())
    machine = slices.pop("machine")
    said = [f"{stem.rstrip('-')}: torch {machine['torch']}, triton {machine['triton']}"]
    for name in SLICES:
        if name in slices and fnmatchcase(name, only):
            said.append(f"\n{name}\n" + table([Outcome(**step) for step in slices[name]]))
            for path in sorted(out.glob(f"{stem}{name}-*.jsonl")):
                said += [f"\n{path.name}", *headlines(path)]
    return "\n".join(said)


def headlines(path: Path) -> list[str]:
    """For each measurement of ours a line: time, best rival, floor.  Sweeps are left out."""
    from fastssl.bench import record
    from fastssl.bench.report import formatting

    lines = []
    for rows in formatting.measurements(record.read(path).results):
        ours = next((row for row in rows if row.rival == "fastssl"), None)
        if ours is None or ours.sweep:
            continue
        what = f"{ours.case:18} {formatting.shape_words(ours.shape):28}"
        if ours.total is None:
            lines.append(f"{what} {formatting.reason(ours)}"[:100])
            continue
        others = [r for r in rows if r.x is not None and not formatting.is_ours(r.rival)]
        best = min(others, key=lambda row: row.x or 0, default=None)
        rival = "no rival has a time"
        if best:
            rival = f"{best.rival} x {formatting.number(best.x or 0)}{' (tie)' * best.tie}"
        share = formatting.share_of_floor(ours)
        floor = f"{formatting.percent(share)} of floor" if share else ""
        ms = formatting.number(ours.total.p50)
        lines.append(f"{what} {ms:>8} ms  {rival:32} {floor}".rstrip())
    return lines


if __name__ == "__main__":
    sys.exit(main())
