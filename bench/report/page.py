"""A run as one self-contained HTML page: result, pictures, every table, how to repeat it."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from fastssl.bench.record import Fit, Published, Run
from fastssl.bench.report import formatting, plots, table
from fastssl.bench.report._figure import Picture
from fastssl.bench.report._page_style import METHOD, PAGE, STYLE
from fastssl.bench.report.formatting import number, shape_words
from fastssl.bench.report.scaling import fits
from fastssl.bench.report.table import Block, Line

_CLASSES = {
    "ours": "ours",
    "tie": "tie",
    "beats us": "beats",
    "wrong": "wrong",
    "no time": "none",
}
_CONDITIONS = {
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
    sections = [
        _head(run),
        _summary(run),
        _repeat(run),
        _pictures(plots.pictures(run) if plots.available() else None),
        _measurements(run),
        _growth(run),
        _published(run.published),
        _ceilings(run),
        _conditions(run),
        _method(),
    ]
    page = PAGE.substitute(
        title=escape(_title(run)), style=STYLE, body="\n".join(part for part in sections if part)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(page, encoding="utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def _title(run: Run) -> str:
    when = str(run.conditions.get("time", ""))[:10]
    return " · ".join(w for w in ("fastssl bench", formatting.where(run.conditions), when) if w)


def _head(run: Run) -> str:
    said = formatting.headline(run.results) or "Nothing was measured beside a rival."
    parts = [f"<h1>{escape(_title(run))}</h1>", f'<p class="headline">{escape(said)}</p>']
    wrong = [row for row in run.results if row.status in ("wrong", "failed")]
    if wrong:
        named = ", ".join(dict.fromkeys(f"{row.rival} in {row.case}" for row in wrong))
        parts.append(f'<p class="problem">Wrong or failed: {escape(named)}.</p>')
    if run.seconds is None:
        parts.append('<p class="problem">This run was cut short: rows are missing.</p>')
    return "\n".join(parts)


def _table(heads: Sequence[str], rows: Sequence[str]) -> str:
    top = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    return (
        f'<div class="scroll"><table>\n<thead><tr>{top}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + "\n</tbody>\n</table></div>"
    )


def _row(first: str, cells: Sequence[str], kind: str = "") -> str:
    start = f'<tr class="{kind}">' if kind else "<tr>"
    others = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f'{start}<th scope="row">{escape(first)}</th>{others}</tr>'


def _summary(run: Run) -> str:
    rows = [
        _row(t.case, [*(str(n or "–") for n in _counts(t)), table.between(t) or "–"])
        for t in formatting.tallies(run.results)
    ]
    if not rows:
        return ""
    heads = ["Case", "faster", "tie", "slower", "no rival", "no time", "x of the best rival"]
    note = (
        "Measurements (a shape in a dtype) by how fastssl stands against the best rival of each; "
        "x is that rival's time over ours. One rival that is faster makes it slower."
    )
    return f'{_table(heads, rows)}\n<p class="note">{note}</p>'


def _counts(t: formatting.Tally) -> tuple[int, ...]:
    return t.faster, t.tie, t.slower, t.alone, t.no_time


def _repeat(run: Run) -> str:
    command = run.conditions.get("command")
    if not command:
        return ""
    took = f" It took {formatting.duration(run.seconds)}." if run.seconds else ""
    return (
        f'<h2>To repeat it</h2>\n<pre class="command">{escape(str(command))}</pre>\n'
        f'<p class="note">{escape(formatting.where(run.conditions))}.{took}</p>'
    )


def _pictures(drawn: Sequence[Picture] | None) -> str:
    if drawn is None:
        return '<p class="note">The pictures are left out: matplotlib was not installed.</p>'
    parts = []
    for heading in dict.fromkeys(picture.heading for picture in drawn):
        parts.append(f"<h2>{escape(heading)}</h2>")
        parts += [_figure(picture) for picture in drawn if picture.heading == heading]
    return "\n".join(parts)


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    return (
        f'<figure><div class="scroll"><img alt="{escape(picture.name)}" '
        f'src="data:image/png;base64,{data}"></div>'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def _measurements(run: Run) -> str:
    blocks = table.blocks(run.results, run.ceilings)
    if not blocks:
        return ""
    gates = {row.case: row.gate for row in run.results if row.gate}
    parts = ["<h2>Measurements</h2>", f'<p class="note">{escape(table.LEGEND)}</p>']
    for case in dict.fromkeys(block.case for block in blocks):
        gate = f" <small>gate: {escape(gates[case])}</small>" if case in gates else ""
        parts.append(f"<h3>{escape(case)}{gate}</h3>")
        mine = [block for block in blocks if block.case == case]
        parts += [_block(block) for block in mine if not block.sweep]
        swept = [block for block in mine if block.sweep]
        if swept:
            inside = "\n".join(map(_block, swept))
            parts.append(
                f"<details><summary>Sweep, {len(swept)} shapes</summary>{inside}</details>"
            )
    return "\n".join(parts)


def _block(block: Block) -> str:
    title = " · ".join(w for w in (block.shape, block.dtype, *block.notes) if w)
    rows = [_line(line, block.columns) for line in block.lines]
    return f'<p class="note">{escape(title)}</p>\n{_table(["", *block.columns], rows)}'


def _line(line: Line, columns: Sequence[str]) -> str:
    kind = _CLASSES.get(line.mood, "")
    if line.cells:
        return _row(line.rival, [line.cells.get(name, "") for name in columns], kind)
    span = max(1, len(columns))
    return (
        f'<tr class="{kind}"><th scope="row">{escape(line.rival)}</th>'
        f'<td class="words" colspan="{span}">{escape(line.why)}</td></tr>'
    )


def _growth(run: Run) -> str:
    found: Sequence[Fit] = run.fits or fits(run.results)
    rows = [
        _row(
            f.case,
            [
                f.rival,
                shape_words(f.fixed),
                f.dtype,
                "time" if f.quantity == "ms" else "memory",
                f"{f.variable}^{f.exponent:.2f}",
                f"{f.r2:.3f}",
                str(f.points),
            ],
        )
        for f in found
    ]
    if not rows:
        return ""
    heads = ["Case", "rival", "at", "dtype", "of", "grows like", "r²", "points"]
    note = (
        "Least squares on logarithms. With 6 points or more only the upper half is fitted: at "
        "small sizes the cost of launching hides the work. It describes the range measured and "
        "is no law."
    )
    return f'<h2>Exponents of growth</h2>\n{_table(heads, rows)}\n<p class="note">{note}</p>'


def _published(quoted: Sequence[Published]) -> str:
    if not quoted:
        return ""
    rows = []
    for p in quoted:
        name = f"{escape(p.rival)}<br><small>{escape(p.hardware)}</small>"
        words = "".join(f"<td>{html}</td>" for html in (_at(p), escape(p.figure), _link(p.source)))
        rows.append(f'<tr><th scope="row">{name}</th>{words}</tr>')
    note = (
        "Quoted as their authors state them, on other hardware and in other settings: to stand "
        "beside the measurements, not to be divided by them."
    )
    shown = _table(["", "at", "figure", "source"], rows).replace("<table>", '<table class="words">')
    return f'<h2>Published elsewhere</h2>\n<p class="note">{note}</p>\n{shown}'


def _at(p: Published) -> str:
    return escape(", ".join(words for words in (p.shape, p.dtype) if words))


def _link(source: str) -> str:
    """The source's address as a link, what follows it as text."""
    address, _, rest = source.partition(" ")
    if not address.startswith(("https://", "http://")):
        return escape(source)
    shown = "/".join(address.split("/")[2:5])  # the site, and where on it in short
    return f'<a href="{escape(address)}">{escape(shown)}</a> {escape(rest)}'.strip()


def _ceilings(run: Run) -> str:
    if not run.ceilings:
        return ""
    rows = []
    for c in run.ceilings:
        factor, unit = formatting.scale(c)
        cells = [f"{number(factor * c.measured)} {unit}", "–", "–", c.source or "–"]
        if c.datasheet:
            cells[1] = f"{factor * c.datasheet:g} {unit}"
            cells[2] = formatting.percent(c.measured / c.datasheet)
        rows.append(_row(c.what, cells))
    heads = ["", "measured", "datasheet", "of it", "source"]
    return f"<h2>Ceilings of this machine</h2>\n{_table(heads, rows)}"


def _conditions(run: Run) -> str:
    facts = [
        (name, run.conditions[key]) for key, name in _CONDITIONS.items() if run.conditions.get(key)
    ]
    versions = run.conditions.get("versions") or {}
    if versions:
        facts.append(("Versions", ", ".join(f"{k} {v}" for k, v in versions.items())))
    if not facts:
        return ""
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in facts)
    return f'<h2>Conditions</h2>\n<dl class="facts">{items}</dl>'


def _method() -> str:
    items = "".join(f"<li>{escape(words)}</li>" for words in METHOD)
    return f"<h2>How it was measured</h2>\n<ul>{items}</ul>"
