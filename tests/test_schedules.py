"""Schedules: known values, continuity where phases meet, and what is refused."""

import math
import subprocess
import sys

import pytest

from fastssl.schedules import constant, cosine, infinite, linear, warmup_cosine

PHASES = dict(warmup=10, cooldown=40, constant=0.25)


def test_known_values():
    assert constant(0.3, 2.5) == 2.5
    assert linear(0.25, 4.0, 8.0) == 5.0
    assert cosine(0.0, 3.0, 1.0) == 3.0
    assert cosine(1 / 3, 3.0, 1.0) == pytest.approx(2.5)  # cos(pi / 3) = 1 / 2
    assert cosine(1.0, 3.0, 1.0) == 1.0
    assert cosine(0.5, 0.996, 1.0) == pytest.approx(0.998)


@pytest.mark.parametrize("schedule", [linear, cosine])
def test_progress_outside_training_is_clamped(schedule):
    assert schedule(-0.5, 4.0, 8.0) == 4.0
    assert schedule(1.5, 4.0, 8.0) == 8.0


def test_warmup_cosine():
    def rate(progress):
        return warmup_cosine(progress, 2.0, warmup=0.2, final=0.5)

    assert rate(0.0) == 0.0
    assert rate(0.05) == pytest.approx(0.5)
    assert rate(0.2) == 2.0
    assert rate(0.6) == pytest.approx(1.25)  # half way down
    assert rate(1.0) == rate(7.0) == 0.5
    assert rate(0.2 - 1e-9) == pytest.approx(rate(0.2), abs=1e-6)
    falling = [rate(0.2 + 0.8 * i / 50) for i in range(51)]
    assert falling == sorted(falling, reverse=True)


def test_no_warmup_starts_at_the_peak():
    assert warmup_cosine(0.0, 2.0, warmup=0.0) == 2.0


@pytest.mark.parametrize("warmup", [-0.1, 1.0, 5])
def test_warmup_is_a_fraction(warmup):
    with pytest.raises(ValueError, match=f"0 <= warmup < 1; got {warmup}"):
        warmup_cosine(0.5, 1.0, warmup=warmup)


def test_infinite_has_its_phases():
    def rate(step):
        return infinite(step, 1.0, **PHASES)

    assert rate(0) == 0.0
    assert rate(4) == pytest.approx(0.4)
    assert rate(10) == 1.0
    assert rate(30) == pytest.approx(0.625)  # half way between 1 and 0.25
    assert rate(50) == rate(10**9) == 0.25


def test_infinite_anneals_on_demand():
    def rate(step):
        return infinite(step, 1.0, **PHASES, anneal=(100, 20, 0.01))

    assert [rate(s) for s in (30, 99, 100)] == [infinite(s, 1.0, **PHASES) for s in (30, 99, 100)]
    assert rate(110) == pytest.approx(math.sqrt(0.25 * 0.01))  # geometric mean half way
    assert rate(105) / rate(104) == pytest.approx(rate(115) / rate(114))
    assert rate(120) == rate(500) == pytest.approx(0.01)


def test_annealing_may_start_before_the_constant_phase():
    assert infinite(31, 1.0, **PHASES, anneal=(30, 1, 0.1)) == pytest.approx(0.1)
    assert infinite(30.5, 1.0, **PHASES, anneal=(30, 1, 0.1)) == pytest.approx(math.sqrt(0.0625))


@pytest.mark.parametrize("anneal", [(100, 0, 0.1), (100, 20, 0.0), (0, 20, 0.1)])
def test_impossible_annealing_is_refused(anneal):
    with pytest.raises(ValueError, match="anneal="):
        infinite(120, 1.0, **PHASES, anneal=anneal)


def test_negative_phases_are_refused():
    with pytest.raises(ValueError, match="got -1 and 5"):
        infinite(3, 1.0, warmup=-1, cooldown=5, constant=0.1)


def test_schedules_need_nothing_but_python():
    code = "import sys, fastssl.schedules; print('torch' in sys.modules, 'pydantic' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]
