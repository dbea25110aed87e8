"""Reads what a run leaves in its directory, as far as it can be read.

A run may have been killed in the middle of a line, or be still going: what is missing or broken is
left out, and said in `problems`, because a report of half a run is what one needs then.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PICTURES = ("curves", "embedding", "embedding_random", "reconstructions", "views")


@dataclass(frozen=True)
class RunFiles:
    """A run's directory in memory; empty where a file is missing."""

    config: str = ""  # config.yaml as written
    metrics: list[dict[str, Any]] = field(default_factory=list)  # the rows of metrics.jsonl
    results: dict[str, Any] = field(default_factory=dict)  # results.json
    pictures: dict[str, bytes] = field(default_factory=dict)  # PNG bytes by name
    problems: list[str] = field(default_factory=list)  # a sentence for each file that is broken


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; lines that are none (a killed write, a stranger's) are left out.

    A row has a step, and a kind; an event says what and a detail; what else is measured is a
    number, or None where it was not finite.
    """
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and _is_row(row):
            rows.append(row)
    return rows


def _is_row(row: dict[str, Any]) -> bool:
    if type(row.get("step")) is not int or not isinstance(row.get("kind"), str):
        return False
    if row["kind"] == "event":
        return isinstance(row.get("what"), str) and isinstance(row.get("detail"), str)
    return all(isinstance(v, int | float | None) for k, v in row.items() if k != "kind")


def read_run(run: Path) -> RunFiles:
    """Everything a report needs of the directory `run`; ValueError when there is no such one."""
    if not run.is_dir():
        raise ValueError(f"run must be a directory, got {run}")
    problems: list[str] = []
    results: dict[str, Any] = {}
    if (run / "results.json").is_file():
        try:
            loaded = json.loads((run / "results.json").read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            problems.append(f"results.json could not be read: {error}.")
        else:
            results = loaded if isinstance(loaded, dict) else {}
    config, metrics = run / "config.yaml", run / "metrics.jsonl"
    pictures = {}
    others = sorted(path.stem for path in run.glob("views-*.png"))  # of streams but the first
    for name in (*PICTURES, *others):
        if (run / f"{name}.png").is_file():
            pictures[name] = (run / f"{name}.png").read_bytes()
    return RunFiles(
        config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "",
        metrics=read_metrics(metrics) if metrics.is_file() else [],
        results=results,
        pictures=pictures,
        problems=problems,
    )
