"""What changed between two runs: regressions first, and nothing that is only noise."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastssl.bench.record import Result, Run, read
from fastssl.bench.registry import OURS
from fastssl.bench.report.formatting import Key, is_ours, key_of, number, percent, shape_words, size

LEAST_BYTES = 1 << 20  # smaller differences of memory are pages, not a change
_MACHINE = {
    "device": "device",
    "type": "type",
    "threads": "threads",
    "float32_products": "precision of float32 products",
}
_SOFTWARE = ("torch", "triton")
_NO_TIME = ("wrong", "failed", "out of memory")
REGRESSIONS = ("broken", "slower", "more memory")
_HEADS = {
    "broken": "No longer works",
    "slower": "Slower",
    "more memory": "More memory",
    "faster": "Faster",
    "less memory": "Less memory",
    "mended": "Works again",
    "new": "Only in the second run",
    "gone": "Only in the first run",
}


@dataclass(frozen=True)
class Change:
    """One difference between two runs.

    kind    "conditions" (then only `detail` is filled), "broken" (ok became wrong, failed or out
            of memory), "slower", "faster", "more memory", "less memory", "mended", "new", "gone".
    factor  the second run's figure over the first's, where there are two figures.
    """

    kind: str
    detail: str
    case: str = ""
    shape: str = ""
    dtype: str = ""
    rival: str = ""
    factor: float | None = None

    @property
    def regression(self) -> bool:
        """Whether the second run is worse here."""
        return self.kind in REGRESSIONS


def compare(a: Run, b: Run, *, threshold: float = 0.05) -> list[Change]:
    """What changed from run `a` to run `b`; rows matched by case, shape, dtype and rival.

    A row is slower when its median grew by more than `threshold` and more than either run's noise,
    and the spreads do not overlap: the second's 20th percentile lies above the first's 80th.
    Faster is the same the other way round.  Memory counts past 5 % and 1 MiB.  A row that was ok
    and is wrong, failed or out of memory is broken; one that is absent now is gone.  Differing
    conditions come first.
    Raises ValueError when the threshold is negative.
    """
    if threshold < 0:
        raise ValueError(f"threshold must be >= 0, a share of the time; got {threshold}")
    before, after = _by_key(a.results), _by_key(b.results)
    changes = [
        Change("conditions", words) for words in list_differences(a.conditions, b.conditions)
    ]
    for key in [*before, *(key for key in after if key not in before)]:
        changes += _row_changes(before.get(key), after.get(key), threshold)
    return changes


def list_differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """In which conditions two runs differ, those of the machine first; [] when they can be held
    against each other."""
    machine = [
        f"{name} {a.get(key)!s} and {b.get(key)!s}"
        for key, name in _MACHINE.items()
        if a.get(key) != b.get(key)
    ]
    ours, theirs = a.get("versions") or {}, b.get("versions") or {}
    software = [
        f"{name} {ours.get(name, 'none')} and {theirs.get(name, 'none')}"
        for name in _SOFTWARE
        if ours.get(name) != theirs.get(name)
    ]
    said = []
    if machine:
        words = "; ".join(machine)
        said.append(f"not the same machine: times cannot be compared ({words})")
    if software:
        said.append(f"not the same software: a change may be its own ({'; '.join(software)})")
    return said


def _by_key(results: Iterable[Result]) -> dict[tuple[Key, str], Result]:
    """Rows by what they are matched by; where a sweep repeats a shape the first one stands."""
    rows: dict[tuple[Key, str], Result] = {}
    for row in results:
        rows.setdefault((key_of(row), row.rival), row)
    return rows


def _row_changes(a: Result | None, b: Result | None, threshold: float) -> list[Change]:
    was, now = (row if row is not None and row.status != "absent" else None for row in (a, b))
    if was is None or now is None:
        row, kind = (now, "new") if was is None else (was, "gone")
        return [] if row is None else [_change(kind, row, row.status)]
    if was.status == "ok" and now.status in _NO_TIME:
        detail = f"{now.status}: {now.why}" if now.why else now.status
        return [_change("broken", now, detail)]
    if was.status in _NO_TIME and now.status == "ok":
        return [_change("mended", now, f"was {was.status}")]
    changes = (_time_change(was, now, threshold), _memory_change(was, now))
    return [change for change in changes if change is not None]


def _time_change(a: Result, b: Result, threshold: float) -> Change | None:
    if a.total is None or b.total is None:
        return None
    limit = 1 + max(threshold, a.noise or 0.0, b.noise or 0.0)
    factor = b.total.p50 / a.total.p50
    detail = f"{number(a.total.p50)} -> {number(b.total.p50)} ms"
    if factor > limit and b.total.p20 > a.total.p80:
        return _change("slower", b, detail, factor)
    if factor < 1 / limit and b.total.p80 < a.total.p20:
        return _change("faster", b, detail, factor)
    return None


def _memory_change(a: Result, b: Result, share: float = 0.05) -> Change | None:
    if a.peak is None or b.peak is None or abs(b.peak - a.peak) < LEAST_BYTES:
        return None
    factor = b.peak / a.peak if a.peak else float("inf")
    detail = f"{size(a.peak)} -> {size(b.peak)}"
    if factor > 1 + share:
        return _change("more memory", b, detail, factor)
    return _change("less memory", b, detail, factor) if factor < 1 / (1 + share) else None


def _change(kind: str, row: Result, detail: str, factor: float | None = None) -> Change:
    return Change(kind, detail, row.case, shape_words(row.shape), row.dtype, row.rival, factor)


def report(changes: Sequence[Change], *, width: int = 100) -> str:
    """The changes as text: conditions first, then regressions, ours before the others'."""
    parts = [
        textwrap.fill(f"WARNING: {c.detail}", width, subsequent_indent="  ")
        for c in changes
        if c.kind == "conditions"
    ]
    for kind, head in _HEADS.items():
        group = [c for c in changes if c.kind == kind]
        if group:
            lines = [_line(c, width) for c in sorted(group, key=lambda c: not is_ours(c.rival))]
            parts.append("\n".join([f"{head} ({len(group)})", *lines]))
    worse = [c for c in changes if c.regression]
    mine = sum(is_ours(c.rival) for c in worse)
    if worse:
        plural = "s" if len(worse) > 1 else ""
        parts.append(f"{len(worse)} regression{plural}, {mine} of them {OURS}'s.")
    else:
        parts.append("No regression.")
    return "\n\n".join(parts) + "\n"


