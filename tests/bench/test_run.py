"""A case as a whole: every rival has its row, and a wrong one has no time."""

import pytest
import torch

from fastssl.bench.measure import run as running
from fastssl.bench.measure.run import Settings, plan, run_case
from fastssl.bench.measure.turns import AGAIN
from fastssl.bench.record import Ceiling
from fastssl.bench.registry import OURS, REFERENCE, Problem, Sweep

from .problems import CPU, case_of, make, sorted_make, square

CEILINGS = (Ceiling("copy", 10.0, "GB/s"), Ceiling("matmul float32", 0.1, "TFLOP/s"))


def settings(**changes):
    return Settings(CPU, torch.float32, CEILINGS, **{"budget_s": 0.0, **changes})


def test_every_rival_has_its_row_in_order():
    rows = {row.rival: row for row in run_case(case_of(), {"N": 1000}, settings())}
    assert list(rows) == [
        OURS,
        REFERENCE,
        "greedy",
        "wrong",
        "explodes",
        "endless",
        "missing",
    ]
    assert {name: row.status for name, row in rows.items()} == {
        OURS: "ok",
        REFERENCE: "ok",
        "greedy": "ok",
        "wrong": "wrong",
        "explodes": "failed",
        "endless": "out of memory",
        "missing": "absent",
    }
    for row in rows.values():
        timed = row.status == "ok"
        assert bool(row.ms) == timed == (row.rounds >= 7) == (row.peak is not None)
        assert (row.x is not None) == timed and bool(row.why) != timed
        assert row.gate == "tests/bench/problems.py; live at N=1000"
        assert row.floor == pytest.approx(4000 / 10e6 + 8000 / 10e6)
    assert rows[OURS].x == 1 and not rows[OURS].tie
    assert (
        rows["greedy"].x > 1 and rows["greedy"].x_low <= rows["greedy"].x <= rows["greedy"].x_high
    )


def test_a_broken_kernel_of_ours_prints_no_time_and_the_others_stay():
    def broken(shape, dtype, device):
        made = make(shape, dtype, device)
        off = lambda x: square(x) + x.sum() * 1e-3  # noqa: E731
        return Problem(made.inputs, {OURS: off, REFERENCE: square})

    ours, reference = run_case(case_of(broken), {"N": 50}, settings(memory=False))
    assert ours.status == "wrong" and ours.ms == {} and ours.x is None and ours.peak is None
    assert reference.status == "ok" and reference.total is not None and reference.x is None


def test_the_gate_may_stand_at_a_smaller_shape():
    case = case_of(gate_shape={"N": 3})
    rows = run_case(case, {"N": 1000}, settings(memory=False))
    assert rows[0].gate.endswith("live at N=3") and rows[0].shape == {"N": 1000}
    assert {row.status for row in rows if row.rival == "wrong"} == {"wrong"}


def test_what_is_right_at_the_gate_and_wrong_at_the_timed_shape_is_wrong():
    def makes(shape, dtype, device):
        made = make(shape, dtype, device)
        rivals = {
            OURS: lambda x: square(x[:100]),  # forgets what is past its first block
            REFERENCE: square,
            "overflows": lambda x: square(x) * (float("inf") if len(x) > 100 else 1),
        }
        return Problem(made.inputs, rivals)

    case = case_of(makes, gate_shape={"N": 100})
    rows = {r.rival: r for r in run_case(case, {"N": 1000}, settings(memory=False))}
    assert (
        rows[OURS].status == "wrong"
        and "value is 0.9 of the reference's away from it" in rows[OURS].why
    )
    assert rows["overflows"].why == "value is not finite at this shape"
    assert rows[REFERENCE].status == "ok"
    assert {r.status for r in run_case(case, {"N": 100}, settings(memory=False))} == {"ok"}


def test_without_a_truth_nothing_passes():
    def no_truth(shape, dtype, device):
        made = make(shape, dtype, device)

        def broken(x):
            raise RuntimeError("too large")

        return Problem(made.inputs, {OURS: square, REFERENCE: broken})

    rows = run_case(case_of(no_truth), {"N": 5}, settings(memory=False))
    assert [row.status for row in rows] == ["failed", "failed"]
    assert all("no gate: the reference could not be computed" in row.why for row in rows)


def test_a_rival_that_fails_only_when_timed_leaves_the_others_their_times():
    calls = []

    def third_time(x):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("a bad day")
        return square(x)

    def makes(shape, dtype, device):
        rivals = {OURS: square, REFERENCE: square, "moody": third_time}
        return Problem(make(shape, dtype, device).inputs, rivals)

    rows = {r.rival: r for r in run_case(case_of(makes), {"N": 5}, settings(memory=False))}
    assert rows["moody"].status == "failed" and "a bad day" in rows["moody"].why
    assert rows[OURS].status == rows[REFERENCE].status == "ok" and rows[OURS].rounds >= 7


def test_what_is_not_differentiated_runs():
    rows = run_case(case_of(sorted_make), {"N": 100}, settings(memory=False))
    assert [set(row.ms) for row in rows] == [{"run"}, {"run"}]


def test_the_difference_inside_the_noise_is_a_tie(monkeypatch):
    def times(ours, theirs):
        made = {OURS: ours, AGAIN: ours, REFERENCE: theirs}
        monkeypatch.setattr(
            running, "take_turns", lambda *a, **k: {n: {"run": t} for n, t in made.items()}
        )
        rows = run_case(case_of(sorted_make), {"N": 100}, settings(memory=False))
        return rows[1]

    def wobbly(middle):
        return [middle * factor for factor in (0.9, 0.95, 1.0, 1.05, 1.1)] * 4

    steady = [1.0] * 20
    assert times(steady, [1.3] * 20).tie is False
    assert times(steady, [1.2, 0.8] * 10).tie is True  # the interval holds 1
    assert times(steady, steady).tie is True
    row = times(steady, [1.01] * 20)
    assert row.tie is False and row.noise == 0
    made = {"again": wobbly(1.0), "theirs": [1.01] * 20}
    monkeypatch.setattr(
        running,
        "take_turns",
        lambda *a, **k: {
            OURS: {"run": steady},
            AGAIN: {"run": made["again"]},
            REFERENCE: {"run": made["theirs"]},
        },
    )
    row = run_case(case_of(sorted_make), {"N": 100}, settings(memory=False))[1]
    assert row.x_low > 1 and row.noise > 0.01 and row.tie is True  # nearer than ours to itself


def test_rivals_can_be_chosen_and_left_out():
    few = run_case(case_of(), {"N": 5}, settings(memory=False, rivals=frozenset({"greedy"})))
    assert [row.rival for row in few] == [OURS, REFERENCE, "greedy"]
    rest = run_case(case_of(), {"N": 5}, settings(memory=False, without=frozenset({"greedy"})))
    assert "greedy" not in [row.rival for row in rest] and len(rest) == 6


def test_a_plan_names_shapes_dtypes_and_sweeps():
    sweep = Sweep("N", (1, 2), {"D": 3})
    case = case_of(sweeps={"quick": [sweep]}, dtypes=("float32", "bfloat16"))
    assert [
        (s, d, v) for _, s, d, v in plan([case], "quick", ["float32", "float16"], sweep=False)
    ] == [({"N": 100}, "float32", "")]
    assert [(s, d, v) for _, s, d, v in plan([case], "quick", ["bfloat16"], sweep=True)] == [
        ({"D": 3, "N": 1}, "bfloat16", "N"),
        ({"D": 3, "N": 2}, "bfloat16", "N"),
    ]
    assert list(plan([case], "cuda", ["float32"], sweep=False)) == []
