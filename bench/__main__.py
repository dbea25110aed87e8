"""`fastssl bench`, or `python -m fastssl.bench`: losses, kernels and training beside their rivals.

Exit code 0; 1 when one of ours is wrong or failed, or --compare finds that ours regressed; 2 for
a mistake in the command.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from fastssl.bench import record
from fastssl.bench.cases import select
from fastssl.bench.measure.peaks import measure_ceilings
from fastssl.bench.measure.run import Settings, plan, run_case
from fastssl.bench.record import Ceiling, Run
from fastssl.bench.registry import GRID, OURS, SIZES, Case, Shape
from fastssl.bench.report import compare, table
from fastssl.bench.report.published import quote
from fastssl.bench.report.scaling import fits

DTYPES = ("float32", "bfloat16", "float16")
SLOW_TO_START = "compile"  # a minute of C++ or Triton before the first time


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark that `argv` asks for, and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    args = parser.parse_args(words)
    try:
        if args.compare:
            text, code = compare.compare_files(*args.compare)
            print(text)
            return code
        cases = select(args.cases)
        if args.list:
            print(_listing(cases))
            return 0
        return _run(args, cases, ["python", "-m", "fastssl.bench", *words])
    except (ValueError, OSError) as error:
        parser.exit(2, f"fastssl bench: {error}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastssl bench", description=__doc__)
    add = parser.add_argument
    add(
        "cases", nargs="*", metavar="CASE", help="names, families (data), patterns ('train-*'); all"
    )
    add("--list", action="store_true", help="say which cases there are, and stop")
    add("--quick", action="store_true", help="small shapes, under a minute on a CPU")
    add("--size", choices=(*SIZES, GRID), help="shapes; by default cuda on a GPU, else cpu")
    add("--shape", action="append", metavar="B=4096,D=512", help="your own instead; again for more")
    add("--sweep", action="store_true", help="the sweeps: how time and memory grow")
    add("--dtype", choices=DTYPES, action="append", help="may be given again; float32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--rival", action="append", metavar="NAME", help="only this one beside ours and eager")
    add("--budget", type=float, metavar="S", help="seconds of rounds for a case at a shape; 5")
    add("--no-memory", action="store_true", help="leave peak memory out (CPU: a process a rival)")
    add("--json", type=Path, metavar="FILE", help="write the record there, line by line")
    add("--report", type=Path, metavar="DIR", help="record, plots and a page into that folder")
    add("--compare", nargs=2, type=Path, metavar=("A", "B"), help="what B changed since A")
    return parser


def _run(args: argparse.Namespace, cases: Sequence[Case], command: Sequence[str]) -> int:
    device = _device(args.device)
    size = args.size or ("quick" if args.quick else device.type if device.type in SIZES else "cpu")
    dtypes = args.dtype or ["float32"]
    own = [_shape(text) for text in args.shape or ()]
    if own and (args.sweep or args.size or args.quick):
        raise ValueError("--shape stands for a size of shapes: without --size, --quick or --sweep")
    todo = list(plan(cases, size, dtypes, sweep=args.sweep, own=own))
    if not todo:
        kind = "sweep" if args.sweep else "shape"
        raise ValueError(
            f"none of these cases has a {kind} of size {size!r} in {', '.join(dtypes)}"
        )
    path = _record_path(args)
    start = time.perf_counter()
    run = Run(record.conditions(device, command))
    print(_heading(run, todo, args))
    _keep(path, "run", run.conditions)
    for ceiling in measure_ceilings(device, tuple(dtypes)):
        run.ceilings.append(ceiling)
        _keep(path, "ceiling", ceiling)
    for case, shape, dtype, variable in todo:
        settings = _settings(args, device, dtype, run.ceilings)
        rows = run_case(case, shape, settings, sweep=variable)
        run.results.extend(rows)
        for row in rows:
            _keep(path, "result", row)
        table.show(rows, ceilings=run.ceilings, summary=False)
    return _finish(args, run, path, time.perf_counter() - start)


def _finish(args: argparse.Namespace, run: Run, path: Path | None, seconds: float) -> int:
    names = {row.case for row in run.results}
    run.fits.extend(fits(run.results))
    run.published.extend(quote(names))
    run = Run(**{**vars(run), "seconds": seconds})
    for kind, lines in (("fit", run.fits), ("published", run.published)):
        for line in lines:
            _keep(path, kind, line)
    _keep(path, "end", {"seconds": seconds})
    print(table.summary(run))
    unknown = sorted({*(args.rival or ())} - {row.rival for row in run.results})
    if unknown:
        print(f"no case measured here has a rival called {', '.join(unknown)}", file=sys.stderr)
    if args.report:
        _report(run, args.report)
    elif path:
        print(f"record: {path}")
    ours = [row for row in run.results if row.rival.startswith(OURS)]
    return int(any(row.status in ("wrong", "failed") for row in ours))


def _report(run: Run, folder: Path) -> None:
    from fastssl.bench.report.page import write_page

    if find_spec("matplotlib"):
        from fastssl.bench.report.figures import save_all

        print(*save_all(run, folder), sep="\n")
    else:
        print("no pictures: pip install matplotlib")
    print(write_page(run, folder / "index.html"))


def _settings(
    args: argparse.Namespace, device: torch.device, dtype: str, ceilings: Sequence[Ceiling]
) -> Settings:
    quick = args.quick or args.size == "quick"
    return Settings(
        device=device,
        dtype=getattr(torch, dtype),
        ceilings=ceilings,
        budget_s=args.budget if args.budget is not None else 0.5 if quick else 5.0,
        rivals=frozenset(args.rival) if args.rival else None,
        without=frozenset([SLOW_TO_START]) if quick else frozenset(),
        memory=not args.no_memory,
    )


def _shape(text: str) -> Shape:
    """The sides of "B=4096,D=512"."""
    shape = {}
    for part in text.split(","):
        side, _, number = part.partition("=")
        if not side.isidentifier() or not number.isdecimal() or int(number) < 1 or side in shape:
            raise ValueError(f"--shape must be like B=4096,D=512, sides of 1 or more, got {text!r}")
        shape[side] = int(number)
    return shape


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: {reason}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {name}")
    return device


def _record_path(args: argparse.Namespace) -> Path | None:
    """Where the record goes; its folder is made, an old record there is removed."""
    path = args.json or (args.report / "results.jsonl" if args.report else None)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
    return path


def _keep(path: Path | None, kind: str, content: object) -> None:
    if path is not None:
        record.write_line(path, kind, content)


def _heading(run: Run, todo: Sequence[tuple], args: argparse.Namespace) -> str:
    said = [table.heading(run), f"{len(todo)} measurements"]
    if (args.quick or args.size == "quick") and not args.rival:
        said[-1] += f"; rival left out: {SLOW_TO_START} (it takes a minute to start)"
    return "\n".join(said) + "\n"


def _listing(cases: Sequence[Case]) -> str:
    width = max(len(case.name) for case in cases)
    lines = [f"{case.name:{width}}  {case.about}  [{', '.join(case.dtypes)}]" for case in cases]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
