"""A run as one self-contained HTML page: result, pictures, configuration, how to repeat it."""

import base64
import os
from collections import Counter
from html import escape
from pathlib import Path
from typing import Any

from fastssl.report import _words as words
from fastssl.report._page import PAGE, STYLE
from fastssl.report.run_files import RunFiles, read_run

_MEASURES = {  # key: column title; shown when any encoder has it
    "knn": "kNN",
    "linear": "Linear probe",
    "rankme": "RankMe",
    "uniformity": "Uniformity",
    "alignment": "Alignment",
}
_CAPTIONS = {
    "curves": "The run over its steps. Faint lines are raw values, strong ones their moving mean. "
    "Accuracies are on held-out {items}; broken lines, where drawn, are what the same "
    "measure gives without any pretraining. RankMe counts the dimensions the features really use: "
    "a fall towards 1 is collapse.",
    "embedding": "Held-out {items} on a plane, coloured by class, which the pretraining never "
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
    pictures curves, embedding, embedding_random, reconstructions, views (.png).  The page loads
    nothing and runs no script; every text of the run is escaped.  Raises ValueError: no such
    directory.  OSError: it cannot be written to; an older report then stays as it was.
    """
    files = read_run(run)
    sections = [
        _head(files),
        _results(files.results),
        _training(files.results),
        _pictures(files.pictures, words.items(files.results)),
        _events(files.metrics),
        _reproduce(files),
    ]
    page = PAGE.substitute(
        title=escape(words.title(files.results)),
        style=STYLE,
        body="\n".join(section for section in sections if section),
    )
    path = run / "report.html"
    aside = run / f".report.html.{os.getpid()}"
    try:
        aside.write_text(page, encoding="utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def _head(files: RunFiles) -> str:
    title, sentence = words.title(files.results), words.headline(files.results)
    if sentence:
        title = f'<h1>{escape(title)}</h1>\n<p class="headline">{escape(sentence)}</p>'
    else:
        title = f'<h1 class="headline">{escape(title)}</h1>'
    return title + "".join(f'\n<p class="problem">{escape(p)}</p>' for p in files.problems)


def _results(results: dict[str, Any]) -> str:
    rows = words.rows_of(results)
    keys = [key for key in _MEASURES if any(words.number(row.get(key)) for row in rows)]
    if not keys:
        return ""
    head = "".join(f'<th scope="col">{_MEASURES[key]}</th>' for key in keys)
    lines = []
    for row in rows:
        name = str(row.get("encoder", ""))
        ours = ' class="ours"' if name == words.PRETRAINED else ""
        cells = "".join(f"<td>{_cell(key, row.get(key))}</td>" for key in keys)
        lines.append(f'<tr{ours}><th scope="row">{escape(name)}</th>{cells}</tr>')
    notes = [note for row in rows for note in row.get("notes") or [] if isinstance(note, str)]
    return (
        '<div class="scroll"><table>\n'
        f'<thead><tr><th scope="col">Encoder</th>{head}</tr></thead>\n'
        f"<tbody>{''.join(lines)}</tbody>\n</table></div>"
        '\n<p class="note">kNN and linear probe: accuracy on held-out '
        f"{escape(words.items(results))} with frozen features. "
        "RankMe: dimensions in use; near 1 is collapse.</p>"
        + "".join(f'\n<p class="note">{escape(note)}</p>' for note in dict.fromkeys(notes))
    )


def _cell(key: str, value: Any) -> str:
    if not words.number(value):
        return "–"
    if key not in ("knn", "linear"):
        return f"{value:.1f}" if key == "rankme" else f"{value:.2f}"
    share = min(max(100 * value, 0), 100)
    return f'{words.percent(value)}<span class="bar" style="--share: {share:.1f}%"></span>'


def _training(results: dict[str, Any]) -> str:
    train = results.get("train")
    train, items = train if isinstance(train, dict) else {}, words.items(results)
    shown = {
        "steps": ("steps", lambda v: f"{v:,.0f}"),
        "epochs": ("epochs", lambda v: f"{v:g}"),
        "seconds": ("training time", words.duration),
        "images_per_s": (f"{items} per second", lambda v: f"{v:,.0f}" if v >= 100 else f"{v:.3g}"),
        "data_wait": ("waiting for data", words.percent),
        "loss": ("final loss", lambda v: f"{v:.4g}"),
        "parameters": ("parameters", words.scaled),
        "peak_memory_bytes": ("peak memory", lambda v: f"{v / 2**20:,.0f} MiB"),
    }
    facts = [(label, form(train[key])) for key, (label, form) in shown.items() if _has(train, key)]
    if _has(train, "bad_images") and train["bad_images"] > 0:
        facts.append((f"unreadable {items}, left out", f"{train['bad_images']:,}"))
    if _has(train, "skipped_steps") and train["skipped_steps"] > 0:
        facts.append(("steps skipped, not finite", f"{train['skipped_steps']:,}"))
    if not facts:
        return ""
    tiles = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts)
    return f'<h2>Training</h2>\n<dl class="facts">{tiles}</dl>'


def _has(train: dict[str, Any], key: str) -> bool:
    return words.number(train.get(key))


def _pictures(pictures: dict[str, bytes], items: str) -> str:
    """items: what the pictures are of, in the plural."""
    parts = []
    if "curves" in pictures:
        parts += ["<h2>Curves</h2>", _figure("curves", pictures["curves"], "chart wide", items)]
    maps = [name for name in ("embedding", "embedding_random") if name in pictures]
    if maps:
        pair = "\n".join(_figure(name, pictures[name], "chart", items) for name in maps)
        parts += ["<h2>The features as a map</h2>", f'<div class="pair">\n{pair}\n</div>']
    sheets = (("reconstructions", "Reconstructions", "sheet wide"), ("views", "Views", "sheet"))
    for name, heading, kind in sheets:
        if name in pictures:
            parts += [f"<h2>{heading}</h2>", _figure(name, pictures[name], kind, items)]
    return "\n".join(parts)


def _figure(name: str, png: bytes, kind: str, items: str) -> str:
    data = base64.b64encode(png).decode()
    caption = escape(_CAPTIONS[name].format(items=items, item=items.removesuffix("s")))
    alt = f"{name.replace('_', ' ')}: {caption.split('. ')[0]}"
    return (
        f'<figure><div class="scroll"><img class="{kind}" alt="{alt}" '
        f'src="data:image/png;base64,{data}"></div><figcaption>{caption}</figcaption></figure>'
    )


def _events(rows: list[dict[str, Any]], limit: int = 100) -> str:
    """What happened besides training: all but the checkpoints, which are routine."""
    events = [r for r in rows if r.get("kind") == "event" and r.get("what") != "checkpoint"]
    if not events:
        return ""
    counts = Counter(str(event.get("what")) for event in events)
    summary = ", ".join(f"{n} × {what}" for what, n in counts.items())
    lines = [
        f"step {event.get('step')}  {event.get('what')}  {event.get('detail', '')}"
        for event in events[:limit]
    ]
    if len(events) > limit:
        lines.append(f"... and {len(events) - limit} more in metrics.jsonl")
    text = escape("\n".join(lines))
    return (
        f"<h2>Events</h2>\n<details><summary>{escape(summary)}</summary><pre>{text}</pre></details>"
    )


def _reproduce(files: RunFiles) -> str:
    parts = []
    if command := files.results.get("command"):
        parts.append(f'<pre class="command">{escape(str(command))}</pre>')
    versions = files.results.get("versions")
    if isinstance(versions, dict) and versions:
        items = "".join(f"<li>{escape(str(k))} {escape(str(v))}</li>" for k, v in versions.items())
        parts.append(f'<ul class="versions">{items}</ul>')
    if files.config:
        config = escape(files.config)
        parts.append(
            f"<details><summary>Configuration (config.yaml)</summary><pre>{config}</pre></details>"
        )
    return "\n".join(["<h2>To repeat this run</h2>", *parts]) if parts else ""
