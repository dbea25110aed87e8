"""Which GPU launches are for: that of the tensors, or one that is pretended.

A pretended GPU shows what would be launched on it where there is none: `fastssl.bench.compiler`
takes the launches before they run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch


class Gpu(NamedTuple):
    """arch: as tuned.json names it, "sm_90"; on ROCm the gfx name."""

    arch: str
    processors: int


_pretended: Gpu | None = None


@contextmanager
def pretend(gpu: Gpu) -> Iterator[None]:
    """Inside, tensors of any device count as the GPU's.  Launches must not reach the driver."""
    global _pretended
    before, _pretended = _pretended, gpu
    try:
        yield
    finally:
        _pretended = before


def on_gpu(device: torch.device) -> bool:
    """Whether what lies on this device is worked on by a GPU."""
    return device.type == "cuda" or _pretended is not None


def gpu_of(device: torch.device) -> Gpu:
    """The GPU that `on_gpu` is true of."""
    return _pretended or _read(device)


@cache
def _read(device: torch.device) -> Gpu:
    found = torch.cuda.get_device_properties(device)
    arch = found.gcnArchName if torch.version.hip else f"sm_{found.major}{found.minor}"
    return Gpu(arch, found.multi_processor_count)
