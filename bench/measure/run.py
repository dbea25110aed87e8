"""Runs cases: memory, the gate, then the clock; a row for every rival, whatever happens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fastssl.bench.measure import memory
from fastssl.bench.measure.gate import glance, judge, step
from fastssl.bench.measure.peaks import floor_ms
from fastssl.bench.measure.turns import (
    RivalFailed,
    Times,
    noise,
    peak_on_gpu,
    ratio,
    spread,
    take_turns,
)
from fastssl.bench.record import Ceiling, Result
from fastssl.bench.registry import OURS, REFERENCE, Absent, Case, Problem, Shape


@dataclass(frozen=True)
class Settings:
    """How a run measures.

    budget_s   seconds of timed rounds for a case at one shape (at least 7 rounds in any case).
    rivals     names to keep beside ours and the reference; None for all.
    without    names to leave out.
    memory     whether peak memory is measured (on a CPU: a child process for each rival).
    """

    device: torch.device
    dtype: torch.dtype
    ceilings: Sequence[Ceiling] = ()
    budget_s: float = 5.0
    rivals: frozenset[str] | None = None
    without: frozenset[str] = frozenset()
    memory: bool = True

    @property
    def dtype_name(self) -> str:
        """The dtype as the record writes it: "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")


@dataclass
class _Standing:
    """What is known so far of each rival of one problem."""

    status: dict[str, tuple[str, str]] = field(default_factory=dict)  # name: (status, why)
    peak: dict[str, int] = field(default_factory=dict)

    def fail(self, name: str, peak: memory.Peak) -> None:
        self.status[name] = (peak.status, peak.why)

    def alive(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name not in self.status]


def run_case(case: Case, shape: Shape, settings: Settings, *, sweep: str = "") -> list[Result]:
    """Every rival of `case` at `shape`: a Result each, in the order of the problem's rivals."""
    standing = _Standing()
    problem = _make(case, shape, settings)
    names = list(problem.rivals)
    for name, rival in problem.rivals.items():
        if isinstance(rival, Absent):
            standing.status[name] = ("absent", rival.why)
    if settings.device.type != "cuda" and settings.memory and problem.own_memory:
        _peaks_on_cpu(standing, case, shape, names, settings)
    gate_shape = case.gate(shape, settings.device)
    _gate(standing, problem if gate_shape == shape else _make(case, gate_shape, settings))
    if gate_shape != shape:
        _glance(standing, problem)
    if settings.device.type == "cuda" and problem.own_memory:
        for name in standing.alive(names):
            _peak_on_gpu(standing, problem, name, settings.device)
    times = _time(standing, problem, settings)
    floor = floor_ms(problem.flops, problem.bytes_moved, settings.dtype_name, settings.ceilings)
    base = Result(
        case=case.name,
        shape=dict(shape),
        dtype=settings.dtype_name,
        rival="",
        gate=f"{case.test}; live at {', '.join(f'{k}={v}' for k, v in gate_shape.items())}",
        flops=dict(problem.flops),
        bytes_moved=dict(problem.bytes_moved),
        floor=floor,
        items=problem.items[0] if problem.items else None,
        unit=problem.items[1] if problem.items else "",
        sweep=sweep,
    )
    return [_row(replace(base, rival=name), standing, times) for name in names]


def _make(case: Case, shape: Shape, settings: Settings) -> Problem:
    torch.manual_seed(0)
    problem = case.make(dict(shape), settings.dtype, settings.device)
    kept = {
        name: rival
        for name, rival in problem.rivals.items()
        if name in (OURS, REFERENCE)
        or (settings.rivals is None and name not in settings.without)
        or (settings.rivals is not None and name in settings.rivals)
    }
    return replace(problem, rivals=kept)


def _gate(standing: _Standing, problem: Problem) -> None:
    """Ask the gate; a rival that raises has failed, one that is off is wrong.

    Without a reference there is no gate, and nothing passes.
    """
    alive = standing.alive(list(problem.rivals))
    try:
        judges = judge(problem)
    except Exception as error:
        why = f"no gate: the reference could not be computed: {memory.explain_failure(error).why}"
        standing.status |= dict.fromkeys(alive, ("failed", why))
        return
    for name in alive:
        try:
            why = judges[name]()
        except Exception as error:
            standing.fail(name, memory.explain_failure(error))
        else:
            if why:
                standing.status[name] = ("wrong", why)
        _forget()


