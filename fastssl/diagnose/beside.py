"""Plans beside real steps, on this machine's processor: a table of memory and of time.

    python -m fastssl.diagnose.beside                    # RUNS
    python -m fastssl.diagnose.beside "2 mae-digits engine.zero_stage=2" ...

A run is a number of ranks, a recipe and keys.  Its plan and its steps follow each other, in
processes of their own with one thread a rank; times are the processor's, the least of several, for
others may be at work here.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

RUNS = (
    "1 mae-digits",
    "1 mae-digits engine.zero_stage=0",
    "1 mae-fractals batch_size=64",
    "1 mae-fractals batch_size=64 engine.precision=bf16",
    "1 simclr-digits",
    "1 simclr-digits engine.accumulation=16",
    "1 simclr-fractals batch_size=32",
    "1 barlow-digits",
    "1 vicreg-digits",
    "1 mocov3-digits engine.zero_stage=0",
    "1 ijepa-digits",
    "1 videomae-clips batch_size=16",
    "1 point-mae-clouds",
    "2 mae-digits engine.zero_stage=2",
    "2 mocov3-digits engine.zero_stage=1",
    "2 simclr-digits engine.zero_stage=3",
    "2 barlow-digits engine.zero_stage=2",
)
_ENV = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def beside(run: str) -> dict[str, float]:
    """Bytes and seconds of a run, planned and measured; before: bytes before it has a model."""
    world, recipe, *keys = run.split()
    plan, found = _planned(world, recipe, keys), _measured(world, recipe, keys)
    return {
        "planned_bytes": plan["memory"]["peak"],
        "bytes": found["peak"],
        "before": found["before"],
        "planned_seconds": plan["seconds"]["step"],
        "seconds": found["processor_seconds"],
    }


def _planned(world: str, recipe: str, keys: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        words = ["fastssl", "plan", recipe, *_all(keys), "--gpu", "cpu", "--gpus", world]
        _run([*words, "--json", str(file)])
        return json.loads(file.read_text())


def _measured(world: str, recipe: str, keys: list[str]) -> dict[str, Any]:
    words = ["fastssl.diagnose.measured", recipe, *_all(keys)]
    if int(world) > 1:
        words = ["torch.distributed.run", "--standalone", "--nproc-per-node", world, "-m", *words]
    said = _run(words).splitlines()
    return json.loads(next(line for line in reversed(said) if line.startswith("{")))


def _all(keys: list[str]) -> list[str]:
    return ["name=beside", "device=cpu", *keys]


def _run(words: list[str]) -> str:
    command = [sys.executable, "-m", *words]
    ended = subprocess.run(command, env=os.environ | _ENV, capture_output=True, text=True)
    if ended.returncode:
        sys.exit(f"{' '.join(command)} ended with {ended.returncode}:\n{ended.stderr}")
    return ended.stdout


def rows(runs: Sequence[str]) -> Iterator[str]:
    """The table's lines, in Markdown."""
    yield "| ranks, recipe | MiB | planned | ratio | beyond the process | s | planned | ratio |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for run in runs:
        found = beside(run)
        memory, before = found["bytes"], found["before"]
        ratio = found["planned_bytes"] / memory
        own = (found["planned_bytes"] - before) / (memory - before)
        time = found["planned_seconds"] / found["seconds"]
        values = f"{memory / 2**20:,.0f} | {found['planned_bytes'] / 2**20:,.0f} | {ratio:.2f}"
        spent = f"{found['seconds']:.3f} | {found['planned_seconds']:.3f} | {time:.2f}"
        yield f"| {run} | {values} | {own:.2f} | {spent} |"


def main(argv: Sequence[str] | None = None) -> None:
    for row in rows((sys.argv[1:] if argv is None else argv) or RUNS):
        print(row, flush=True)


if __name__ == "__main__":
    main()
