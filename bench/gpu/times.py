"""The headlines' times beside eager, each after its gate: a watched child, alone on the GPU.

python -m fastssl.bench.gpu.times before
python -m fastssl.bench.gpu.times after      with what the tuner has found, kept in --table
python -m fastssl.bench.gpu.times profile    two calls of pairwise_lse, for a profiler to watch
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastssl.bench.cases import all_cases
from fastssl.bench.compiler import tune
from fastssl.bench.gpu import lines
from fastssl.bench.gpu.headlines import HEADLINES, RIVALS, Headline
from fastssl.bench.gpu.tuning import chosen
from fastssl.bench.gpu.watched import Case, Watch, rehearsing, run
from fastssl.bench.measure.gate import step
from fastssl.bench.measure.peaks import measure_ceilings
from fastssl.bench.measure.run import Settings, run_case
from fastssl.bench.record import Ceiling, Result
from fastssl.bench.registry import OURS
from fastssl.kernels.common import tuning

DTYPES = ("bfloat16", "float32")
BUDGET_S = {"before": 0.3, "after": 0.15}  # of rounds, for a headline
FEW = 2  # headlines of a rehearsal
PROFILED = Headline("pairwise-lse", {"M": 16384, "N": 16384, "D": 128})


def main(argv: list[str] | None = None) -> int:
    """The child: ceilings, then the headlines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("when", choices=[*BUDGET_S, "profile"])
    parser.add_argument("--table", type=Path, help="the tuned table, as it is to be written")
    args = parser.parse_args(argv)
    device = torch.device("cpu" if rehearsing() else "cuda:0")
    if args.when == "profile":
        return run([(f"profiled {PROFILED}", partial(call_twice, PROFILED, device))])
    watch = Watch.told()
    if args.table:
        use_table(args.table, lines.read(watch.path))
    return run(cases(args.when, device, watch), watch)


def cases(when: str, device: torch.device, watch: Watch) -> list[Case]:
    """Ceilings, by which the floors of the others are known, then every headline."""
    few = HEADLINES[:FEW] if rehearsing() else HEADLINES
    budget = 0.0 if rehearsing() else BUDGET_S[when]
    measured = [(str(h), partial(measure, h, device, budget, watch)) for h in few]
    return [("ceilings", partial(ceilings, device)), *measured]


def ceilings(device: torch.device) -> dict[str, Any]:
    """What this GPU copies and multiplies; a rehearsal, which has no share of it, takes no time."""
    measured = [] if rehearsing() else measure_ceilings(device, DTYPES)
    return {"ceilings": [asdict(one) for one in measured]}


def measure(headline: Headline, device: torch.device, budget: float, watch: Watch) -> Mapping:
    """Ours and eager, each a Result; wrong where ours has no time."""
    case = all_cases()[headline.case]
    shape = dict(case.shapes["quick"][0]) if rehearsing() else headline.shape
    known = [line for line in lines.read(watch.path) if "ceilings" in line]
    have = [Ceiling(**one) for one in known[-1]["ceilings"]] if known else []
    dtype = getattr(torch, headline.dtype)
    settings = Settings(device, dtype, have, budget, rivals=RIVALS, memory=False)
    rows = run_case(case, shape, settings)
    ours = next(row for row in rows if row.rival == OURS)
    found = {"rows": [{**asdict(row), **rates(row)} for row in rows]}
    return found if ours.status == "ok" else {**found, "why": f"{ours.status}: {ours.why}"}


def rates(row: Result) -> dict[str, float | None]:
    """What a row's median comes to, beside the floor that no implementation can beat."""
    share = row.floor / row.total.p50 if row.floor and row.total else None
    return {"tflops": row.tflops, "gbs": row.gbs, "share": share}


def use_table(path: Path, record: list[dict[str, Any]]) -> None:
    """Write the shipped table with the tuner's choices in it, and launch by that one."""
    machine = next((line for line in record if line["kind"] == "machine"), {})
    where = f"{machine.get('gpu', '?')}, triton {machine.get('triton', '?')}"
    measured = f"{where}, {date.today().isoformat()}"
    timings = chosen(lines.cases(record))
    new = tune.entries(timings, machine.get("arch") or "cpu", measured)
    old = json.loads(tuning.TABLE.read_text(encoding="utf-8"))
    path.write_text(tune.text(tune.merge(old, new)) + "\n", encoding="utf-8")
    tuning.TABLE = path
    tuning.table.cache_clear()


def call_twice(headline: Headline, device: torch.device) -> None:
    """Ours, forward and backward, twice: the first call may compile."""
    case = all_cases()[headline.case]
    shape = dict(case.shapes["quick"][0]) if rehearsing() else headline.shape
    problem = case.make(shape, getattr(torch, headline.dtype), device)
    ours: Any = problem.rivals[OURS]
    for _ in range(2):
        step(ours, problem.inputs)


if __name__ == "__main__":
    sys.exit(main())
