"""Two runs compared: a regression is reported, noise is not, and the machine is asked first."""

from dataclasses import replace

import pytest
import torch

from fastssl.bench.record import Spread, conditions, read, write
from fastssl.bench.report.compare import compare, compare_files, exit_code, list_differences, report
from tests.bench import sample

SHAPE = {"N": 8}


def times(low, middle, high):
    return {"run": Spread(low, middle, high)}


def row(rival="fastssl", **change):
    base = replace(sample.timed("case", SHAPE, rival, 10.0), ms=times(9.8, 10.0, 10.2), noise=0.01)
    return replace(base, **change)


def kinds(a, b, **options):
    runs = (sample.run(results=[r] if r else []) for r in (a, b))
    return [c.kind for c in compare(*runs, **options)]


def test_a_run_equals_itself():
    changes = compare(sample.run(), sample.run())
    assert changes == [] and exit_code(changes) == 0
    assert report(changes) == "No regression.\n"


@pytest.mark.parametrize(
    "ms, noise, kind",
    [
        (times(10.5, 10.7, 10.9), 0.01, ["slower"]),
        (times(10.3, 10.4, 10.5), 0.01, []),  # 4 %: under the threshold
        (times(10.1, 10.7, 10.9), 0.01, []),  # the spreads overlap
        (times(10.5, 10.7, 10.9), 0.08, []),  # inside the noise
        (times(9.2, 9.3, 9.4), 0.01, ["faster"]),
        (times(9.2, 9.6, 9.7), 0.01, []),
        (times(9.2, 9.3, 9.9), 0.01, []),
        (times(9.2, 9.3, 9.4), 0.08, []),
    ],
)
def test_time(ms, noise, kind):
    assert kinds(row(), row(ms=ms, noise=noise)) == kind
    assert kinds(row(noise=noise), row(ms=ms)) == kind


def test_the_threshold_can_be_moved():
    slow = row(ms=times(10.5, 10.7, 10.9))
    assert kinds(row(), slow, threshold=0.1) == []
    assert kinds(row(), row(ms=times(10.25, 10.3, 10.4)), threshold=0.02) == ["slower"]
    with pytest.raises(ValueError, match="threshold.*-0.1"):
        kinds(row(), slow, threshold=-0.1)


@pytest.mark.parametrize(
    "before, after, kind",
    [
        (100_000_000, 106_000_000, ["more memory"]),
        (100_000_000, 104_000_000, []),
        (100_000_000, 94_000_000, ["less memory"]),
        (1_000_000, 1_500_000, []),  # under 1 MiB
        (0, 5_000_000, ["more memory"]),
        (None, 5_000_000, []),
    ],
)
def test_memory(before, after, kind):
    assert kinds(row(peak=before), row(peak=after)) == kind


@pytest.mark.parametrize("status", ["wrong", "failed", "out of memory"])
def test_what_no_longer_works_is_a_regression(status):
    broken = row(status=status, why="a reason", ms={}, peak=None)
    (change,) = compare(sample.run(results=[row()]), sample.run(results=[broken]))
    assert change.kind == "broken" and change.regression and exit_code([change]) == 1
    assert f"No longer works (1)\n  fastssl  case  N=8  float32: {status}: a reason" in report(
        [change]
    )
    assert kinds(broken, row()) == ["mended"]
    assert kinds(broken, broken) == []


def test_new_and_vanished_rows_are_named():
    absent = row(status="absent", why="pip install", ms={})
    assert kinds(None, row()) == ["new"] and kinds(row(), None) == ["gone"]
    assert kinds(absent, row()) == ["new"] and kinds(row(), absent) == ["gone"]
    assert kinds(absent, None) == kinds(None, absent) == kinds(absent, absent) == []


def test_rows_are_matched_by_case_shape_dtype_and_rival():
    slow = times(15, 16, 17)
    for other in ({"case": "x"}, {"shape": {"N": 9}}, {"dtype": "float16"}, {"rival": "x"}):
        assert kinds(row(), row(ms=slow, **other)) == ["gone", "new"]
    a = row(shape={"N": 8, "D": 2})
    assert kinds(a, row(shape={"D": 2, "N": 8}, ms=slow)) == ["slower"]


def test_only_ours_sets_the_exit_code():
    for rival, code in (("lightly", 0), ("fastssl", 1), ("fastssl chunked", 1)):
        runs = (sample.run(results=[row(rival, ms=ms)]) for ms in (times(1, 1, 1), times(2, 2, 2)))
        changes = compare(*runs)
        assert [c.kind for c in changes] == ["slower"] and exit_code(changes) == code
        assert f"1 regression, {code} of them fastssl's." in report(changes)
        assert "1.00 -> 2.00 ms  (+100 %)" in report(changes)
    assert exit_code(compare(sample.run(results=[]), sample.run(results=[row()]))) == 0


def test_ours_is_named_before_the_others():
    fast = [row("lightly"), row("fastssl"), row("reference")]
    slow = [replace(r, ms=times(20, 20, 20)) for r in fast]
    said = report(compare(sample.run(results=fast), sample.run(results=slow)))
    assert [line.split()[0] for line in said.splitlines()[1:4]] == [
        "fastssl",
        "lightly",
        "reference",
    ]


@pytest.mark.parametrize("key", ["device", "type", "threads", "float32_products"])
def test_another_machine_is_said_first(key):
    other = sample.run(conditions={**sample.CONDITIONS, key: "other"}, results=[])
    changes = compare(sample.run(), other)
    assert changes[0].kind == "conditions"
    assert report(changes).startswith("WARNING: not the same machine: times cannot be compared (")


def test_another_torch_is_said_too():
    other = {**sample.CONDITIONS, "versions": {"torch": "9", "triton": "3.9.0"}}
    (said,) = list_differences(sample.CONDITIONS, other)
    assert said == "not the same software: a change may be its own (torch 2.15.0 and 9)"
    assert list_differences({}, {}) == []


def test_real_conditions_survive_a_file(tmp_path):
    real = conditions(torch.device("cpu"), ["bench"])
    write(tmp_path / "a", sample.run(conditions=real))
    assert compare(sample.run(conditions=real), read(tmp_path / "a")) == []
    assert read(tmp_path / "a").conditions["type"] == "cpu"


def test_files(tmp_path):
    slow = replace(sample.fixed_rows()[0], ms=times(20, 20, 20))
    write(tmp_path / "a", sample.run())
    write(tmp_path / "b", sample.run(results=[slow, *sample.run().results[1:]]))
    text, code = compare_files(tmp_path / "a", str(tmp_path / "b"))
    assert code == 1 and "fastssl  ntxent  N=8192 D=128  float32: 2.00 -> 20.0 ms" in text
    assert compare_files(tmp_path / "a", tmp_path / "a") == ("No regression.\n", 0)
    (tmp_path / "b").write_text("{}")
    with pytest.raises(ValueError, match="line 1: not a benchmark record"):
        compare_files(tmp_path / "a", tmp_path / "b")


def test_records_that_share_no_measurement_are_refused(tmp_path):
    """Fault 26: "No regression." and exit code 0, where nothing had been compared."""
    write(tmp_path / "a", sample.run(results=[row()]))
    write(tmp_path / "b", sample.run(results=[row(case="other"), row(shape={"N": 9})]))
    with pytest.raises(ValueError, match=r"nothing to compare: .*a has case; .*b has other, case"):
        compare_files(tmp_path / "a", tmp_path / "b")
