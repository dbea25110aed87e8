"""The table: every rival stays in it, a wrong one has no number, and it is readable in a log."""

import io
import random
import re
from dataclasses import replace

import pytest

from fastssl.bench.record import Ceiling, Result, Run
from fastssl.bench.report import formatting, table
from tests.bench import sample


def line_of(text, rival):
    return next(line for line in text.splitlines() if line.split()[:1] == [rival])


def block_of(rows, ceilings=()):
    (block,) = table.blocks(rows, ceilings)
    return block


def test_a_line_says_everything_measured():
    rows = [row for row in sample.fixed_rows() if row.case == "ntxent" and row.dtype == "float32"]
    block = block_of(rows, sample.CEILINGS)
    assert block.title == "ntxent  N=8192 D=128  float32  floor 1.60 ms"
    ours, reference = block.lines[:2]
    assert ours.cells["x"] == "1" and ours.mood == "ours"
    assert reference.cells == {
        **{"p20": "10.4", "p50": "11.0", "p80": "11.6", "fwd": "3.67", "bwd": "7.33"},
        **{"x": "5.50", "95 %": "5.33-5.72", "peak": "1.60 GB", "TFLOP/s": "7.27"},
        "of floor": "15 %",
    }


def test_a_rival_without_a_time_stays_with_its_reason():
    text = table.text(sample.run())
    assert "out of memory: CUDA out of memory. Tried 32 GiB" in line_of(text, "compile")
    assert "wrong: gradient 0 is off by 0.1" in line_of(text, "pytorch-metric-learning")
    assert "absent: pip install authors" in line_of(text, "authors")


@pytest.mark.parametrize("status", ["wrong", "failed", "out of memory", "absent"])
def test_no_number_without_ok(status):
    row = replace(sample.fixed_rows()[1], status=status, why="no", x=None)
    (line,) = block_of([row], sample.CEILINGS).lines
    assert line.cells == {} and line.why == f"{status}: no"
    assert not re.search(r"\d", table.text([row], summary=False).splitlines()[1])


def test_the_rate_is_that_of_the_resource_nearer_its_ceiling():
    ceilings = [Ceiling("copy", 100.0, "GB/s"), Ceiling("matmul float32", 1.0, "TFLOP/s")]
    slow = [ceilings[0], Ceiling("matmul float32", 0.8, "TFLOP/s")]
    row = Result("x", {}, "float32", "fastssl", flops={"run": 1e9}, bytes_moved={"run": 2e8})
    row = replace(row, ms=sample.timed("x", {}, "fastssl", 4.0).ms)
    assert formatting.rate(row, ceilings) == (pytest.approx(50), "GB/s", pytest.approx(0.5))
    heavy = replace(row, flops={"run": 3e9})
    assert formatting.rate(heavy, ceilings) == (pytest.approx(0.75), "TFLOP/s", pytest.approx(0.75))
    assert formatting.rate(heavy, slow) == (pytest.approx(750), "GFLOP/s", pytest.approx(0.9375))
    assert formatting.rate(heavy, ())[1:] == ("TFLOP/s", None)
    assert formatting.rate(replace(row, flops={}, bytes_moved={}), ceilings) is None


def test_items_and_columns_nobody_fills():
    block = block_of([row for row in sample.fixed_rows() if row.case == "train-mae"])
    assert block.lines[0].cells["images/s"] == "853"
    assert block.columns == ("p20", "p50", "p80", "x", "peak", "images/s")


def test_ties_and_lost_shapes_are_marked():
    text = table.text([row for row in sample.fixed_rows() if row.case == "clip"])
    assert "tie 1.01" in text and "0.500  0.485-0.520" in text
    moods = {line.rival: line.mood for b in table.blocks(sample.fixed_rows()) for line in b.lines}
    assert moods["open_clip"] == "beats us" and moods["pytorch-metric-learning"] == "wrong"


@pytest.mark.parametrize("width", [100, 90])
def test_it_fits_its_width(width):
    lines = table.text(sample.run(), width=width).splitlines()
    assert max(map(len, lines)) <= width
    assert not [line for line in lines if line != line.rstrip()]


