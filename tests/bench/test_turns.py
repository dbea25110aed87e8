"""The clock: turns, copies, percentiles, intervals, noise."""

import math
import random

import pytest
import torch

from fastssl.bench.measure import turns
from fastssl.bench.measure.turns import AGAIN, RivalFailed, copies, noise, ratio, spread, take_turns
from fastssl.bench.registry import OURS, REFERENCE, Problem

from .problems import CPU, explodes, square


def test_rivals_take_turns_and_ours_runs_twice(monkeypatch):
    calls = []

    def rival(name):
        return lambda x: calls.append(name) or square(x)

    x = torch.randn(8).requires_grad_()
    rivals = {name: rival(name) for name in (OURS, REFERENCE, "other")}
    times = take_turns(rivals, Problem((x,), rivals), CPU, budget_s=0, least_rounds=7)
    assert set(times) == {OURS, REFERENCE, "other", AGAIN}
    for parts in times.values():
        assert {part: len(ms) for part, ms in parts.items()} == {"fwd": 7, "bwd": 7, "step": 7}
        assert all(s == f + b and s > 0 for f, b, s in zip(*parts.values(), strict=True))
    rounds = [calls[i : i + 4] for i in range(0, len(calls), 4)]
    assert len(rounds) == 8  # one warms up
    assert all(sorted(r) == sorted([OURS, OURS, REFERENCE, "other"]) for r in rounds)
    assert len({tuple(r) for r in rounds}) > 3  # another order each time
    followers = {(a, b) for r in rounds for a, b in zip(r, r[1:], strict=False)}
    assert ("other", OURS) in followers and (OURS, "other") in followers


def test_more_rounds_while_the_budget_lasts():
    x = torch.randn(8)
    rivals = {OURS: lambda x: x + 1}
    few = take_turns(rivals, Problem((x,), rivals), CPU, budget_s=0, least_rounds=3)
    many = take_turns(rivals, Problem((x,), rivals), CPU, budget_s=60, least_rounds=3)
    assert len(few[OURS]["run"]) == 3 < len(many[OURS]["run"])
    assert len(many[OURS]["run"]) <= turns.MOST_ROUNDS


def test_a_rival_that_raises_is_named():
    x = torch.randn(8).requires_grad_()
    rivals = {REFERENCE: square, "explodes": explodes}
    with pytest.raises(RivalFailed) as caught:
        take_turns(rivals, Problem((x,), rivals), CPU, budget_s=0)
    assert caught.value.name == "explodes" and "no kernel" in str(caught.value.error)


def test_copies_fill_the_cache_twice(monkeypatch):
    monkeypatch.setattr(turns, "cache_bytes", lambda device: 10_000)
    x, y = torch.randn(1000).requires_grad_(), torch.arange(5)
    made = copies(Problem((x, x, y), {}), CPU)
    assert len(made) == math.ceil(2 * 10_000 / (2 * 4000 + 40))
    assert len({id(one[0]) for one in made}) == len(made)
    for a, b, c in made:
        assert a is b and a.requires_grad and torch.equal(a, x) and torch.equal(c, y)
    assert len(copies(Problem((x,), {}, rotate=False), CPU)) == 1
    assert len(copies(Problem((), {}), CPU)) == 1
    monkeypatch.setattr(turns, "cache_bytes", lambda device: 1 << 40)
    assert len(copies(Problem((x,), {}), CPU)) == turns.MOST_COPIES


def test_the_cache_is_found():
    assert (1 << 18) <= turns.cache_bytes(CPU) <= (1 << 32)


def test_percentiles():
    assert spread([3.0]).p80 == 3.0
    s = spread([float(t) for t in range(101)])
    assert (s.p20, s.p50, s.p80) == (20, 50, 80)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng = random.Random(0)
    held = 0
    for _ in range(400):
        ours = [rng.lognormvariate(0, 0.3) for _ in range(40)]
        theirs = [1.5 * rng.lognormvariate(0, 0.3) for _ in range(40)]
        _, low, high = ratio(theirs, ours)
        held += low <= 1.5 <= high
    assert 0.92 <= held / 400 <= 0.99


def test_a_slow_minute_that_falls_on_both_leaves_the_ratio():
    slow = [1.0] * 10 + [30.0] * 10
    x, low, high = ratio([2 * t for t in slow], slow)
    assert (x, low, high) == (2, 2, 2)


def test_noise_is_how_far_ours_is_from_itself():
    rng = random.Random(0)
    quiet = [1 + 0.001 * rng.random() for _ in range(50)]
    loud = [1 + rng.random() for _ in range(50)]
    times = {OURS: {"step": quiet}, AGAIN: {"step": quiet[::-1]}}
    assert noise(times, "step") < 0.002
    assert noise({OURS: {"step": loud}, AGAIN: {"step": loud[::-1]}}, "step") > 0.03
    shifted = [1.1 * t for t in quiet]
    assert noise({OURS: {"step": quiet}, AGAIN: {"step": shifted}}, "step") > 0.09
    assert noise({OURS: {"step": quiet}}, "step") is None
