"""The command: what it measures, what it writes, and how it ends."""

from dataclasses import replace

import pytest
import torch

from fastssl.bench import __main__ as command
from fastssl.bench import record
from fastssl.bench.registry import OURS, REFERENCE, Problem, Sweep

from .problems import case_of, make, square


def broken(shape, dtype, device):
    """A kernel of ours with one thing wrong."""
    made = make(shape, dtype, device)
    return Problem(made.inputs, {OURS: lambda x: square(x) * 1.01, REFERENCE: square})


def fine(shape, dtype, device):
    """The sum of squares."""
    made = make(shape, dtype, device)
    work = {"flops": made.flops, "bytes_moved": made.bytes_moved}
    return Problem(made.inputs, {OURS: square, REFERENCE: square, "compile": square}, **work)


@pytest.fixture
def cases(monkeypatch):
    """The command with two cases of ours, ceilings measured in no time."""
    sweep = Sweep("N", (10, 100, 1000), {})
    known = {
        "square": case_of(fine, sweeps={"quick": [sweep]}, dtypes=("float32", "bfloat16")),
        "broken": case_of(broken, name="broken"),
    }
    monkeypatch.setattr(command, "select", lambda names: [known[n] for n in names or ["square"]])
    rates = {"copy": "GB/s", "matmul float32": "TFLOP/s", "matmul bfloat16": "TFLOP/s"}
    ceilings = [record.Ceiling(what, 1.0, unit) for what, unit in rates.items()]
    monkeypatch.setattr(command, "measure_ceilings", lambda device, dtypes: ceilings)


def run(*words):
    return command.main([*words, "--device", "cpu", "--no-memory", "--budget", "0"])


def test_a_broken_kernel_prints_no_time_and_fails_the_command(cases, capsys):
    assert run("broken", "--quick") == 1
    block = capsys.readouterr().out.split("broken  N=100")[1]
    ours = next(line for line in block.splitlines() if line.strip().startswith(OURS))
    assert "wrong: value is off by" in ours
    assert not any(word.replace(".", "").isdigit() for word in ours.split()[:2])
    reference = next(line for line in block.splitlines() if line.strip().startswith(REFERENCE))
    assert any(word.replace(".", "").isdigit() for word in reference.split())


def test_the_record_is_whole_and_can_be_repeated(cases, tmp_path, capsys):
    path = tmp_path / "new" / "run.jsonl"
    assert run("--quick", "--json", str(path), "--dtype", "float32", "--dtype", "bfloat16") == 0
    found = record.read(path)
    assert found.conditions["command"].startswith("python -m fastssl.bench --quick --json")
    assert found.conditions["versions"]["torch"] == torch.__version__
    assert {c.what for c in found.ceilings} == {"copy", "matmul float32", "matmul bfloat16"}
    assert [(r.rival, r.dtype) for r in found.results] == [
        (OURS, "float32"),
        (REFERENCE, "float32"),
        (OURS, "bfloat16"),
        (REFERENCE, "bfloat16"),
    ]
    assert all(r.status == "ok" and r.total and r.floor for r in found.results)
    assert found.seconds is not None and found.seconds > 0
    assert "rival left out: compile" in capsys.readouterr().out


def test_a_named_rival_is_there_even_in_a_quick_run(cases, tmp_path, capsys):
    path = tmp_path / "run.jsonl"
    assert run("--quick", "--rival", "compile", "--json", str(path)) == 0
    assert [r.rival for r in record.read(path).results] == [OURS, REFERENCE, "compile"]
    assert run("--quick", "--rival", "lightli") == 0  # fault 26's kin: a misspelled rival
    assert capsys.readouterr().err.endswith("has a rival called lightli\n")


def test_shapes_of_ones_own_are_measured(cases, tmp_path):
    path = tmp_path / "run.jsonl"
    assert run("--shape", "N=12", "--shape", "N=30", "--rival", OURS, "--json", str(path)) == 0
    assert {row.shape["N"] for row in record.read(path).results} == {12, 30}


def test_a_sweep_is_fitted(cases, tmp_path, capsys):
    path = tmp_path / "run.jsonl"
    assert run("--quick", "--sweep", "--json", str(path)) == 0
    found = record.read(path)
    assert {r.sweep for r in found.results} == {"N"} and len(found.results) == 6
    assert {(f.rival, f.variable, f.quantity, f.points) for f in found.fits} == {
        (OURS, "N", "ms", 3),
        (REFERENCE, "N", "ms", 3),
    }


def test_a_report_is_a_folder_with_record_plots_and_page(cases, tmp_path, capsys):
    assert run("--quick", "--sweep", "--report", str(tmp_path / "out")) == 0
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"results.jsonl", "index.html"} <= made
    assert any(name.endswith(".png") for name in made)
    assert "square" in (tmp_path / "out" / "index.html").read_text()


def test_two_records_are_compared(cases, tmp_path, capsys):
    """Times are written in: what a busy machine measures may well hide a factor of three."""
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    assert run("--quick", "--json", str(a)) == 0
    found = record.read(a)
    for path, factor in ((a, 1.0), (b, 3.0)):
        ms = {part: record.Spread(0.9 * factor, factor, 1.1 * factor) for part in ("fwd", "bwd")}
        ms["step"] = record.Spread(1.8 * factor, 2 * factor, 2.2 * factor)
        rows = [
            replace(row, ms=ms, noise=0.01) if row.rival == OURS else row for row in found.results
        ]
        record.write(path, replace(found, results=rows))
    capsys.readouterr()
    assert command.main(["--compare", str(a), str(a)]) == 0
    assert command.main(["--compare", str(a), str(b)]) == 1
    assert "square" in capsys.readouterr().out


def test_cases_are_listed(cases, capsys):
    assert command.main(["--list", "square", "broken"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("square  The sum of squares.") and "float32, bfloat16" in lines[0]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["nonsense"], "no case is called 'nonsense'"),
        (["--compare", "/nowhere/a", "/nowhere/b"], "/nowhere/a"),
        (["ntxent", "--device", "cuda:7"], "--device cuda:7"),
        (["ntxent", "--device", "meta"], "--device must be cpu or cuda, got meta"),
        (["ntxent", "--shape", "B=8,K=2"], "case ntxent has the sides B, D, --shape gives B, K"),
        (["ntxent", "--shape", "B=8,D=0"], "sides of 1 or more, got 'B=8,D=0'"),
        (["ntxent", "--quick", "--shape", "B=8,D=2"], "without --size, --quick or --sweep"),
        (["ntxent-ranks", "--device", "cpu", "--dtype", "bfloat16"], "none of these cases has"),
    ],
)
def test_a_mistake_ends_in_one_sentence(words, complaint, capsys):
    with pytest.raises(SystemExit) as end:
        command.main(words)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert complaint in said and said.startswith("fastssl bench: ") and said.count("\n") == 1
