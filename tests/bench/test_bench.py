"""The benchmark: a wrong rival gets no time, a right one does, and the record is whole."""

import json

import pytest
import torch

from fastssl.bench import __main__ as command
from fastssl.bench import losses
from fastssl.bench.harness import Case, Timing, run_case, why_wrong

CPU = torch.device("cpu")
TINY = {
    "ntxent": [{"B": 5, "D": 3}],
    "barlow": [{"B": 7, "D": 4}, {"B": 3, "D": 9}],
    "mae": [{"B": 2, "S": 8, "P": 4}],
}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(losses._SHAPES, "quick", TINY)
    monkeypatch.setattr(command, "run_case", lambda *a, **k: run_case(*a, **k | {"budget_s": 0}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_rival_computes_the_same_loss(tiny, dtype):
    for case in losses.cases("quick"):
        timings = run_case(case, dtype, CPU, budget_s=0)
        assert {t.rival: t.wrong for t in timings} == dict.fromkeys(
            ["fastssl", "reference", "lightly"], ""
        )
        assert all(len(t.times_ms) >= 5 and min(t.times_ms) > 0 for t in timings)


def square(x):
    return x.square().sum()


@pytest.mark.parametrize(
    ("rival", "reason"),
    [
        (lambda x: 1.001 * square(x), "value is off by"),
        (lambda x: x.detach().square().sum() + 0 * x.sum(), "gradient 1 is off by"),
        (lambda x: square(x) / 0, "value is not finite"),
        (lambda x: square(x)[None], "value has shape (1,), not ()"),
    ],
)
def test_a_wrong_rival_gets_no_time(rival, reason):
    case = Case("square", {"N": 9}, _vector, {"fastssl": rival, "reference": square})
    wrong, right = run_case(case, torch.float32, CPU, budget_s=0)
    assert wrong.wrong.startswith(reason) and wrong.times_ms == []
    assert right.wrong == "" and len(right.times_ms) >= 5
    lines = command.table([wrong, right]).splitlines()
    assert lines[2].split()[:2] == ["fastssl", "WRONG:"] and "." not in lines[2].split(":")[0]
    assert "p50_ms" not in command.row(wrong) and command.row(right)["p50_ms"] > 0


def _vector(shape, dtype, device):
    return (torch.randn(shape["N"], dtype=dtype, device=device).requires_grad_(),)


def test_our_own_loss_is_held_to_a_tighter_bound():
    truth, eager = [torch.ones((), dtype=torch.float64)], [torch.tensor(1.01)]
    assert why_wrong([torch.tensor(1.05)], eager, truth, slack=10) == ""
    assert why_wrong([torch.tensor(1.05)], eager, truth, slack=2).startswith("value is off")


def test_a_wrong_loss_of_ours_fails_the_command(tiny, monkeypatch, capsys):
    assert command.main(["--quick", "--device", "cpu"]) == 0
    assert "WRONG" not in capsys.readouterr().out
    monkeypatch.setattr(losses.NTXentLoss, "forward", lambda self, a, b: (a - b).square().sum())
    assert command.main(["--quick", "--device", "cpu"]) == 1
    assert "fastssl   WRONG: value is off" in capsys.readouterr().out


def test_the_record_can_be_read_and_repeated(tiny, tmp_path, capsys):
    path = tmp_path / "bench.json"
    argv = ["--quick", "--device", "cpu", "--dtype", "float32", "--json", str(path)]
    assert command.main(argv) == 0
    record = json.loads(path.read_text())
    assert record["command"] == " ".join(["python", "-m", "fastssl.bench", *argv])
    assert record["versions"]["torch"] == torch.__version__
    assert len(record["results"]) == 12
    assert all(r["p20_ms"] <= r["p50_ms"] <= r["p80_ms"] for r in record["results"])
    assert "barlow  B=3, D=9" in capsys.readouterr().out


def test_it_runs_without_lightly(tiny, monkeypatch):
    monkeypatch.setattr(losses, "find_spec", lambda name: None)
    assert {tuple(case.rivals) for case in losses.cases("quick")} == {("fastssl", "reference")}


def test_percentiles():
    timing = Timing("c", {}, "float32", "r", times_ms=[float(t) for t in range(101)])
    assert timing.percentiles() == (20, 50, 80)
