"""Which configuration of each Triton kernel is fastest on this GPU.

    python -m fastssl.bench.tune                           every kernel and shape class, 7 minutes
    python -m fastssl.bench.tune --kernel '*bwd' --write   some, kept in kernels/tuned.json
    python -m fastssl.bench.tune --json tuned.jsonl        also as JSON lines, as they come

Every candidate of a class is launched once beside the safe one; where its result is another, it is
wrong and gets no time.  The others' median time is taken with a cold L2.  What failed, what the GPU
has not the resources for and what there was no time left for stay in the table as such.
The last lines are a block for kernels/tuned.json, which --write merges into it.

The exit status is 0; 1 when a candidate was wrong or failed, and 2 without a GPU to time on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastssl.bench.compiler.aot import choose_kernels, label
from fastssl.bench.record import conditions, write_line
from fastssl.bench.report.formatting import align
from fastssl.kernels.common import tuning
from fastssl.kernels.common.gpu import gpu_of, on_gpu
from fastssl.kernels.common.tuning import Clock, Config, Kernel, Variant

PROGRAM = "python -m fastssl.bench.tune"
OK, WRONG, FAILED, SCARCE, LEFT = "ok", "wrong", "failed", "out of resources", "no time left"


@dataclass(frozen=True)
class Timing:
    """What became of one candidate; ms is its median, where it is ok."""

    kernel: str
    variant: str
    config: Config
    status: str
    ms: float | None = None
    why: str = ""


@dataclass(frozen=True)
class Launched:
    """A candidate after its first launch."""

    config: Config
    launch: Callable[[], Any] | None
    result: list[Tensor]
    status: str = OK
    why: str = ""


@dataclass(frozen=True)
class Bench:
    """Where and how it is timed.  jobs: compilations at once; end: by `now`, in seconds."""

    device: torch.device
    clock: Clock
    jobs: int
    end: float
    now: Callable[[], float] = time.monotonic


def tune(kernels: Iterable[Kernel], bench: Bench) -> Iterator[Timing]:
    """Every candidate of every class, the classes of a kernel in its own order."""
    longest = 0.0
    for kernel in kernels:
        for variant in kernel.variants.values():
            start = bench.now()
            if start + longest > bench.end:
                for config in variant.tried(arch_of(bench.device)):
                    yield Timing(kernel.name, variant.name, config, LEFT)
                continue
            yield from _tune_class(kernel.name, variant, bench)
            longest = max(longest, bench.now() - start)


def _tune_class(kernel: str, variant: Variant, bench: Bench) -> Iterator[Timing]:
    safe = launch_once(variant, variant.safe, bench.device)
    others = [c for c in variant.tried(arch_of(bench.device)) if c != variant.safe]
    with ThreadPoolExecutor(bench.jobs) as pool:  # most of a first launch is compilation
        first = partial(launch_once, variant, device=bench.device)
        launched = [safe, *pool.map(first, others)]
    for one in launched:
        status, why, ms = one.status, one.why, None
        if status == OK and safe.status != OK:
            status, why = FAILED, "the safe configuration failed: nothing to compare it with"
        if status == OK:
            why = difference(one.result, safe.result)
            status = WRONG if why else OK
        if status == OK and bench.now() > bench.end:
            status = LEFT
        if status == OK and one.launch:
            ms = bench.clock(one.launch)
        yield Timing(kernel, variant.name, one.config, status, ms, why)


def arch_of(device: torch.device) -> str:
    """A GPU's architecture, as tuned.json names it; "" of a CPU."""
    return gpu_of(device).arch if on_gpu(device) else ""


def launch_once(variant: Variant, config: Config, device: torch.device) -> Launched:
    """Compile and launch once."""
    from triton.runtime.errors import OutOfResources

    try:
        launch = variant.trial(config, device)
        result = launch()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except OutOfResources as error:
        return Launched(config, None, [], SCARCE, str(error))
    except Exception as error:  # a compiler or a GPU raises what it likes: it is in the table
        first = (str(error).strip() or "no message").splitlines()[0]
        return Launched(config, None, [], FAILED, f"{type(error).__name__}: {first}")
    return Launched(config, launch, [result] if isinstance(result, Tensor) else list(result))


