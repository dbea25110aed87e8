"""A run as one self-contained HTML page: result, pictures, every table, how to repeat it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastssl.bench.record import Run
from fastssl.bench.report import formatting, scaling, table
from fastssl.files import write_atomically
from fastssl.report.html import environment
from fastssl.report.words import duration

PACKAGES = ("fastssl.bench.report", "fastssl.report")  # where the page lies, and its base
CLASSES = {name: name for name in ("", "ours", "tie", "wrong")}  # of a line's mood
CLASSES |= {"beats us": "beats", "no time": "none"}
CONDITIONS = {
    "device": "Device",
    "arch": "Architecture",
    "driver": "Driver",
    "cuda": "CUDA",
    "threads": "Threads",
    "float32_products": "Precision of float32 products",
    "python": "Python",
    "commit": "Commit",
    "time": "Begun",
}


def write_page(run: Run, path: Path) -> Path:
    """Write the run as one HTML file at `path`, whose folder is made, and return the path.

    The page loads nothing and runs no script; every text of the run is escaped.  Where matplotlib
    is not installed it has no pictures, and says so.  Raises OSError when it cannot be written; an
    older page then stays as it was.
    """
    page = environment(*PACKAGES).get_template("page.html.j2").render(_content(run))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page)
    return path


def _content(run: Run) -> dict[str, Any]:
    """What the template shows, by name."""
    where, when = formatting.where(run.conditions), str(run.conditions.get("time", ""))[:10]
    bad = [row for row in run.results if row.status in ("wrong", "failed")]
    by_case: dict[str, list[table.Block]] = {}
    for block in table.blocks(run.results, run.ceilings):
        by_case.setdefault(block.case, []).append(block)
    return {
        "run": run,
        "words": formatting,
        "duration": duration,
        "title": " · ".join(word for word in ("fastssl bench", where, when) if word),
        "failures": list(dict.fromkeys(f"{row.rival} in {row.case}" for row in bad)),
        "tallies": formatting.tallies(run.results),
        "pictures": _pictures(run),
        "legend": table.LEGEND,
        "blocks": by_case,
        "classes": CLASSES,
        "gates": {row.case: row.gate for row in run.results if row.gate},
        "fits": run.fits or scaling.fits(run.results),
        "facts": _facts(run.conditions),
    }


def _facts(conditions: dict[str, Any]) -> dict[str, Any]:
    facts = {name: conditions[key] for key, name in CONDITIONS.items() if conditions.get(key)}
    if versions := conditions.get("versions"):
        facts["Versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    return facts


def _pictures(run: Run) -> list[Any] | None:
    """The run's pictures, or None where they cannot be drawn."""
    if find_spec("matplotlib") is None:
        return None
    from fastssl.bench.report import figures

    return figures.pictures(run)
