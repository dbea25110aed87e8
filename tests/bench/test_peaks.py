"""Ceilings: measured, plausible, and the floor they give."""

import pytest
import torch

from fastssl.bench.measure import peaks
from fastssl.bench.measure.peaks import DATASHEETS, datasheet, floor_ms, measure_ceilings
from fastssl.bench.record import Ceiling

HAVE = [Ceiling("copy", 100.0, "GB/s"), Ceiling("matmul float32", 2.0, "TFLOP/s")]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Buffers of a MB: what is copied is not what is tested."""
    monkeypatch.setattr(peaks, "_ENOUGH_S", 0)
    monkeypatch.setitem(peaks._COPIED, "cpu", 1 << 20)
    monkeypatch.setattr(peaks, "cache_bytes", lambda device: 1)


def test_ceilings_are_measured():
    copy, product = measure_ceilings(torch.device("cpu"), ("float32",))
    assert (copy.what, copy.unit) == ("copy", "GB/s") and 0.01 < copy.measured < 20000
    assert (product.what, product.unit) == ("matmul float32", "TFLOP/s")
    assert 1e-3 < product.measured < 50
    assert copy.datasheet is None and product.datasheet is None


@pytest.mark.parametrize(
    ("spent", "rate"), [((30.0,), 2 * 384**3 / 30e9), ((2.0, 100.0), 2 * 1536**3 / 100e9)]
)
def test_what_a_cpu_emulates_is_measured_on_a_small_product_alone(spent, rate, monkeypatch):
    left = [2.5, *spent]  # of the copy, then of each product
    monkeypatch.setattr(peaks, "_best_ms", lambda call, device: left.pop(0))
    _, product = measure_ceilings(torch.device("cpu"), ("bfloat16",))
    assert product.measured == pytest.approx(rate) and not left


def test_the_floor_is_the_slower_of_arithmetic_and_memory_in_each_pass():
    flops, moved = {"fwd": 2e9, "bwd": 1e9}, {"fwd": 1e6, "bwd": 1e9}
    assert floor_ms(flops, moved, "float32", HAVE) == pytest.approx(1.0 + 10.0)
    assert floor_ms({}, {"run": 1e8}, "float32", HAVE) == pytest.approx(1.0)
    assert floor_ms(flops, moved, "bfloat16", HAVE) is None
    assert floor_ms({}, {}, "float32", HAVE) is None


def test_datasheets():
    sheet = datasheet("NVIDIA H100 80GB HBM3")
    assert sheet is not None and sheet.gbs == 3350
    assert datasheet("a toaster") is None
    for sheet in DATASHEETS.values():
        assert sheet.source and sheet.gbs > 100
        assert sheet.tflops["float32"] < sheet.tflops["tf32"] < sheet.tflops["bfloat16"]
