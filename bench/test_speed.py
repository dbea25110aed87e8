"""The registry through pytest-benchmark: `pytest bench/ --benchmark-only`.

One benchmark for each case, shape and rival: ours, the reference, and those that
FASTSSL_BENCH_RIVALS lists (names with blanks between).  FASTSSL_BENCH_SIZE is quick (the default),
cpu or cuda, FASTSSL_BENCH_DTYPE float32 by default.  A wrong answer fails and is not timed.

pytest-benchmark times one function after another, not in turns: for a comparison use
`python -m fastssl.bench`; this is for those whose CI keeps pytest-benchmark's history.
"""

import os
from collections.abc import Iterator

import pytest
import torch

from fastssl.bench.cases import all_cases
from fastssl.bench.measure.gate import judge, step
from fastssl.bench.measure.turns import wait
from fastssl.bench.registry import OURS, REFERENCE, Absent, Case, Problem, Shape

SIZE = os.environ.get("FASTSSL_BENCH_SIZE", "quick")
DTYPE = os.environ.get("FASTSSL_BENCH_DTYPE", "float32")
RIVALS = os.environ.get("FASTSSL_BENCH_RIVALS", "").split()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _problem(case: Case, shape: Shape) -> Problem:
    torch.manual_seed(0)
    return case.make(dict(shape), getattr(torch, DTYPE), DEVICE)


def _entries() -> Iterator[object]:
    for case in all_cases().values():
        if DTYPE not in case.dtypes:
            continue
        for shape in case.shapes.get(SIZE, ()):
            where = "-".join(f"{k}{v}" for k, v in shape.items())
            for rival in [*([OURS] if case.ours else []), REFERENCE, *RIVALS]:
                yield pytest.param(case, shape, rival, id=f"{case.name}-{where}-{rival}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """All of them; with --benchmark-disable the first case alone, to see that this file works.

    The gate of every case stands in tests/bench.
    """
    entries = list(_entries())
    if metafunc.config.getoption("benchmark_disable", False):
        entries = entries[:2]
    metafunc.parametrize(("case", "shape", "rival"), entries)


def test_speed(benchmark, case: Case, shape: Shape, rival: str) -> None:
    """One rival on one case at one shape, behind its gate."""
    problem = _problem(case, shape)
    entrant = problem.rivals.get(rival, Absent(f"{rival} does not do {case.name}"))
    if rival in RIVALS and isinstance(entrant, Absent):
        pytest.skip(entrant.why)
    assert not isinstance(entrant, Absent), entrant.why
    why = judge(_problem(case, case.gate(shape, DEVICE)))[rival]()
    assert not why, f"{rival} is wrong: {why}"
    benchmark.group = f"{case.name} {shape}"

    def call() -> None:
        step(entrant, problem.inputs)
        wait(DEVICE)

    benchmark(call)
