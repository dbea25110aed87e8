"""Exponents: exact on exact powers, blind to rows without a time, honest about small sizes."""

from dataclasses import replace

import pytest

from fastssl.bench.record import Spread
from fastssl.bench.report.scaling import fit, fits
from tests.bench import sample


@pytest.mark.parametrize("exponent", [-0.5, 0.0, 1.0, 2.0, 2.37])
def test_a_power_gives_its_exponent(exponent):
    xs = [3, 10, 64, 500]
    found, r2 = fit(xs, [7.0 * x**exponent for x in xs])
    assert found == pytest.approx(exponent, abs=1e-12)
    assert r2 == pytest.approx(1.0)


def test_noise_lowers_r2():
    exponent, r2 = fit([1, 2, 4, 8], [1.0, 2.6, 3.4, 8.5])
    assert exponent == pytest.approx(0.965, abs=0.001)  # both by numpy on the logarithms
    assert r2 == pytest.approx(0.9615, abs=0.0001)


@pytest.mark.parametrize(
    "xs, ys, why",
    [([1], [1], "two data points"), ([2, 2], [1, 2], "constant"), ([1, 2], [1], "same number")]
    + [([1, 2], [0, 1], "positive"), ([-1, 2], [1, 1], "positive")],
)
def test_what_cannot_be_fitted_is_refused(xs, ys, why):
    with pytest.raises(ValueError, match=why):
        fit(xs, ys)


def sweep(times, **change):
    rows = []
    for n, ms in times.items():
        row = sample.timed("case", {"N": n, "D": 4}, "fastssl", ms, sweep="N", peak=int(100 * ms))
        rows.append(replace(row, **change))
    return rows


def test_time_and_memory_of_each_rival():
    found = {(f.rival, f.quantity): f for f in fits(sample.run().results)}
    assert set(found) == {(r, q) for r in ("fastssl", "reference") for q in ("ms", "peak")}
    ours = found["fastssl", "peak"]
    assert (ours.variable, ours.fixed, ours.points) == ("N", {"D": 128}, 4)
    assert ours.exponent == pytest.approx(1.0)
    assert found["reference", "peak"].exponent == pytest.approx(2.0)
    assert found["reference", "ms"].points == 3  # six have a time, the seventh ran out of memory


def test_from_six_points_on_the_upper_half_counts():
    overhead = {2**k: 1.0 for k in range(3)} | {2**k: 4.0**k for k in range(3, 6)}
    assert fits(sweep(overhead))[0].exponent == pytest.approx(2.0)
    fewer = {k: ms for k, ms in overhead.items() if k > 1}
    assert fits(sweep(fewer))[0].exponent > 2.2  # five points: all of them


def test_three_ok_points_of_a_sweep_or_none():
    times = {4: 1.0, 8: 2.0, 16: 4.0}
    assert len(fits(sweep(times))) == 2
    assert fits(sweep({4: 1.0, 8: 2.0})) == []
    assert fits(sweep(times, sweep="")) == []
    assert fits(sweep(times, status="wrong")) == []
    assert [f.quantity for f in fits(sweep(times, peak=None))] == ["ms"]


def test_other_shapes_dtypes_and_rivals_are_other_lines():
    times = {4: 1.0, 8: 2.0, 16: 4.0}
    rows = sweep(times) + [
        replace(row, ms={"run": Spread(1, row.shape["N"] ** 2, 1)}, **change)
        for change in ({"dtype": "float16"}, {"rival": "other"})
        for row in sweep(times)
    ]
    wide = [replace(row, shape={**row.shape, "D": 8}) for row in sweep(times)]
    found = [(f.dtype, f.rival, f.fixed["D"]) for f in fits(rows + wide) if f.quantity == "ms"]
    assert sorted(found) == [
        ("float16", "fastssl", 4),
        ("float32", "fastssl", 4),
        ("float32", "fastssl", 8),
        ("float32", "other", 4),
    ]
