"""What a GPU is asked for, in two commands that each end within some minutes whatever hangs.

    python -m fastssl.bench.gpu first     is it right; times beside eager; tuning; times again
    python -m fastssl.bench.gpu second    launches, 2^31 elements, memcheck; training; a profile
    python -m fastssl.bench.gpu all       one after the other
    python -m fastssl.bench.gpu summary   what is in --out, without a GPU

Every case is a line on the disk as soon as it is over, in processes that outlive a lost context
(children.py); files go to --out: $OUT, or else bench/results/, named by date and GPU.  The last
hundred lines printed are failures and times.  The exit code is 1 when a case failed or a test was
not reached, 2 when there is no GPU.  Run it from the root of the source tree.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import date
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fastssl.bench.gpu import lines
from fastssl.bench.gpu.children import Record, run_children
from fastssl.bench.gpu.steps import MINUTES, Maker, first, second
from fastssl.bench.gpu.summary import summary
from fastssl.bench.gpu.watched import rehearsing

MARGIN_S = 8.0  # at the end, for the summary and for those who would stop us
PROBE_S = 90.0
SAID = ("gpu", "arch", "cuda", "torch", "triton", "cache")
TESTS = ("check", "launch", "large", "memcheck")  # of them all are to be reached
_PROBE = """
import json, torch, triton
from fastssl.bench.gpu.carried import adopt
from fastssl.bench.record import conditions
rehearsal = {rehearsal}
there = torch.cuda.is_available()
print(json.dumps({{
    "gpu": "rehearsal" if rehearsal else torch.cuda.get_device_name(0) if there else "",
    "arch": "sm_%d%d" % torch.cuda.get_device_capability(0) if there else "",
    "cuda": torch.version.cuda or "",
    "torch": torch.__version__,
    "triton": triton.__version__,
    "cache": adopt(),
    "conditions": conditions(torch.device("cuda" if there else "cpu"), []),
}}))
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run what `argv` asks for and return the exit code."""
    args = _parser().parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.command == "summary":
        found = sorted(args.out.glob("*first.jsonl")) + sorted(args.out.glob("*second.jsonl"))
        print("\n\n".join(map(summary, found)) or f"nothing in {args.out}")
        return 0
    began = args.began or time.time()
    machine = probe(rehearsing())
    if isinstance(machine, str):
        print(f"fastssl.bench.gpu: {machine}", file=sys.stderr)
        return 2
    names = ("first", "second") if args.command == "all" else (args.command,)
    codes = []
    for name in names:
        codes.append(run_command(name, args, machine, began))
        began = time.time()
    return max(codes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastssl.bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("command", choices=["first", "second", "all", "summary"])
    add("--out", type=Path, default=Path(os.environ.get("OUT") or "bench/results"), metavar="DIR")
    add("--minutes", type=float, metavar="M", help="for each command; 8 and 4.5")
    add("--began", type=float, metavar="S", help="seconds since 1970 from which minutes count")
    add("--only", default="*", metavar="PATTERN", help="the children of these names alone")
    return parser


def probe(rehearsal: bool) -> dict[str, Any] | str:
    """What the machine is, asked in a process of its own; or a sentence on what it lacks."""
    code = _PROBE.format(rehearsal=rehearsal)
    python = f"{sys.executable} (GPU_PYTHON picks another)"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=PROBE_S
        )
    except subprocess.TimeoutExpired:
        return f"torch did not answer within {PROBE_S:.0f} s in {python}"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["?"])[-1]
        return f"torch with CUDA, and triton, are needed by {python}: {last}"
    machine = json.loads(done.stdout.splitlines()[-1])
    if not machine["gpu"]:
        built = f"torch {machine['torch']}, built for CUDA {machine['cuda'] or 'none'}"
        return f"no GPU is seen by {python}: {built}; is there a driver (nvidia-smi)?"
    return machine


def run_command(
    name: str, args: argparse.Namespace, machine: Mapping[str, Any], began: float
) -> int:
    """All phases of a command, then its summary; returns the exit code."""
    gpu = re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower()).strip("-")
    stem = args.out / f"{date.today().isoformat()}-{gpu}-{name}"
    record = Record(stem.with_suffix(".jsonl"), stem.with_suffix(".log"), began)
    for path in (record.path, record.log):
        path.unlink(missing_ok=True)
    record.write("parent", "machine", **machine)
    print(*(f"{key} {machine[key]}" for key in SAID if machine.get(key)), sep=", ", flush=True)
    seconds = 60 * (args.minutes or MINUTES[name]) - MARGIN_S
    end = time.monotonic() + seconds - (time.time() - began)
    make = Maker(rehearsing())
    table = stem.with_name(stem.name.replace(name, "tuned.json"))
    for phase in first(make, table) if name == "first" else second(make):
        chosen = [child for child in phase.children if fnmatchcase(child.name, args.only)]
        run_children(chosen, end - phase.leave * seconds, record, show)
    said = summary(record.path)
    stem.with_suffix(".txt").write_text(said + "\n", encoding="utf-8")
    print(f"\n{said}", flush=True)
    return int(any(map(_is_bad, lines.read(record.path))))


def _is_bad(line: Mapping[str, Any]) -> bool:
    """A case that failed; or tests that there was no time for, which have not passed."""
    unreached = line["kind"] == "left" and line["child"].startswith(TESTS)
    return unreached or (line["kind"] == "case" and not line["ok"])


def show(new: Sequence[Mapping[str, Any]]) -> None:
    """Cases in words as they come, for whoever looks on."""
    for line in new:
        if line["kind"] == "case":
            verdict = "ok" if line["ok"] else f"FAILED: {line.get('why', '?')}"[:300]
            print(f"{line['t']:6.1f} s  {line['child']:11} {line['case']:60} {verdict}", flush=True)
        elif line["kind"] != "plan":
            words = {k: v for k, v in line.items() if k not in ("child", "kind", "t")}
            print(
                f"{line['t']:6.1f} s  {line['child']:11} {line['kind']}: {words}"[:300], flush=True
            )


if __name__ == "__main__":
    sys.exit(main())
