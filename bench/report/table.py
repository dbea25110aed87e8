"""A run as a table: a block for each measurement, a line for each rival, a summary at the end.

Plain aligned text, which is enough alone in a log; colours through rich where it is installed and
the output is a terminal.  Losing shapes stay; a rival without a time stays, with its reason.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import IO

from fastssl.bench.record import Ceiling, Result, Run
from fastssl.bench.registry import OURS
from fastssl.bench.report import formatting
from fastssl.bench.report.formatting import number, percent

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
    fancy: bool | None = None,
    summary: bool = True,
    file: IO[str] | None = None,
) -> None:
    """Print the table to `file`, by default standard output.

    source    a run, or results alone; `summary=False` prints the blocks only, which is how they
              are shown one by one while a run goes on.
    ceilings  what was measured, where `source` is results alone: for the rate and its share.
    fancy     colours by rich; by default where it is installed and the file is a terminal.
    """
    out = sys.stdout if file is None else file
    if fancy is None:
        fancy = out.isatty()
    run = formatting.as_run(source, ceilings)
    if not (fancy and find_spec("rich")):
        print(_render(run, width or WIDTH, summary, _bare), file=out, flush=True)
        return
    from rich.console import Console
    from rich.markup import escape

    console = Console(file=out, force_terminal=True, highlight=False, soft_wrap=True)
    paint = {name: f"[{style}]{{}}[/]" for name, style in _STYLES.items()}
    console.print(
        _render(
            run,
            width or max(WIDTH, console.width),
            summary,
            lambda words, mood: paint.get(mood, "{}").format(escape(words)),
        )
    )


_STYLES = {
    "title": "bold",
    "head": "dim",
    "ours": "bold cyan",
    "tie": "dim",
    "beats us": "yellow",
    "wrong": "bold red",
    "no time": "dim italic",
}
Paint = Callable[[str, str], str]  # (words, mood) -> the same, coloured


def _render(run: Run, width: int, summary: bool, paint: Paint) -> str:
    parts = [_block_text(block, width, paint) for block in blocks(run.results, run.ceilings)]
    if parts and summary:
        parts.insert(0, paint(textwrap.fill(LEGEND, width), "head"))
    if summary:
        parts += _summary(run, width, paint)
    return "\n\n".join(parts) + "\n"


def _bare(words: str, _: str) -> str:
    return words


def _summary(run: Run, width: int, paint: Paint) -> list[str]:
    said = _tallies(run, width, paint), _ceilings(run, paint)
    return [words for words in said if words]


def _block_text(block: Block, width: int, paint: Paint) -> str:
    timed = [line for line in block.lines if line.cells]
    heads = list(block.columns)
    rows = [[line.cells.get(name, "") for name in heads] for line in timed]
    names = [line.rival for line in block.lines]
    gap, own_line = "  ", False
    for gap, own_line in (("  ", False), (" ", False), (" ", True)):
        first = max((len(n) for n in names if not (own_line and len(n) > _LONG_NAME)), default=0)
        table = _aligned([heads, *rows], gap)
        if 2 + first + max(map(len, table)) <= width:
            break
    said = [paint(block.title, "title")]
    if timed:
        said.append(paint(f"  {'':{first}}{table[0]}", "head"))
    numbers = iter(table[1:])
    for line in block.lines:
        if not line.cells:
            said.append(paint(_wrapped(line, first, width), line.mood))
        elif own_line and len(line.rival) > _LONG_NAME:
            said += [paint(f"  {line.rival}", line.mood)]
            said += [paint(f"  {'':{first}}{next(numbers)}", line.mood)]
        else:
            said.append(paint(f"  {line.rival:{first}}{next(numbers)}", line.mood))
    return "\n".join(said)


def _aligned(rows: Sequence[Sequence[str]], gap: str) -> list[str]:
    """The rows with every column as wide as its widest cell, right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "".join(f"{gap}{cell:>{wide}}" for cell, wide in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _wrapped(line: Line, first: int, width: int) -> str:
    start = f"  {line.rival:{first}}  "
    return textwrap.fill(
        line.why, width, initial_indent=start, subsequent_indent=" " * min(len(start), width // 2)
    )


def _tallies(run: Run, width: int, paint: Paint) -> str:
    tallied = formatting.tallies(run.results)
    if not tallied:
        return ""
    heads = ["faster", "tie", "slower", "no rival", "no time", "x of the best rival"]
    rows = [
        [*(str(n or "") for n in (t.faster, t.tie, t.slower, t.alone, t.no_time)), between(t)]
        for t in tallied
    ]
    keep = [i for i, name in enumerate(heads) if i < 3 or any(row[i] for row in rows)]
    table = _aligned([[row[i] for i in keep] for row in [heads, *rows]], "  ")
    first = max(len(t.case) for t in tallied)
    said = [paint(textwrap.fill(formatting.headline(run.results), width), "title")]
    said.append(paint(f"  {'':{first}}{table[0]}", "head"))
    said += [f"  {t.case:{first}}{cells}" for t, cells in zip(tallied, table[1:], strict=True)]
    return "\n".join(said)


def between(tally: formatting.Tally) -> str:
    """The least and the largest x of a best rival: "0.93 to 5.20", one number when they agree."""
    if tally.low is None or tally.high is None:
        return ""
    low, high = number(tally.low), number(tally.high)
    return low if low == high else f"{low} to {high}"


def _ceilings(run: Run, paint: Paint) -> str:
    if not run.ceilings:
        return ""
    first = max(len(c.what) for c in run.ceilings)
    said = [paint("Measured ceilings of this machine", "title")]
    return "\n".join(
        [*said, *(f"  {c.what:{first}}  {formatting.ceiling_words(c)}" for c in run.ceilings)]
    )
