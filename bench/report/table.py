"""A run as a table: a block for each measurement, a line for each rival, a summary at the end.

Plain aligned text, in color on a terminal.  Losing shapes stay; a rival without a time stays, with
its reason.  No figure is ever cut to fit the width.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import IO

from fastssl.bench.record import Ceiling, Result, Run
from fastssl.bench.registry import OURS
from fastssl.bench.report import formatting
from fastssl.bench.report.formatting import align, number, percent

WIDTH = 100
LEGEND = (
    "Times in ms. x: median time over that of fastssl, with its 95 % interval. fwd, bwd: medians. "
    "peak: memory beyond what was held before. FLOP/s and B/s count the work the problem needs, "
    "whatever a rival does; of floor: the least time this machine could take over the median."
)
_LONG_NAME = 12  # where the line is too long, a name past this gets a line of its own


@dataclass(frozen=True)
class Line:
    """One rival: its cells by column; or, without a time, why (and then no cell has a number)."""

    rival: str
    cells: dict[str, str] = field(default_factory=dict)
    why: str = ""
    mood: str = ""  # "ours", "tie", "beats us", "wrong", "no time" or ""


@dataclass(frozen=True)
class Block:
    """One measurement: a case at a shape in a dtype, and its lines in the order of the rivals."""

    case: str
    shape: str
    dtype: str
    notes: tuple[str, ...]
    sweep: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]

    @property
    def title(self) -> str:
        """Everything that tells this measurement from the others."""
        return "  ".join(word for word in (self.case, self.shape, self.dtype, *self.notes) if word)

    def row(self, line: Line) -> list[str]:
        """The line's cells in the order of the columns."""
        return [line.cells.get(name, "") for name in self.columns]


def blocks(results: Iterable[Result], ceilings: Sequence[Ceiling] = ()) -> list[Block]:
    """The measurements in the order they were made; a column no rival fills is left out."""
    return [_block(rows, ceilings) for rows in formatting.measurements(results)]


def _block(rows: Sequence[Result], ceilings: Sequence[Ceiling]) -> Block:
    lines = [_line(row, ceilings) for row in rows]
    order = dict.fromkeys(name for line in lines for name in line.cells)
    filled = [name for name in order if any(line.cells.get(name) for line in lines)]
    first = rows[0]
    notes = [f"floor {number(first.floor)} ms" if first.floor else ""]
    notes += [f"sweep of {first.sweep}" if first.sweep else ""]
    return Block(
        first.case,
        formatting.shape_words(first.shape),
        first.dtype,
        tuple(note for note in notes if note),
        first.sweep,
        tuple(filled),
        tuple(lines),
    )


def _line(row: Result, ceilings: Sequence[Ceiling]) -> Line:
    if row.status != "ok" or row.total is None:
        mood = "wrong" if row.status == "wrong" else "no time"
        return Line(row.rival, why=formatting.reason(row), mood=mood)
    cells = {name: number(getattr(row.total, name)) for name in ("p20", "p50", "p80")}
    for part in ("fwd", "bwd"):
        cells[part] = number(row.ms[part].p50) if part in row.ms else ""
    cells["x"], cells["95 %"] = _ratio(row)
    cells["peak"] = "" if row.peak is None else formatting.size(row.peak)
    if reached := formatting.rate(row, ceilings):
        cells[reached[1]] = number(reached[0])
    share = formatting.share_of_floor(row)
    cells["of floor"] = "" if share is None else percent(share)
    if row.items_per_s is not None:
        cells[f"{row.unit}/s"] = formatting.count(row.items_per_s)
    return Line(row.rival, cells, mood=_mood(row))


def _ratio(row: Result) -> tuple[str, str]:
    if row.rival == OURS or row.x is None:
        return ("1" if row.rival == OURS else ""), ""
    ends = row.x_low is not None and row.x_high is not None
    interval = f"{number(row.x_low or 0)}-{number(row.x_high or 0)}" if ends else ""
    return ("tie " if row.tie else "") + number(row.x), interval


def _mood(row: Result) -> str:
    if formatting.is_ours(row.rival):
        return "ours"
    if row.tie:
        return "tie"
    return "beats us" if row.x is not None and row.x < 1 else ""


def text(
    source: Run | Iterable[Result],
    *,
    ceilings: Iterable[Ceiling] = (),
    width: int = WIDTH,
    summary: bool = True,
) -> str:
    """The whole table as plain text, at most `width` columns wide where the figures allow it."""
    return _render(formatting.as_run(source, ceilings), width, summary, _bare)


def heading(run: Run, *, width: int = WIDTH) -> str:
    """What stands above the blocks when they are shown one by one: the machine, the columns."""
    return f"{formatting.where(run.conditions)}\n{textwrap.fill(LEGEND, width)}"


