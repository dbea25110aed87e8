"""What a run leaves behind: JSON lines that say where, with what and how every figure came to be.

The first line is the run ("kind": "run", its conditions); then one line for each rival of each case
and shape ("result"), for each fitted exponent ("fit"), and for each figure quoted from elsewhere
("published"); the last is the end ("end": seconds).  A line is complete when it is written, so that
a run cut short loses nothing.
"""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fastssl import __version__
from fastssl.kernels.common.matmul import allows_tf32

PACKAGES = ("triton", "timm", "lightly", "open_clip_torch", "pytorch-metric-learning")
PACKAGES += ("siglip-kernel", "cut-cross-entropy", "memeff", "deepspeed", "torchvision", "numpy")


@dataclass(frozen=True)
class Spread:
    """Percentiles of the rounds, in milliseconds."""

    p20: float
    p50: float
    p80: float


@dataclass(frozen=True)
class Result:
    """What one rival did on one case at one shape.

    status  "ok"; "wrong": the gate is red, and then there is no time; "failed": it raised; "out of
            memory"; "absent": not installed, or not for this device.  `why` says more.
    ms      by pass: fwd, bwd and their sum step; or run alone.  On a GPU also enqueue: until the
            processor had launched the whole call.
    x       median over rounds of its time over ours, with a 95 % interval; a tie when the interval
            holds 1, or when x is nearer to 1 than ours to itself (`noise`, a share of the time).
    peak    bytes held at most beyond what was held before the call.
    floor   ms no implementation can beat here: the larger of operations over the measured matrix
            rate and bytes over the measured copy rate, summed over the passes.
    """

    case: str
    shape: dict[str, int]
    dtype: str
    rival: str
    status: str = "ok"
    why: str = ""
    gate: str = ""  # the test that proves the case, and the shape the answer was checked at
    rounds: int = 0
    ms: dict[str, Spread] = field(default_factory=dict)
    x: float | None = None
    x_low: float | None = None
    x_high: float | None = None
    tie: bool = False
    noise: float | None = None
    peak: int | None = None
    flops: dict[str, float] = field(default_factory=dict)
    bytes_moved: dict[str, float] = field(default_factory=dict)
    floor: float | None = None
    items: int | None = None
    unit: str = ""
    sweep: str = ""  # the variable, when this row belongs to a sweep

    @property
    def total(self) -> Spread | None:
        """The whole call: the step, or the run."""
        return self.ms.get("step") or self.ms.get("run")

    @property
    def tflops(self) -> float | None:
        """Needed operations over the median time, in TFLOP/s."""
        return self._rate(self.flops, 1e9)

    @property
    def gbs(self) -> float | None:
        """Needed bytes over the median time, in GB/s."""
        return self._rate(self.bytes_moved, 1e6)

    @property
    def items_per_s(self) -> float | None:
        """Items of one call over the median time."""
        return None if self.items is None else self._rate({"run": self.items}, 1e-3)

    def _rate(self, amounts: Mapping[str, float], unit: float) -> float | None:
        if self.total is None or not amounts:
            return None
        return sum(amounts.values()) / self.total.p50 / unit


@dataclass(frozen=True)
class Fit:
    """quantity ~ variable ** exponent, fitted to the sweep's points by least squares on logarithms.

    quantity  "ms" or "peak".  r2: the share of the variance of the logarithms it explains.
    """

    case: str
    dtype: str
    rival: str
    variable: str
    fixed: dict[str, int]
    quantity: str
    exponent: float
    r2: float
    points: int


@dataclass(frozen=True)
class Published:
    """A figure of somebody else's that is quoted, not measured."""

    case: str
    rival: str
    hardware: str
    shape: str
    dtype: str
    figure: str
    source: str


@dataclass(frozen=True)
class Ceiling:
    """What this machine was measured to reach in this run, beside its datasheet."""

    what: str  # "copy" (GB/s, read + written) or "matmul float32" (TFLOP/s) ...
    measured: float
    unit: str
    datasheet: float | None = None
    source: str = ""


@dataclass(frozen=True)
class Run:
    """The conditions of a run and everything it measured."""

    conditions: dict[str, Any]
    ceilings: list[Ceiling] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    fits: list[Fit] = field(default_factory=list)
    published: list[Published] = field(default_factory=list)
    seconds: float | None = None  # None: the run was cut short


_MADE_OF: dict[str, tuple[Any, str]] = {  # a line's kind: its class, and where a run keeps it
    "ceiling": (Ceiling, "ceilings"),
    "result": (Result, "results"),
    "fit": (Fit, "fits"),
    "published": (Published, "published"),
}


def conditions(device: torch.device, argv: Sequence[str]) -> dict[str, Any]:
    """Where and with what this runs: device, driver, threads, versions, commit, command, time."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "type": device.type,
        "arch": "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if on_gpu else "",
        "driver": _driver() if on_gpu else "",
        "cuda": torch.version.cuda or "",
        "threads": torch.get_num_threads(),
        "float32_products": "high" if allows_tf32() else "highest",
        "python": platform.python_version(),
        "versions": {"torch": str(torch.__version__), **_versions()},
        "commit": _commit(),
        "command": shlex.join(argv),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def write_line(path: Path, kind: str, content: Any) -> None:
    """Append one line of `kind` to the record; `content` is a dataclass or a mapping."""
    fields = dict(content) if isinstance(content, Mapping) else asdict(content)
    with path.open("a", encoding="utf-8") as out:
        out.write(json.dumps({"kind": kind, **fields}) + "\n")


def write(path: Path, run: Run) -> None:
    """Write a whole run; an existing file is replaced."""
    path.unlink(missing_ok=True)
    write_line(path, "run", run.conditions)
    for kind, (_, place) in _MADE_OF.items():
        for item in getattr(run, place):
            write_line(path, kind, item)
    if run.seconds is not None:
        write_line(path, "end", {"seconds": run.seconds})


def read(path: Path) -> Run:
    """Read a record back.  Raises ValueError, naming file and line, for what is no record."""
    run: Run | None = None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            fields = json.loads(line)
            kind = fields.pop("kind")
            run = _with_line(run, kind, fields)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: not a benchmark record: {error}") from None
    if run is None:
        raise ValueError(f"{path} is empty: not a benchmark record")
    return run


def _with_line(run: Run | None, kind: str, fields: dict[str, Any]) -> Run:
    if kind == "run":
        return Run(fields)
    if run is None:
        raise ValueError("the first line must be of kind 'run'")
    if kind == "end":
        return Run(**{**vars(run), "seconds": fields["seconds"]})
    if kind == "result":
        fields["ms"] = {name: Spread(**spread) for name, spread in fields["ms"].items()}
    make, place = _MADE_OF[kind]
    getattr(run, place).append(make(**fields))
    return run


def _versions() -> dict[str, str]:
    versions = {"fastssl": __version__}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "CPU"
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "CPU")


def _output(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _driver() -> str:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")


def _commit() -> str:
    """The commit of the checkout this file is in, with a + when there are changes; "" elsewhere."""
    root = str(Path(__file__).resolve().parents[1])
    commit = _output("git", "-C", root, "rev-parse", "--short=12", "HEAD")
    return commit + ("+" if commit and _output("git", "-C", root, "status", "--porcelain") else "")
