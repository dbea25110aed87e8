"""Schedules: known values, continuity where phases meet, and what is refused."""

import math
import subprocess
import sys

import pytest

from fastssl.config import ConfigError, resolve
from fastssl.schedules import cosine, infinite, linear
from fastssl.schedules.config import CosineSchedule, LinearSchedule, ScheduleConfig, at

PHASES = dict(warmup=10, cooldown=40, constant=0.25)


def test_known_values():
    assert linear(0.25, 4.0, 8.0) == 5.0
    assert cosine(0.0, 3.0, 1.0) == 3.0
    assert cosine(1 / 3, 3.0, 1.0) == pytest.approx(2.5)  # cos(pi / 3) = 1 / 2
    assert cosine(1.0, 3.0, 1.0) == 1.0
    assert cosine(0.5, 0.996, 1.0) == pytest.approx(0.998)


@pytest.mark.parametrize("schedule", [linear, cosine])
def test_progress_outside_training_is_clamped(schedule):
    assert schedule(-0.5, 4.0, 8.0) == 4.0
    assert schedule(1.5, 4.0, 8.0) == 8.0


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


def test_a_schedule_by_name_warms_up_moves_and_stays():
    falls = LinearSchedule(start=0.8, end=0.2, warmup=0.2, until=0.6)
    assert [at(falls, p / 10) for p in range(0, 11, 2)] == pytest.approx(
        [0, 0.8, 0.5, 0.2, 0.2, 0.2]
    )
    rises = CosineSchedule(start=0.996, end=1.0)
    assert [at(rises, p) for p in (0.0, 0.3, 2.0)] == [cosine(p, 0.996, 1.0) for p in (0, 0.3, 1)]
    stages = LinearSchedule(start=0.5, end=0.8, stages=4)
    ratios = [at(stages, (i + 0.5) / 1000) for i in range(1000)]
    assert sorted(set(ratios)) == pytest.approx([0.5, 0.6, 0.7, 0.8])
    assert {ratios.count(ratio) for ratio in ratios} == {250} and at(stages, 1.0) == 0.8
    assert at(0.3, 0.9) == 0.3


MOMENTA = {  # of mocov3, whose own is {name: cosine, start: 0.99, end: 1}
    "method.momentum=0.9": ("cosine", 0.9, 0.95, 1.0),
    "method.momentum.end=0.9": ("cosine", 0.95, 0.925, 0.9),  # the recipe says 0.95
    "method.momentum=[0.8, 0.9]": ("linear", 0.8, 0.85, 0.9),
    "method.momentum={name: linear, until: 0.5}": ("linear", 0.99, 1.0, 1.0),
    "method.momentum={name: constant, start: 0.7}": ("constant", 0.7, 0.7, 0.7),
}


@pytest.mark.parametrize("override", MOMENTA)
def test_what_a_schedule_leaves_out_is_the_keys_own(override):
    momentum, (name, *values) = (
        resolve("mocov3-digits", [override]).method.momentum,
        MOMENTA[override],
    )
    assert isinstance(momentum, ScheduleConfig) and momentum.name == name
    assert [momentum.at(progress) for progress in (0.0, 0.5, 1.0)] == pytest.approx(values)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "method.momentum=1.5",
            "method.momentum.* at 0 % of the run it is 1.5, and must be at most 1",
        ),
        ("method.momentum=[0.9, 1.1]", "at 51 % of the run it is 1.002, and must be at most 1"),
        ("method.momentum=fast", "a number is wanted, a pair of numbers, or a schedule"),
        (
            "method.momentum.name=infinite",
            "'infinite' counts steps and is for optim.schedule alone",
        ),
        ("method.momentum.name=cosinus", "not one of .* \\(did you mean cosine"),
        ("method.momentum.untill=0.3", "method.momentum.untill"),
        ("optim.weight_decay={name: linear, start: 0.1}", "its end is missing"),
        ("optim.weight_decay={name: linear, ende: 0.1}", "unknown key optim.weight_decay.ende"),
        ("optim.weight_decay={end: 0.1}", "optim.weight_decay.name is required and missing"),
        (
            "optim.schedule.warmup=0.6; optim.schedule.until=0.5",
            "warmup=0.6 is not before until=0.5",
        ),
    ],
)
def test_a_schedule_that_does_not_fit_is_named(override, words):
    with pytest.raises(ConfigError, match=words):
        resolve("mocov3-digits", override.split("; "))


def test_a_schedule_of_another_name_takes_start_and_end_of_the_recipes():
    """data2vec-digits says {name: linear, start: 0.99, end: 0.999, until: 0.5}."""
    for given, wanted in (
        ("name=cosine", {"name": "cosine", "start": 0.99, "end": 0.999, "until": 1.0}),
        ("name=constant", {"name": "constant", "start": 0.99}),
        ("until=0.2", {"name": "linear", "start": 0.99, "end": 0.999, "until": 0.2}),
    ):
        momentum = resolve("data2vec-digits", [f"method.momentum.{given}"]).method.momentum
        assert wanted.items() <= momentum.model_dump().items()
    with pytest.raises(ConfigError, match="method.momentum=.* its name 'cosin' is not one of"):
        resolve("mocov3-digits", ["method.momentum={name: cosin}"])
