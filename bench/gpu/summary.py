"""What a command on a GPU has found, in at most a hundred lines: failures first, then times.

The end of an output is what is kept of it where a machine is lent for minutes: most that matters
must stand there, in MOST characters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastssl.bench.gpu import lines

MOST, WIDTH = 11_500, 150  # characters of all, and of a line
FAILURES = 40  # lines of them
PRODUCTS = 60.0  # operations a byte from which a time is told in operations
Line = Mapping[str, Any]


def summary(path: Path) -> str:
    """Of a record: counts, failures, what was not reached, and what was measured."""
    record = lines.read(path)
    said = [*_machine(record), *_counts(record), *_notes(record)]
    times = [*_trained(record), *_profiled(record), *_times(record)]
    room = min(FAILURES, 98 - len(said) - len(times))
    said += _failures(record, max(3, room), path) + times
    while len("\n".join(said)) > MOST and len(said) > 10:  # the longest first
        longest = max(range(len(said)), key=lambda i: len(said[i]))
        said[longest] = said[longest][: max(40, len(said[longest]) - 20)]
        if len(said[longest]) <= 40:
            break
    return "\n".join(said)


def _machine(record: Sequence[Line]) -> list[str]:
    found = [line for line in record if line["kind"] == "machine"]
    words = ("gpu", "arch", "cuda", "torch", "triton", "cache", "commit")
    flat = [{**line.get("conditions", {}), **line} for line in found[-1:]]
    return [", ".join(f"{w} {line[w]}" for w in words if line.get(w)) for line in flat]


def _step(line: Line) -> str:
    """The step that a child is a part of: memcheck-2 of memcheck."""
    return line["child"].rpartition("-")[0] or line["child"]


def _counts(record: Sequence[Line]) -> list[str]:
    """For each step how many cases passed and failed, how many were not reached, and when."""
    steps = list(dict.fromkeys(_step(x) for x in record if x["kind"] in ("case", "left")))
    said = []
    for step in steps:
        mine = [line for line in record if _step(line) == step]
        counts = Counter(bool(line["ok"]) for line in lines.cases(mine))
        left = sum(len(line["names"]) for line in mine if line["kind"] == "left")
        words = f"{step:10} {counts[True]:4} passed, {counts[False]} failed"
        words += f", {left} not reached" if left else ""
        said.append(f"{words}, {mine[0]['t']:.0f} to {mine[-1]['t']:.0f} s")
    return said


def _notes(record: Sequence[Line]) -> list[str]:
    said = []
    for line in record:
        if line["kind"] == "note" and "refused" in line:
            said.append(f"{line['child']}: not run: {line['refused']}"[:WIDTH])
        elif line["kind"] == "note" and "absent" in line:
            said.append(f"absent: {', '.join(line['absent'])}; {line['words']}"[:WIDTH])
    return list(dict.fromkeys(said))[:8]


def _failures(record: Sequence[Line], room: int, path: Path) -> list[str]:
    failed = [line for line in lines.cases(list(record)) if not line["ok"]]
    said = [f"FAILED {x['child']} {x['case']}: {x.get('why', '?')}"[:WIDTH] for x in failed]
    more = [f"and {len(said) - room + 1} more failures, in {path}"]
    return said if len(said) <= room else said[: room - 1] + more


def _trained(record: Sequence[Line]) -> list[str]:
    said = []
    for line in lines.cases(list(record)):
        if line["case"].startswith("train ") and "ms" in line:
            rate = f"{line['ms']:.1f} ms, {line['images_per_s']:.0f} images/s"
            share = f"{line['tflops']:.0f} TFLOP/s, {_percent(line['share'])} of a product's rate"
            memory = f", {line['peak_gib']:.1f} GiB" if "peak_gib" in line else ""
            said.append(f"{line['case']}: {rate}, {share}{memory}"[:WIDTH])
    return said


def _profiled(record: Sequence[Line]) -> list[str]:
    found = [x for x in lines.cases(list(record)) if "metrics" in x]
    return [text[:WIDTH] for line in found for text in line["metrics"]][:16]


def _times(record: Sequence[Line]) -> list[str]:
    """A line a headline: ours before and after tuning, beside eager."""
    rows: dict[str, dict[str, dict[str, Line]]] = {}
    for line in lines.cases(list(record)):
        for row in line.get("rows", ()):
            if row["ms"]:
                rows.setdefault(line["case"], {}).setdefault(line["child"], {})[row["rival"]] = row
        if "ceilings" in line and line["child"] == "before":
            ceilings = [f"{c['what']} {c['measured']:.0f} {c['unit']}" for c in line["ceilings"]]
            rows.setdefault("; ".join(ceilings), {})
    if not rows:
        return []
    said = [f"{'ms forward + backward':43} {'before':>8} {'fwd':>8} {'CPU us':>6} {'rate':>10}"]
    said[0] += f" {'floor':>5} {'eager':>8} {'after':>8}"
    for name, runs in rows.items():
        before = runs.get("before", {})
        after = _ms(runs.get("after", {}).get("fastssl"))
        said.append(_time(name, before, after) if runs else name)
    return said


def _time(name: str, before: Mapping[str, Line], after: str) -> str:
    ours = before.get("fastssl")
    text = f"{name:43} {_ms(ours):>8} {_ms(ours, 'fwd'):>8} {_enqueued(ours):>6} {_rate(ours):>10}"
    text += f" {_percent(ours['share']) if ours else '-':>5} {_ms(before.get('reference')):>8}"
    text += f" {after:>8}"
    others = {k.split()[-1]: _passes(row) for k, row in before.items() if k.startswith("fastssl ")}
    return text + "".join(f" {word} {ms}" for word, ms in others.items())


def _passes(row: Line) -> str:
    """The medians of forward and backward, which may each be another's; else that of the call."""
    found = [_ms(row, part) for part in ("fwd", "bwd")]
    return _ms(row) if "-" in found else "+".join(found)


def _ms(row: Line | None, part: str = "") -> str:
    """The median of a pass, by default of the whole call."""
    if row is None:
        return "-"
    spread = row["ms"].get(part) if part else row["ms"].get("step") or row["ms"].get("run")
    return f"{spread['p50']:.3f}" if spread else "-"


def _enqueued(row: Line | None) -> str:
    """Microseconds until the processor had launched the call."""
    found = row and row["ms"].get("enqueue")
    return f"{1e3 * found['p50']:.0f}" if found else "-"


def _rate(row: Line | None) -> str:
    """In operations where there are many for each byte, else in bytes."""
    if row is None:
        return "-"
    flops, moved = sum(row["flops"].values()), sum(row["bytes_moved"].values())
    if row["tflops"] and flops > PRODUCTS * moved:
        return f"{row['tflops']:.0f} TF/s"
    return f"{row['gbs']:.0f} GB/s" if row["gbs"] else "-"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}%"
