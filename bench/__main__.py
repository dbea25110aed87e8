"""`python -m fastssl.bench`: a table of the losses' times beside their rivals'.

Exit code 0; 1 when one of our own losses is wrong, and then it has no time.
"""

import argparse
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from fastssl.bench.harness import OURS, Timing, run_case
from fastssl.bench.losses import cases


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark that `argv` asks for, print its table, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fastssl.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes, under 20 s")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    args = parser.parse_args(argv)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    size = "quick" if args.quick else "cuda" if device.type == "cuda" else "cpu"
    conditions = describe(device)
    print(f"{conditions['device']}, torch {conditions['versions']['torch']}, {args.dtype}")
    print("forward + backward, milliseconds; x: median over that of fastssl\n")
    timings: list[Timing] = []
    for case in cases(size):
        done = run_case(case, dtype, device, budget_s=1.0 if args.quick else 5.0)
        print(table(done), flush=True)
        timings += done
    if args.json:
        words = ["python", "-m", "fastssl.bench", *(sys.argv[1:] if argv is None else argv)]
        record = {**conditions, "command": shlex.join(words), "results": [*map(row, timings)]}
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return int(any(t.wrong for t in timings if t.rival == OURS))


def table(timings: Sequence[Timing]) -> str:
    """One case as text, a line for each rival; a wrong one says why instead of a time."""
    first = timings[0]
    shape = ", ".join(f"{name}={value}" for name, value in first.shape.items())
    lines = [f"{first.case}  {shape}", f"  {'':10}{'p20':>9}{'p50':>9}{'p80':>9}{'x':>8}{'MiB':>8}"]
    ours = next((t.percentiles()[1] for t in timings if t.rival == OURS and not t.wrong), None)
    for t in timings:
        if t.wrong:
            lines.append(f"  {t.rival:10}WRONG: {t.wrong}")
            continue
        p20, p50, p80 = t.percentiles()
        ratio = "" if ours is None else f"{p50 / ours:.2f}"
        peak = "" if t.peak_mib is None else f"{t.peak_mib:.0f}"
        lines.append(f"  {t.rival:10}{p20:9.2f}{p50:9.2f}{p80:9.2f}{ratio:>8}{peak:>8}")
    return "\n".join(lines) + "\n"


def row(timing: Timing) -> dict[str, object]:
    """`timing` for JSON: percentiles instead of every time, none when it is wrong."""
    result = {key: value for key, value in asdict(timing).items() if key != "times_ms"}
    result["rounds"] = len(timing.times_ms)
    if not timing.wrong:
        result |= zip(("p20_ms", "p50_ms", "p80_ms"), timing.percentiles(), strict=True)
    return result


def describe(device: torch.device) -> dict:
    """Where and with what this runs: device, threads, versions, time."""
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else platform.processor() or "CPU"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("fastssl", "triton", "lightly"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "device": f"{name}" if on_gpu else f"{name}, {torch.get_num_threads()} threads",
        "matmul_precision": torch.get_float32_matmul_precision(),
        "versions": versions,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


if __name__ == "__main__":
    sys.exit(main())