def _line(change: Change, width: int) -> str:
    words = [change.rival, change.case, change.shape, change.dtype]
    said = f"  {'  '.join(word for word in words if word)}: {change.detail}"
    if change.factor is not None and 0 < change.factor < float("inf"):
        share = change.factor - 1
        said += f"  ({'+' if share > 0 else '-'}{percent(abs(share))})"
    return textwrap.fill(said, width, subsequent_indent="    ")


def exit_code(changes: Iterable[Change]) -> int:
    """1 when ours regressed, else 0.  It does not look at the conditions: the text does."""
    return int(any(c.regression and is_ours(c.rival) for c in changes))


def compare_files(path_a: Path | str, path_b: Path | str) -> tuple[str, int]:
    """The report on two records (JSON lines) and the exit code.

    Raises ValueError for a file that is no record and for two that have no measurement in common,
    OSError for one that cannot be read.
    """
    a, b = read(Path(path_a)), read(Path(path_b))
    if not _by_key(a.results).keys() & _by_key(b.results).keys():
        held = (", ".join(dict.fromkeys(row.case for row in run.results)) for run in (a, b))
        raise ValueError(
            "nothing to compare: no case was measured at the same shape and dtype in both records; "
            + "; ".join(
                f"{path} has {names or 'none'}"
                for path, names in zip((path_a, path_b), held, strict=True)
            )
        )
    changes = compare(a, b)
    return report(changes), exit_code(changes)
