"""What the GPU's tests stand on, each with its stand-in for a rehearsal.

With FASTSSL_GPU_REHEARSAL=1 the same tests run at tiny shapes on a CPU, Triton interpreting its
kernels.  That proves the tests themselves; what only a GPU has is behind the helpers here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice, product
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastssl.kernels.common.chunks import CHUNK_BYTES
from tests.oracle import largest_tensor

REHEARSAL = os.environ.get("FASTSSL_GPU_REHEARSAL") == "1"
RECORDING = os.environ.get("FASTSSL_GPU_RECORDING") == "1"  # at the GPU's shapes: tests/gpu/pack.py
PRETENDED = REHEARSAL or RECORDING
DEVICE = torch.device("cpu" if PRETENDED else "cuda:0")
T = TypeVar("T")
U = TypeVar("U")


def pick(gpu: T, tiny: T) -> T:
    """The shape for the GPU, or the one that its rehearsal can afford."""
    return tiny if REHEARSAL else gpu


def crossed(items: Iterable[T], values: Iterable[U]) -> list[tuple[T, U]]:
    """Every item with every value; a rehearsal goes once through the longer, round the other."""
    items, values = list(items), list(values)
    if not REHEARSAL:
        return list(product(items, values))
    most = max(len(items), len(values)) if items and values else 0
    return list(islice(zip(cycle(items), cycle(values)), most))


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Whatever waits for the GPU inside raises; a CPU has nothing to wait for."""
    if PRETENDED:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def late_stream() -> Iterator[None]:
    """A stream of its own that is busy for some 50 ms: work on any other one comes too early."""
    if PRETENDED:
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles
        yield
    torch.cuda.current_stream().wait_stream(stream)


class Replay:
    """A step captured in a CUDA graph: `replay(inputs)` copies them in and runs it again.

    The rehearsal calls the step instead.
    """

    def __init__(self, step: Callable[..., list[Tensor]], inputs: Sequence[Tensor]) -> None:
        self.step = step
        self.inputs = [x.detach().clone() for x in inputs]
        if PRETENDED:
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, and makes what is made once
            for _ in range(3):
                step(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = step(*self.inputs)

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """What the step gives for these inputs."""
        for mine, new in zip(self.inputs, inputs, strict=True):
            mine.copy_(new)
        if PRETENDED:
            return self.step(*self.inputs)
        self.graph.replay()
        return [x.clone() for x in self.results]


def peak_bytes(call: Callable[[], Any]) -> int:
    """Bytes held at most during a call beyond what was held before it, after one that warms up.

    The rehearsal counts the largest tensor alone.
    """
    if PRETENDED:
        return 8 * largest_tensor(call)
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def chunk_bytes() -> int:
    """The budget of a streamed implementation's temporaries."""
    return CHUNK_BYTES[DEVICE.type]


def other_device() -> torch.device:
    """A device that the inputs are not on."""
    return torch.device("meta" if REHEARSAL else "cpu")


def backend() -> str:
    """What torch.compile compiles with; the rehearsal traces, and compiles nothing."""
    return "eager" if REHEARSAL else "inductor"
