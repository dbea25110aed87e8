"""Devices: what they hold, and at most do.

Of GPUs what their makers state, dense; of this machine's processor what a product and an addition
take here and now.
"""

import difflib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.config import ConfigError

from .replay import host, seconds

GB, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Device:
    """memory in bytes; bf16, tf32, fp32 in operations a second; the rest in bytes a second.

    hbm: of its memory, read and written.  link: to the other devices of its node, one way.
    nic: of the network, one way, its share of the node's.  launch: seconds that the host takes for
    an operator.  efficiency: the share of the rates that is reached, assumed of GPUs, and 1 where
    the rates are measured.
    Of a processor: attention, its rate in operations a second; cached, of what lies in its caches;
    fresh, seconds for a byte that the system has to hand out first; threads of a rank.  Rates of a
    precision that was not measured are 0.
    """

    name: str
    memory: float
    bf16: float
    tf32: float
    fp32: float
    hbm: float
    link: float
    nic: float
    launch: float = 8e-6  # PyTorch's eager mode, measured: 6 to 10 us an operator
    efficiency: float = 0.5
    on_cpu: bool = False
    attention: float = 0.0
    cached: float = 0.0
    fresh: float = 0.0
    threads: int = 1

    def rate(self, precision: str) -> float:
        """Operations a second of matrix products: in float32 torch uses no TF32 unless told to."""
        return self.bf16 if precision == "bf16" else self.fp32


def _gpu(name: str, memory: float, rates: tuple[float, ...], hbm: float, *ways: float) -> Device:
    bf16, tf32, fp32 = (TERA * rate for rate in rates)
    link, nic = (GB * way for way in ways)
    return Device(name, GB * memory, bf16, tf32, fp32, GB * hbm, link, nic)


# Gigabytes, TFLOP/s dense in bf16, TF32, fp32 (half of what is stated "with sparsity"), GB/s of
# memory, GB/s one way of NVLink or PCIe (half of what is stated for both), GB/s of network a GPU as
# in the maker's own system, or assumed.
GPUS = {
    device.name: device
    for device in (
        # NVIDIA H100 datasheet, SXM; network of DGX H100: 8 x 400 Gb/s
        _gpu("h100", 80, (989.5, 494.5, 67), 3350, 450, 50),
        # NVIDIA H200 datasheet, SXM; network as of the DGX H200
        _gpu("h200", 141, (989.5, 494.5, 67), 4800, 450, 50),
        # NVIDIA DGX B200 and HGX B200 datasheets, an eighth: 1,440 GB, 64 TB/s, NVLink 14.4 TB/s;
        # bf16 36 and TF32 18 PFLOP/s with sparsity, fp32 0.6; network 8 x 400 Gb/s
        _gpu("b200", 180, (2250, 1125, 75), 8000, 900, 50),
        # NVIDIA A100 datasheet, SXM 80 GB; network of DGX A100: 8 x 200 Gb/s
        _gpu("a100-80", 80, (312, 156, 19.5), 2039, 300, 25),
        # NVIDIA A100 datasheet, SXM 40 GB
        _gpu("a100-40", 40, (312, 156, 19.5), 1555, 300, 25),
        # NVIDIA L40S datasheet; PCIe 4 x16; network assumed: 100 Gb/s a GPU
        _gpu("l40s", 48, (362, 183, 91.6), 864, 32, 12.5),
        # NVIDIA L4 datasheet; PCIe 4 x16; network assumed: 25 Gb/s a GPU
        _gpu("l4", 24, (121, 60, 30.3), 300, 32, 3.125),
        # NVIDIA A10 datasheet; PCIe 4 x16; network assumed: 25 Gb/s a GPU
        _gpu("a10", 24, (125, 62.5, 31.2), 600, 32, 3.125),
        # NVIDIA Ada architecture whitepaper, appendix A (bf16 summed in fp32); PCIe 4 x16; network
        # assumed: 10 Gb/s a GPU
        _gpu("rtx4090", 24, (165.2, 82.6, 82.6), 1008, 32, 1.25),
        # NVIDIA GA102 architecture whitepaper, appendix A (bf16 summed in fp32); PCIe 4 x16
        _gpu("rtx3090", 24, (71, 35.6, 35.6), 936, 32, 1.25),
    )
}


def planned_on(name: str | None, asked: str, precision: str, threads: int | None = None) -> Device:
    """The device of that name; without one, where the run would be: its key `device` is `asked`.

    Raises ConfigError for another name.
    """
    if name is None and asked != "cpu":
        return own(precision, threads)
    return find(name or "cpu", precision, threads)


