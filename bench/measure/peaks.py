"""What this machine can do at most: measured in the same run, beside what its datasheet says.

A copy of a buffer far larger than any cache gives the bytes a second (read and written); a product
of two large random square matrices, through whatever library torch has, the operations a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from fastssl.bench.measure.turns import Clock, cache_bytes, wait
from fastssl.bench.record import Ceiling
from fastssl.kernels.common.matmul import allows_tf32


@dataclass(frozen=True)
class Datasheet:
    """Peaks a vendor states, dense: memory in GB/s, products in TFLOP/s by dtype."""

    gbs: float
    tflops: Mapping[str, float]
    source: str


# Dense rates: where a datasheet states them "with sparsity", half of what it states.
_A100 = {"float32": 19.5, "tf32": 156, "bfloat16": 312, "float16": 312}
_HOPPER = {"float32": 67, "tf32": 494.5, "bfloat16": 989.5, "float16": 989.5}
_L40S = {"float32": 91.6, "tf32": 183, "bfloat16": 362, "float16": 362}
DATASHEETS: dict[str, Datasheet] = {
    "A100-SXM4-40GB": Datasheet(1555, _A100, "NVIDIA A100 datasheet"),
    "A100-SXM4-80GB": Datasheet(2039, _A100, "NVIDIA A100 datasheet"),
    "H100 80GB HBM3": Datasheet(3350, _HOPPER, "NVIDIA H100 datasheet, SXM"),
    "H200": Datasheet(4800, _HOPPER, "NVIDIA H200 datasheet, SXM"),
    "L40S": Datasheet(864, _L40S, "NVIDIA L40S datasheet"),
}
_ENOUGH_S = 0.4
_COPIED = {"cpu": 256 << 20, "cuda": 4 << 30}  # bytes, and at least four times the cache
_SLOW_MS = 20.0  # of a small product: a larger one would take seconds a call


def datasheet(device_name: str) -> Datasheet | None:
    """The datasheet of the GPU that calls itself so, if it is one we have read.

    >>> datasheet("NVIDIA H200").gbs
    4800
    """
    names = [name for name in DATASHEETS if name in device_name]
    return DATASHEETS[max(names, key=len)] if names else None


def measure_ceilings(device: torch.device, dtypes: tuple[str, ...]) -> list[Ceiling]:
    """Copy and matrix product in each dtype, the best of repeated calls, beside the datasheet."""
    sheet = datasheet(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    source = sheet.source if sheet else ""
    ceilings = [Ceiling("copy", _copy_gbs(device), "GB/s", sheet and sheet.gbs, source)]
    for dtype in dtypes:
        peak = sheet.tflops.get(_unit(dtype)) if sheet else None
        rate = _matmul_tflops(device, getattr(torch, dtype))
        ceilings.append(Ceiling(f"matmul {dtype}", rate, "TFLOP/s", peak, source))
    return ceilings


def floor_ms(
    flops: Mapping[str, float],
    bytes_moved: Mapping[str, float],
    dtype: str,
    have: Sequence[Ceiling],
) -> float | None:
    """The time below which no implementation falls here, summed over the passes."""
    rates = {c.what: c.measured for c in have}
    if "copy" not in rates or f"matmul {dtype}" not in rates or not (flops or bytes_moved):
        return None
    tflops, gbs = rates[f"matmul {dtype}"], rates["copy"]
    parts = {**flops, **bytes_moved}
    return sum(
        max(flops.get(part, 0.0) / tflops / 1e9, bytes_moved.get(part, 0.0) / gbs / 1e6)
        for part in parts
    )


def _unit(dtype: str) -> str:
    """float32 products run on the tf32 units when torch has been allowed to."""
    return "tf32" if dtype == "float32" and allows_tf32() else dtype


def _copy_gbs(device: torch.device) -> float:
    size = max(_COPIED[device.type], 4 * cache_bytes(device))
    source = torch.randint(-128, 128, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best_ms(lambda: target.copy_(source), device) / 1e6


def _matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Of a product that fills the device; a CPU that only emulates a dtype is full at once."""
    rate = 0.0
    for n in (8192,) if device.type == "cuda" else (384, 1536):
        a, b = (torch.randn(n, n, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
        spent = _best_ms(lambda a=a, b=b: a @ b, device)
        rate = max(rate, 2 * n**3 / spent / 1e9)
        if spent > _SLOW_MS:
            break
    return rate


def _best_ms(call: Callable[[], object], device: torch.device) -> float:
    """The 20th percentile of repeated calls after one that warms up."""
    times: list[float] = []
    call()
    end = time.perf_counter() + _ENOUGH_S
    while len(times) < 5 or time.perf_counter() < end:
        wait(device)
        clock = Clock(device)
        clock.mark()
        call()
        clock.mark()
        times += clock.spans()
    return sorted(times)[len(times) // 5]