def test_a_long_name_gives_way_to_the_numbers():
    rows = [row for row in sample.fixed_rows() if row.case == "clip"][:2]
    rows[1] = replace(rows[1], rival="a-rival-with-a-very-long-name-indeed")
    lines = table.text(rows, summary=False, width=80).splitlines()
    assert lines[3] == "  a-rival-with-a-very-long-name-indeed"
    assert lines[4].split()[:3] == ["0.855", "0.900", "0.945"]
    assert len(lines[4]) == len(lines[2]) == 79


def test_the_summary_counts_against_the_best_rival():
    counted = {t.case: t for t in formatting.tallies(sample.run().results)}
    assert counted["ntxent"] == formatting.Tally(
        "ntxent",
        faster=8,
        alone=1,
        low=pytest.approx(1.55, abs=0.01),
        high=pytest.approx(6.2, 0.01),
    )
    assert counted["clip"] == formatting.Tally("clip", tie=1, slower=1, low=0.5, high=1.01)
    assert counted["siglip"] == formatting.Tally("siglip", no_time=1)
    assert counted["train-mae"] == formatting.Tally("train-mae", alone=1)
    assert formatting.headline(sample.run().results) == (
        "Against the best rival of each of 10 measurements fastssl is faster in 8, ties in 1 and "
        "is slower in 1. In 1 more it has no time."
    )


def test_one_faster_rival_beside_a_tie_makes_it_slower():
    rows = [row for row in sample.fixed_rows() if row.case == "clip"][:3]
    assert formatting.outcome(rows) == ("tie", 1.01)
    assert formatting.outcome([rows[0], rows[1], replace(rows[2], x=0.9)]) == ("tie", 0.9)
    faster = replace(rows[1], x=0.95)
    assert formatting.outcome([rows[0], faster, replace(rows[2], x=0.9)]) == ("slower", 0.9)
    variant = replace(rows[1], rival="fastssl chunked", x=0.5)
    assert formatting.outcome([rows[0], variant]) == ("alone", None)


def test_the_summary_shows_ceilings_beside_the_datasheet():
    said = table.summary(sample.run())
    assert "copy             4000 GB/s, 83 % of 4800 (made-up datasheet)" in said
    assert "clip                 1       1" in said
    plain = table.summary(sample.run(results=sample.fixed_rows()[:2]))
    assert "          faster  tie  slower  x of the best rival\n  ntxent       1" in plain
    assert plain.startswith("Against the best rival of the one measurement fastssl is faster in 1")


def test_color_is_all_that_a_terminal_adds(monkeypatch):
    bare, colored = io.StringIO(), io.StringIO()
    monkeypatch.setattr(colored, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    table.show(sample.run(), width=100, file=bare)
    table.show(sample.run(), width=100, file=colored)
    assert "\x1b[1;36m" in colored.getvalue() and "\x1b[" not in bare.getvalue()
    assert re.sub(r"\x1b\[[0-9;]*m", "", colored.getvalue()) == bare.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    refused = io.StringIO()
    refused.isatty = lambda: True
    table.show(sample.run(), width=100, file=refused)
    assert refused.getvalue() == bare.getvalue()


def test_one_block_at_a_time():
    out = io.StringIO()
    table.show(sample.fixed_rows()[:2], ceilings=sample.CEILINGS, summary=False, file=out)
    assert out.getvalue().startswith("ntxent  N=8192") and "Against" not in out.getvalue()
    assert "80 %" in out.getvalue()


def test_an_empty_run_has_an_empty_table():
    assert table.text(Run({})) == "\n"
    assert formatting.headline([]) == "" and table.heading(Run({})).startswith("unknown device")


def test_numbers_keep_three_digits_and_never_an_exponent():
    random.seed(0)
    for _ in range(500):
        value = 10 ** random.uniform(-6, 9)
        said = formatting.number(value)
        assert re.fullmatch(r"\d+(\.\d+)?", said)
        assert float(said) == pytest.approx(value, rel=5.1e-3)
        assert len(said.replace(".", "").lstrip("0")) >= 3 or value < 1e-3
    assert formatting.number(0) == "0" and formatting.number(float("inf")) == "inf"