def _glance(standing: _Standing, problem: Problem) -> None:
    """What was checked at a smaller shape must at least not look wrong at this one."""
    reference: list[torch.Tensor] | None = None
    alive = standing.alive(list(problem.rivals))
    for name in sorted(alive, key=lambda name: name != REFERENCE):
        rival: Any = problem.rivals[name]
        try:
            made = step(rival, problem.inputs)
            if why := glance(made, reference):
                standing.status[name] = ("wrong", why)
            elif name == REFERENCE:
                reference = made
        except Exception as error:
            standing.fail(name, memory.explain_failure(error))
        _forget()


def _peak_on_gpu(standing: _Standing, problem: Problem, name: str, device: torch.device) -> None:
    rival: Any = problem.rivals[name]
    try:
        step(rival, problem.inputs)  # what is built once, at the first call, is not the step's
        standing.peak[name] = peak_on_gpu(lambda: step(rival, problem.inputs), device)
    except Exception as error:
        standing.fail(name, memory.explain_failure(error))
    _forget()


def _peaks_on_cpu(
    standing: _Standing, case: Case, shape: Shape, names: Sequence[str], settings: Settings
) -> None:
    peaks = memory.peaks_in_child(
        case.make, shape, settings.dtype, standing.alive(names), threads=torch.get_num_threads()
    )
    for name, peak in peaks.items():
        if peak.extra is None:
            standing.fail(name, peak)
        else:
            standing.peak[name] = peak.extra


def _time(standing: _Standing, problem: Problem, settings: Settings) -> dict[str, Times]:
    """Times of those still standing.  One that raises is taken out, and the rest start again."""
    while alive := standing.alive(list(problem.rivals)):
        rivals: dict[str, Any] = {name: problem.rivals[name] for name in alive}
        try:
            return take_turns(rivals, problem, settings.device, budget_s=settings.budget_s)
        except RivalFailed as raised:
            standing.fail(raised.name, memory.explain_failure(raised.error))
            _forget()
    return {}


def _forget() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _row(base: Result, standing: _Standing, times: dict[str, Times]) -> Result:
    if base.rival in standing.status:
        status, why = standing.status[base.rival]
        return replace(base, status=status, why=why)
    mine = times[base.rival]
    whole = "step" if "step" in mine else "run"
    row = replace(
        base,
        rounds=len(mine[whole]),
        ms={part: spread(ms) for part, ms in mine.items()},
        peak=standing.peak.get(base.rival),
        noise=noise(times, whole),
    )
    if OURS not in times:
        return row
    x, low, high = ratio(mine[whole], times[OURS][whole])
    close = abs(math.log(x)) <= (row.noise or 0.0)
    tie = base.rival != OURS and (low <= 1 <= high or close)
    return replace(row, x=x, x_low=low, x_high=high, tie=tie)


def plan(
    cases: Sequence[Case],
    size: str,
    dtypes: Sequence[str],
    *,
    sweep: bool,
    own: Sequence[Shape] = (),
) -> Iterator[tuple[Case, Shape, str, str]]:
    """(case, shape, dtype, sweep's variable or "") of everything a run measures.

    It is what the cases have of a size, or the user's own shapes; ValueError where those have other
    sides than a case.
    """
    for case in cases:
        sides = next(iter(case.shapes.values()))[0].keys()
        for shape in own:
            if shape.keys() != sides:
                raise ValueError(
                    f"case {case.name} has the sides {', '.join(sides)}, "
                    f"--shape gives {', '.join(shape)}"
                )
        for dtype in dtypes:
            if dtype not in case.dtypes:
                continue
            if not sweep:
                shapes = own or case.shapes.get(size, ())
                yield from ((case, dict(shape), dtype, "") for shape in shapes)
                continue
            for one in case.sweeps.get(size, ()):
                yield from ((case, shape, dtype, one.variable) for shape in one.shapes())
