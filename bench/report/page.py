"""A run as one self-contained HTML page: result, pictures, every table, how to repeat it."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from fastssl.bench.record import Run
from fastssl.bench.report import formatting, scaling, table

PACKAGES = ("fastssl.bench.report", "fastssl.report")  # where the page lies, and its base
CLASSES = {
    "": "",
    "ours": "ours",
    "tie": "tie",
    "beats us": "beats",
    "wrong": "wrong",
    "no time": "none",
}
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
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(name) for name in PACKAGES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html.j2").render(_content(run))
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(page, encoding="utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
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
