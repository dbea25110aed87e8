"""The cases: what is measured, beside whom, against which floor, and behind which gate.

A case is a function from (shape, dtype, device) to a `Problem`; `@case` registers it.  Runs,
sweeps, pytest-benchmark and a GPU's headlines read this one registry: a case is written once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor

OURS, REFERENCE = "fastssl", "reference"
SIZES = ("quick", "cpu", "cuda")  # which every case has
GRID = "grid"
APART = ("train-*", "*-ranks", "data-*", "optim-*")  # cases not of kernels and losses
Shape = dict[str, int]
Outputs = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class Absent:
    """Stands where a rival would: why it is not here, in a few words with the remedy."""

    why: str


Rival = Callable[..., Outputs]


@dataclass(frozen=True)
class Problem:
    """One shape of a case made concrete: what every rival is called with, and what it must do.

    inputs       what each rival is called with; those that require a gradient get one, and then
                 the rival returns one scalar or tensor whose sum is differentiated.
    rivals       by name: a callable of the inputs, or Absent.  "fastssl" is ours; "reference" is
                 the formula as written.  Keep the order: it is the table's.
    flops        floating-point operations the *problem* needs at least, by pass: fwd and bwd
                 (or run, when nothing is differentiated).  The same for every rival.
    bytes_moved  least bytes through memory, by pass: each input read once, each output written.
    items        what one call works through, for a rate: (128, "images").
    truth        float64 outputs; by default the reference on the inputs in float64.
    check        instead of the triangle: (rival's name, its outputs) -> why it is wrong, or "".
    rotate       whether the inputs may be copied, so that no call finds its own in the cache.
    own_memory   whether a call's memory is this process's, and so can be measured.
    """

    inputs: tuple[Tensor, ...]
    rivals: Mapping[str, Rival | Absent]
    flops: Mapping[str, float] = field(default_factory=dict)
    bytes_moved: Mapping[str, float] = field(default_factory=dict)
    items: tuple[int, str] | None = None
    truth: Callable[[], Outputs] | None = None
    check: Callable[[str, Sequence[Tensor]], str] | None = None
    rotate: bool = True
    own_memory: bool = True

    @property
    def differentiated(self) -> bool:
        """Whether a call is a forward and a backward."""
        return any(x.requires_grad for x in self.inputs)


Make = Callable[[Shape, torch.dtype, torch.device], Problem]


def shapes_of(sides: str, **by_size: Sequence[tuple[int, ...]]) -> dict[str, list[Shape]]:
    """The shapes of each size, whose sides are named once.

    >>> shapes_of("B D", quick=[(128, 512), (256, 1024)])
    {'quick': [{'B': 128, 'D': 512}, {'B': 256, 'D': 1024}]}
    """
    name = partial(zip, sides.split(), strict=True)
    return {size: [dict(name(values)) for values in rows] for size, rows in by_size.items()}


def grid(most: int, D: Sequence[int] = (32, 256, 1024)) -> list[Shape]:
    """Batches of 16 to 4096 by D features, and one of `most` by the fewest."""
    shapes = [{"B": 4**power, "D": width} for power in range(2, 7) for width in D]
    return [*shapes, {"B": most, "D": D[0]}]


@dataclass(frozen=True)
class Sweep:
    """A shape with one side left free: how time and memory grow with `variable`."""

    variable: str
    values: tuple[int, ...]
    fixed: Mapping[str, int]

    def shapes(self) -> list[Shape]:
        """The shapes of the sweep, in the order of its values."""
        return [{**self.fixed, self.variable: value} for value in self.values]


@dataclass(frozen=True)
class Case:
    """A registered case; see `case` for its fields."""

    name: str
    make: Make
    test: str
    shapes: Mapping[str, Sequence[Shape]]
    sweeps: Mapping[str, Sequence[Sweep]]
    dtypes: tuple[str, ...]
    gate_shape: Shape | None = None
    gpu_gate_shape: Shape | None = None
    ours: bool = True

    def gate(self, shape: Shape, device: torch.device) -> Shape:
        """The shape that answers are checked at where `shape` is timed."""
        sides = self.gpu_gate_shape if device.type == "cuda" else None
        most = sides or self.gate_shape or {}
        return {name: min(size, most.get(name, size)) for name, size in shape.items()}

    @property
    def about(self) -> str:
        """The first line of what the case's function says of itself."""
        return (self.make.__doc__ or "").strip().splitlines()[0]


_cases: dict[str, Case] = {}


def case(
    name: str,
    *,
    test: str,
    shapes: Mapping[str, Sequence[Shape]],
    sweeps: Mapping[str, Sequence[Sweep]] | None = None,
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16"),
    gate_shape: Shape | None = None,
    gpu_gate_shape: Shape | None = None,
    ours: bool = True,
) -> Callable[[Make], Make]:
    """Register a case; the function stays as it is, and its docstring's first line describes it.

    test         the test that proves the thing measured, as a path from the repository's root.
    shapes       by size: "quick" (seconds on a CPU), "cpu", "cuda"; "grid": from the smallest
                 batches to large ones, to see where one loses.
    sweeps       by size: what `--sweep` runs.
    dtypes       those it is measured in; another one asked for leaves the case out.
    gate_shape   the most that some sides of a shape have where its answers are checked, for the
                 reference in float64 takes long; the other sides, which choose a schedule, are
                 those that are timed.
    gpu_gate_shape  the same on a GPU, where a block of a schedule is larger, by default equal.
    ours         whether there is one of ours already, or rivals alone.
    Raises ValueError when the name is taken or a size is not one of these.
    """
    known = (*SIZES, GRID)
    if unknown := {*shapes, *(sweeps or {})} - {*known}:
        raise ValueError(f"sizes are {', '.join(known)}, got {sorted(unknown)} in case {name!r}")

    def register(make: Make) -> Make:
        if name in _cases and _where(_cases[name].make) != _where(make):
            files = " and in ".join(_where(m)[0] for m in (_cases[name].make, make))
            raise ValueError(
                f"case {name!r} is registered twice, in {files}: give one another name, or, where "
                "these are two checkouts, use the environment of the one you are in"
            )
        fields = shapes, sweeps or {}, dtypes, gate_shape, gpu_gate_shape, ours
        _cases[name] = Case(name, make, test, *fields)
        return make

    return register


def _where(make: Make) -> tuple[str, int]:
    """A function's place in its file: a module imported under two names has its cases once."""
    return make.__code__.co_filename, make.__code__.co_firstlineno


def all_cases() -> dict[str, Case]:
    """Every case, by name, in the order of the table; `fastssl.bench.cases` registers ours."""
    return dict(_cases)


def select(patterns: Iterable[str]) -> list[Case]:
    """The cases that are asked for, in the order of the table; all, without any pattern.

    A pattern is a case's name, a family's (`data` for every `data-...`), or one with wildcards
    (`train-*`); a name that is both a case's and a family's is the case's.
    Raises ValueError for a pattern that matches nothing.
    """
    known, wanted = all_cases(), [*patterns]
    chosen: set[str] = set() if wanted else set(known)
    for pattern in wanted:
        family = f"{pattern}-*" if pattern not in known else pattern
        names = {n for n in known if fnmatchcase(n, pattern) or fnmatchcase(n, family)}
        if not names:
            close = get_close_matches(pattern, known, 1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"no case is called {pattern!r}; {hint}there are {', '.join(known)}")
        chosen |= names
    return [case for name, case in known.items() if name in chosen]


def outputs(value: Any) -> list[Tensor]:
    """What a rival returned, as a list of tensors."""
    return [value] if isinstance(value, Tensor) else list(value)