def summary(run: Run, *, width: int = WIDTH) -> str:
    """What stands below them: how ours fared in each case, and the measured ceilings."""
    return "\n\n".join(_summary(run, width, _bare))


def show(
    source: Run | Iterable[Result],
    *,
    ceilings: Iterable[Ceiling] = (),
    width: int | None = None,
    color: bool | None = None,
    summary: bool = True,
    file: IO[str] | None = None,
) -> None:
    """Print the table to `file`, by default standard output.

    source    a run, or results alone; `summary=False` prints the blocks only, which is how they
              are shown one by one while a run goes on.
    ceilings  what was measured, where `source` is results alone: for the rate and its share.
    color     by default where the file is a terminal and NO_COLOR is not set.
    """
    out = sys.stdout if file is None else file
    if color is None:
        color = out.isatty() and not os.environ.get("NO_COLOR")
    if width is None:
        width = max(WIDTH, shutil.get_terminal_size().columns) if color else WIDTH
    run = formatting.as_run(source, ceilings)
    print(_render(run, width, summary, _color if color else _bare), file=out, flush=True)


_STYLES = {  # as terminals number them: 1 bold, 2 dim, 3 italic, 31 red, 33 yellow, 36 cyan
    "title": "1",
    "head": "2",
    "ours": "1;36",
    "tie": "2",
    "beats us": "33",
    "wrong": "1;31",
    "no time": "2;3",
}
Paint = Callable[[str, str], str]  # (words, mood) -> the same, colored


def _bare(words: str, _: str) -> str:
    return words


def _color(words: str, mood: str) -> str:
    return f"\x1b[{_STYLES[mood]}m{words}\x1b[0m" if mood in _STYLES else words


def _render(run: Run, width: int, summary: bool, paint: Paint) -> str:
    parts = [_block_text(block, width, paint) for block in blocks(run.results, run.ceilings)]
    if parts and summary:
        parts.insert(0, paint(textwrap.fill(LEGEND, width), "head"))
    if summary:
        parts += _summary(run, width, paint)
    return "\n\n".join(parts) + "\n"


def _summary(run: Run, width: int, paint: Paint) -> list[str]:
    said = _tallies(run, width, paint), _ceilings(run, paint)
    return [words for words in said if words]


def _block_text(block: Block, width: int, paint: Paint) -> str:
    """The block's lines; where they are too long, narrower gaps, then long names on their own."""
    timed = [block.row(line) for line in block.lines if line.cells]
    gap, longest, first, rows = "", 0, 0, [""]
    for gap, longest in (("  ", sys.maxsize), (" ", sys.maxsize), (" ", _LONG_NAME)):
        first = max((len(x.rival) for x in block.lines if len(x.rival) <= longest), default=0)
        rows = align([block.columns, *timed], gap, ">")
        if 2 + first + len(gap) + max(map(len, rows)) <= width:
            break
    start, figures = f"  {{:{first}}}{gap}".format, iter(rows)
    said = [paint(block.title, "title")]
    if timed:
        said.append(paint(start("") + next(figures), "head"))
    for line in block.lines:
        name = line.rival
        if not line.cells:
            indent = f"  {name:{first}}  "
            after = " " * min(len(indent), width // 2)
            why = textwrap.fill(line.why, width, initial_indent=indent, subsequent_indent=after)
            said.append(paint(why, line.mood))
            continue
        if len(name) > longest:
            said.append(paint(f"  {name}", line.mood))
            name = ""
        said.append(paint(start(name) + next(figures), line.mood))
    return "\n".join(said)


def _tallies(run: Run, width: int, paint: Paint) -> str:
    tallied = formatting.tallies(run.results)
    if not tallied:
        return ""
    heads = ["faster", "tie", "slower", "no rival", "no time", "x of the best rival"]
    rows = [
        [*(str(n or "") for n in (t.faster, t.tie, t.slower, t.alone, t.no_time)), t.between]
        for t in tallied
    ]
    keep = [i for i, name in enumerate(heads) if i < 3 or any(row[i] for row in rows)]
    table = align([[row[i] for i in keep] for row in [heads, *rows]], flush=">")
    first = max(len(t.case) for t in tallied)
    said = [paint(textwrap.fill(formatting.headline(run.results), width), "title")]
    said.append(paint(f"  {'':{first}}  {table[0]}", "head"))
    said += [f"  {t.case:{first}}  {cells}" for t, cells in zip(tallied, table[1:], strict=True)]
    return "\n".join(said)


def _ceilings(run: Run, paint: Paint) -> str:
    if not run.ceilings:
        return ""
    first = max(len(c.what) for c in run.ceilings)
    said = [paint("Measured ceilings of this machine", "title")]
    return "\n".join(
        [*said, *(f"  {c.what:{first}}  {formatting.ceiling_words(c)}" for c in run.ceilings)]
    )
