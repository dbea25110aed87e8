"""A run as one self-contained HTML page: result, pictures, configuration, how to repeat it."""

import base64
from collections import Counter
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from fastssl.files import write_atomically
from fastssl.report import words
from fastssl.report.run_files import PICTURES, RunFiles, read_run

_MEASURES = {  # key: column title; shown when any encoder has it
    "knn": "kNN",
    "linear": "Linear probe",
    "rankme": "RankMe",
    "uniformity": "Uniformity",
    "alignment": "Alignment",
}
_SHARES = ("knn", "linear")
_CAPTIONS = {
    "curves": "The run over its steps. Faint lines are raw values, strong ones their moving mean. "
    "Accuracies are on held-out {items}; broken lines, where drawn, are what the same "
    "measure gives without any pretraining. RankMe counts the dimensions the features really use: "
    "a fall towards 1 is collapse. Milliseconds a step, where measured, are the first rank's, with "
    "their medians; what is above twice the median step is cut off.",
    "embedding": "Held-out {items} on a plane, colored by class, which the pretraining never "
    "saw. Islands of one class are what the encoder has found by itself. Distances between "
    "far islands and the axes have no meaning.",
    "embedding_random": "The same {items} through the same encoder before training: what the "
    "architecture alone gives.",
    "reconstructions": "Each column is one {item}: the original, what the encoder was shown, and "
    "what the decoder made of it. Only the hidden patches are predicted.",
    "views": "What the method is trained on: each row is one {item}, each column one random view. "
    "Views of one {item} must keep what tells it from the others.",
}


def write_report(run: Path) -> Path:
    """Write run/report.html from the files of the directory `run`, and return its path.

    Read, each left out when it is missing: config.yaml, metrics.jsonl, results.json and the
    pictures curves, embedding, embedding_random, reconstructions, views, views-STREAM (.png).  The
    page loads nothing and runs no script; every text of the run is escaped.  Raises ValueError: no
    such directory.  OSError: it cannot be written to; an older report then stays as it was.
    """
    files = read_run(run)
    templates = environment(str(__package__))
    templates.filters["measure"] = _measure
    templates.tests["finite"] = words.number
    page = templates.get_template("run.html.j2").render(_values(files))
    path = run / "report.html"
    write_atomically(path, page)
    return path


def environment(*packages: str) -> Environment:
    """Where templates of these packages are found; every text that is put into them is escaped."""
    return Environment(
        loader=ChoiceLoader([PackageLoader(name) for name in packages]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _values(files: RunFiles) -> dict[str, Any]:
    """What the template shows of a run."""
    results, items = files.results, words.items(files.results)
    blank = {"encoder": "", **dict.fromkeys(_MEASURES)}
    rows = [blank | row for row in words.rows_of(results)]
    notes = [note for row in rows for note in row.get("notes") or [] if isinstance(note, str)]
    named = {"items": items, "item": items.removesuffix("s")}
    versions = results.get("versions")
    summary, events = _events(files.metrics)
    captions = {name: caption.format(**named) for name, caption in _CAPTIONS.items()}
    streams = [name for name in files.pictures if name.startswith("views-")]
    captions |= {name: f"The same {items}, in the same order." for name in streams}
    return {
        "title": words.title(results),
        "headline": words.headline(results),
        "problems": [*files.problems, *_collapses(files.metrics)],
        "measures": {k: v for k, v in _MEASURES.items() if any(words.number(r[k]) for r in rows)},
        "shares": _SHARES,
        "ours": words.PRETRAINED,
        "rows": rows,
        "notes": list(dict.fromkeys(notes)),
        "items": items,
        "facts": _facts(results, items),
        "captions": captions,
        "streams": streams,
        "pictures": dict.fromkeys(PICTURES)
        | {name: base64.b64encode(png).decode() for name, png in files.pictures.items()},
        "summary": summary,
        "events": events,
        "command": results.get("command"),
        "versions": versions if isinstance(versions, dict) else {},
        "config": files.config,
    }


def _measure(value: Any, key: str) -> str:
    if not words.number(value):
        return "–"
    if key in _SHARES:
        return words.percent(value)
    return f"{value:.1f}" if key == "rankme" else f"{value:.2f}"


def _facts(results: dict[str, Any], items: str) -> list[tuple[str, str]]:
    """Label and value of each figure about the training that is there."""
    train = results.get("train")
    train = train if isinstance(train, dict) else {}
    shown = {
        "steps": ("steps", lambda v: f"{v:,.0f}"),
        "epochs": ("epochs", lambda v: f"{v:g}"),
        "seconds": ("training time", words.duration),
        "images_per_s": (f"{items} per second", lambda v: f"{v:,.0f}" if v >= 100 else f"{v:.3g}"),
        "data_wait": ("waiting for data", words.percent),
        "loss": ("final loss", lambda v: f"{v:.4g}"),
        "parameters": ("parameters", words.scaled),
        "peak_memory_bytes": ("peak memory", lambda v: f"{v / 2**20:,.0f} MiB"),
        "bad_images": (f"unreadable {items}, left out", lambda v: f"{v:,}"),
        "skipped_steps": ("steps skipped, not finite", lambda v: f"{v:,}"),
    }
    return [
        (label, write(train[key]))
        for key, (label, write) in shown.items()
        if words.number(train.get(key))
        and (train[key] > 0 or key not in ("bad_images", "skipped_steps"))
    ]


def _collapses(rows: list[dict[str, Any]]) -> list[str]:
    """What the run has said of collapse, each with its step."""
    told = [r for r in rows if r.get("kind") == "event" and r.get("what") == "collapse"]
    return [f"From step {row['step']}: {row['detail']}." for row in told]


def _events(rows: list[dict[str, Any]], limit: int = 100) -> tuple[str, list[str]]:
    """What happened besides training: all but the checkpoints, which are routine."""
    events = [r for r in rows if r.get("kind") == "event" and r.get("what") != "checkpoint"]
    counts = Counter(str(event.get("what")) for event in events)
    lines = [
        f"step {event.get('step')}  {event.get('what')}  {event.get('detail', '')}"
        for event in events[:limit]
    ]
    if len(events) > limit:
        lines.append(f"... and {len(events) - limit} more in metrics.jsonl")
    return ", ".join(f"{n} × {what}" for what, n in counts.items()), lines
