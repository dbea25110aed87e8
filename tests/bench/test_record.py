"""The record: written line by line, read back whole, refused with the line's number."""

import json

import pytest
import torch

from fastssl.bench import record
from fastssl.bench.record import Ceiling, Fit, Published, Result, Run, Spread

RUN = Run(
    {"device": "a machine", "command": "bench --quick"},
    [Ceiling("copy", 10.0, "GB/s")],
    [
        Result(
            "square",
            {"N": 5},
            "float32",
            "fastssl",
            rounds=9,
            ms={"step": Spread(1.0, 2.0, 4.0)},
            flops={"fwd": 4e9, "bwd": 2e9},
            bytes_moved={"fwd": 4e6},
            items=8,
            unit="numbers",
        ),
        Result("square", {"N": 5}, "float32", "other", "wrong", "value is off"),
    ],
    [Fit("square", "float32", "fastssl", "N", {"D": 3}, "ms", 1.02, 0.999, 6)],
    [Published("square", "them", "a GPU", "N = 5", "bfloat16", "3 ms", "a paper")],
    12.5,
)


def test_what_is_written_is_read_back(tmp_path):
    record.write(tmp_path / "run.jsonl", RUN)
    assert record.read(tmp_path / "run.jsonl") == RUN
    lines = (tmp_path / "run.jsonl").read_text().splitlines()
    kinds = ["run", "ceiling", "result", "result", "fit", "published", "end"]
    assert [json.loads(line)["kind"] for line in lines] == kinds


def test_a_run_cut_short_keeps_its_lines(tmp_path):
    path = tmp_path / "run.jsonl"
    record.write_line(path, "run", RUN.conditions)
    record.write_line(path, "result", RUN.results[0])
    found = record.read(path)
    assert found.seconds is None and found.results == RUN.results[:1]


def test_rates():
    row = RUN.results[0]
    assert row.tflops == pytest.approx(6e9 / 2e-3 / 1e12)
    assert row.gbs == pytest.approx(4e6 / 2e-3 / 1e9)
    assert row.items_per_s == pytest.approx(4000)
    assert RUN.results[1].tflops is None and RUN.results[1].items_per_s is None


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is empty"),
        ("{}", "line 1: not a benchmark record"),
        ('{"kind": "result"}', "the first line must be of kind 'run'"),
        ('{"kind": "run"}\nnonsense', "line 2: not a benchmark record"),
        ('{"kind": "run"}\n{"kind": "poem"}', "line 2"),
        ('{"kind": "run"}\n{"kind": "end"}', "line 2"),
    ],
)
def test_what_is_no_record_is_refused_with_its_line(tmp_path, text, complaint):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=complaint):
        record.read(path)


def test_conditions_say_where_with_what_and_how():
    found = record.conditions(torch.device("cpu"), ["fastssl", "bench", "a b"])
    assert found["type"] == "cpu" and found["device"] and found["arch"] == found["driver"] == ""
    assert found["versions"]["torch"] == torch.__version__ and "fastssl" in found["versions"]
    assert found["command"] == "fastssl bench 'a b'"
    assert found["threads"] == torch.get_num_threads()