def difference(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> str:
    """In words, or "" for the same but for the order of sums: 8 eps of 16 bits, 1e-4 of float32.

    Whole numbers must be equal.
    """
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        if not b.numel():
            continue
        error = (a.double() - b.double()).abs().max().item()
        size = b.double().abs().max().item()
        eps = torch.finfo(b.dtype).eps if b.is_floating_point() else 0.0
        allowed = max(8 * eps, 1e-4) * size if eps else 0.0
        if not error <= allowed:
            return f"output {i} is off by {error:.2e} where the safe one has up to {size:.2e}"
    return ""


def best(timings: Iterable[Timing]) -> dict[tuple[str, str], Timing]:
    """The fastest of each class that has one, by (kernel, class)."""
    fastest: dict[tuple[str, str], Timing] = {}
    for t in timings:
        known = fastest.get((t.kernel, t.variant))
        if t.ms is not None and (known is None or known.ms is None or t.ms < known.ms):
            fastest[t.kernel, t.variant] = t
    return fastest


def report(timings: Sequence[Timing]) -> str:
    """One line a candidate; a star marks the fastest of its class."""
    fastest = set(map(id, best(timings).values()))
    rows = [["", "kernel", "class", "configuration", "ms", ""]]
    for t in timings:
        star, ms = "*" if id(t) in fastest else "", "-" if t.ms is None else f"{t.ms:.4f}"
        note = "" if t.status == OK else f"{t.status}: {t.why}" if t.why else t.status
        rows.append([star, t.kernel, t.variant, label(t.config), ms, note])
    return "\n".join(align(rows))


Table = dict[str, dict[str, dict[str, dict[str, Any]]]]  # kernel, architecture, class: entry


def entries(timings: Iterable[Timing], arch: str, measured: str) -> Table:
    """The fastest configurations as tuned.json has them."""
    table: Table = {}
    for (kernel, variant), t in best(timings).items():
        entry = {**t.config.fields(), "ms": round(t.ms or 0.0, 4), "measured": measured}
        table.setdefault(kernel, {}).setdefault(arch, {})[variant] = entry
    return table


def merge(old: Table, new: Table) -> Table:
    """The old table with the new entries in the place of those they stand for."""
    result = {kernel: {a: dict(v) for a, v in archs.items()} for kernel, archs in old.items()}
    for kernel, archs in new.items():
        for arch, variants in archs.items():
            result.setdefault(kernel, {}).setdefault(arch, {}).update(variants)
    return result


def text(table: Table) -> str:
    """The table as JSON, an entry a line.

    >>> print(text({"k": {"sm_90": {"D64": {"ms": 1.0}}}}))
    {
     "k": {
      "sm_90": {
       "D64": {"ms": 1.0}
      }
     }
    }
    """

    def block(content: Mapping[str, Any], depth: int) -> str:
        if depth == 3:
            return json.dumps(content)
        pad = " " * (depth + 1)
        lines = [f"{pad}{json.dumps(k)}: {block(v, depth + 1)}" for k, v in content.items()]
        return "{\n" + ",\n".join(lines) + "\n" + " " * depth + "}"

    return block(table, 0)


def _parser() -> argparse.ArgumentParser:
    first, _, rest = (__doc__ or "").partition("\n\n")
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(PROGRAM, None, first, rest, formatter_class=plain)
    add = parser.add_argument
    add("--kernel", default="*", metavar="PATTERN", help="which kernels, by name")
    add("--minutes", type=float, default=7.0, help="begin nothing after them (default 7)")
    add("--jobs", type=int, default=8, help="compilations at once (default 8)")
    add("--json", type=Path, metavar="FILE", help="also write the timings there, as JSON lines")
    add("--write", action="store_true", help="merge the fastest into kernels/tuned.json")
    return parser


def main(
    argv: Sequence[str] | None = None,
    device: torch.device | None = None,
    clock: Clock = tuning.median_ms,
    now: Callable[[], float] = time.monotonic,
) -> int:
    """The command; returns the exit status.  Tests alone pass a device and a clock."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv)
    try:
        if device is None and not torch.cuda.is_available():
            raise ValueError("tuning needs a CUDA GPU, and torch sees none")
        chosen = choose_kernels(args.kernel, args.json, PROGRAM, interpreted=device is not None)
    except ValueError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    device = device or torch.device("cuda", torch.cuda.current_device())
    where = conditions(device, [*PROGRAM.split(), *argv])
    if args.json:
        args.json.unlink(missing_ok=True)
        write_line(args.json, "run", where)
    timings = []
    for timing in tune(chosen, Bench(device, clock, args.jobs, now() + 60 * args.minutes, now)):
        timings.append(timing)
        if args.json:
            write_line(args.json, "timing", asdict(timing))
        print(f"{timing.variant}, {label(timing.config)}: {timing.status}", file=sys.stderr)
    print(report(timings))
    left = {(t.kernel, t.variant) for t in timings if t.status == LEFT}
    if left:
        print(f"no time left for {len(left)} classes: {', '.join(' '.join(x) for x in left)}")
    version = where["versions"].get("triton", "?")
    measured = f"{where['device']}, triton {version}, {date.today().isoformat()}"
    tuned = entries(timings, where["arch"] or "cpu", measured)
    print(text(tuned))
    if args.write:
        old = json.loads(tuning.TABLE.read_text(encoding="utf-8"))
        tuning.TABLE.write_text(text(merge(old, tuned)) + "\n", encoding="utf-8")
    return 1 if any(t.status in (WRONG, FAILED) for t in timings) else 0


if __name__ == "__main__":
    sys.exit(main())