def find(name: str, precision: str = "fp32", threads: int | None = None) -> Device:
    """The GPU of that name, or this machine's processor where it is "cpu".

    Raises ConfigError for another name.
    """
    if name == "cpu":
        return this_cpu(precision, threads)
    if name not in GPUS:
        close = difflib.get_close_matches(name, GPUS, n=1, cutoff=0.5)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ConfigError(f"--gpu {name} is not known{hint}: give cpu or {', '.join(GPUS)}")
    return GPUS[name]


def own(precision: str, threads: int | None = None) -> Device:
    """This machine's device: its GPU, with no rates where the table has none, or its processor."""
    if not torch.cuda.is_available():
        return this_cpu(precision, threads)
    called = torch.cuda.get_device_name()
    memory = torch.cuda.get_device_properties(0).total_memory
    for name, device in sorted(GPUS.items(), reverse=True):
        known = name.partition("-")[0] in called.lower().replace(" ", "")
        if known and abs(device.memory - memory) < 0.2 * memory:
            return device
    return Device(called, memory, 0, 0, 0, 0, 0, 0)


def this_cpu(precision: str, threads: int | None = None) -> Device:
    """This machine's processor, measured in a second; threads: of a rank, by default torch's."""
    dtype, count = _DTYPES[precision], threads or torch.get_num_threads()
    with using(count):
        products, attention = _products(dtype), _attention(dtype)
        cached, launch, (hbm, fresh) = _cached(dtype), host(), _memory()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(
        "cpu",
        memory,
        bf16=products if precision == "bf16" else 0,
        tf32=0,
        fp32=products if precision == "fp32" else 0,
        hbm=hbm,
        link=1 / (2 * fresh + 4 / hbm),  # gloo copies what it sends, through the loopback device
        nic=1.25 * GB,
        launch=launch,
        efficiency=1.0,
        on_cpu=True,
        attention=attention,
        cached=cached,
        fresh=fresh,
        threads=count,
    )


def with_rates(device: Device, efficiency: float | None, nic: float | None) -> Device:
    """The device with what the user states of it.

    Raises ConfigError for an efficiency outside of (0, 1], and a network without any bandwidth.
    """
    if efficiency is not None:
        if not 0 < efficiency <= 1:
            raise ConfigError(f"--efficiency {efficiency} must lie in (0, 1]")
        device = replace(device, efficiency=efficiency)
    if nic is not None:
        if not nic > 0:
            raise ConfigError(f"--nic {nic} must be more than 0 GB/s")
        device = replace(device, nic=nic * GB)
    return device


@contextmanager
def using(threads: int) -> Iterator[None]:
    """Inside, torch has so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _products(dtype: torch.dtype) -> float:
    """Of a linear layer's three products, forward and backward."""
    x, w = (torch.randn(rows, 512).to(dtype).requires_grad_() for rows in (256, 1024))
    return 6 * 256 * w.numel() / seconds(lambda: _passed(F.linear(x, w)))


def _attention(dtype: torch.dtype) -> float:
    """Forward has two products, backward five."""
    q, k, v = (torch.randn(2, 6, 128, 64).to(dtype).requires_grad_() for _ in range(3))
    flops = 14 * 2 * 6 * 128**2 * 64
    return flops / seconds(lambda: _passed(F.scaled_dot_product_attention(q, k, v)))


def _cached(dtype: torch.dtype) -> float:
    """Bytes a second of what stands between products: a norm, an activation, an addition."""
    x = torch.randn(512, 512).to(dtype).requires_grad_()

    def call() -> None:
        _passed(F.gelu(F.layer_norm(x, (512,))) + x)

    # Read and written: norm 2 and 3, activation 2 and 3, addition 3 and 3.
    return 16 * x.nbytes / seconds(call)


def _memory() -> tuple[float, float]:
    """Bytes a second of memory, in place; seconds for a fresh byte."""
    x = torch.zeros(1 << 24)
    both = seconds(lambda: x.mul_(1.0), 0.05) / (2 * x.nbytes)
    there = seconds(lambda: x.fill_(1.0), 0.05) / x.nbytes
    fresh = seconds(lambda: torch.ones(1 << 24), 0.05) / x.nbytes
    return 1 / both, max(fresh - there, 0.0)


def _passed(y: Tensor) -> None:
    y.backward(torch.ones_like(y))
