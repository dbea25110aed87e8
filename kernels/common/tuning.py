"""Which configuration a Triton kernel is launched with: tuned ahead, by GPU and shape class.

A kernel declares its shape classes (`Variant`): what it is compiled from, the configurations worth
trying, and a safe one.  `bench/aot.py` compiles all of them without a GPU, `bench/tune.py` times
them on one, and `config_for` picks: from the table `tuned.json` where this GPU's architecture and
the shape class are in it, else the safe one.  FASTSSL_AUTOTUNE=1 times the candidates at the first
launch of a class instead, and keeps the answer in Triton's own cache (~/.triton/cache, or
$TRITON_CACHE_DIR): launch once before capturing a CUDA graph.  Candidates of equal speed are told
apart by noise: two machines, or ranks, may then sum in another order, each the same at every run.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from .gpu import gpu_of, on_gpu

TABLE = Path(__file__).with_name("tuned.json")
KEPT = "fastssl-tuned.json"  # in a folder for each class, GPU, source and version of Triton
Clock = Callable[[Callable[[], Any]], float]  # median milliseconds of a launch


@dataclass(frozen=True)
class Config:
    """Block sizes (the kernel's constexpr arguments by name), warps and pipeline stages.

    only: the one architecture that a candidate is for, "sm_90"; "" is any.  It tells no two apart.
    """

    blocks: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 2
    only: str = field(default="", compare=False)

    @property
    def options(self) -> dict[str, Any]:
        """The launch's keyword arguments beside the blocks; a * b + c is rounded once."""
        warps, stages = self.num_warps, self.num_stages
        return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}

    @property
    def arguments(self) -> dict[str, Any]:
        """All that a launch takes of a configuration: blocks and options."""
        return {**self.blocks, **self.options}

    @staticmethod
    def read(fields: Mapping[str, Any]) -> Config:
        """The configuration in an entry of a table, whose other fields say how it came about.

        Raises KeyError, TypeError or ValueError for what is no configuration.
        """
        blocks = {str(name): int(size) for name, size in dict(fields["blocks"]).items()}
        return Config(blocks, int(fields["num_warps"]), int(fields["num_stages"]))

    def fields(self) -> dict[str, Any]:
        """What `read` reads."""
        stages = self.num_stages
        return {"blocks": dict(self.blocks), "num_warps": self.num_warps, "num_stages": stages}


@dataclass(frozen=True)
class Variant:
    """One shape class of a kernel: everything its compilation depends on beside the Config.

    name        e.g. "bfloat16-D128"
    signature   Triton types of the arguments that are not constexpr: {"Q": "*bf16", "M": "i32"};
                one that ends in ":16" is divisible by 16, as Triton finds it at run time.
    constexprs  the constexpr arguments that are not block sizes.
    product     whether its products must be matrix instructions (false for IEEE float32).
    candidates  what the tuner tries; each must compile without spills on its architecture, or all.
    safe        the configuration of a GPU that is not in the table; one of the candidates, for any.
    trial       (config, device) -> a function that launches once at a size worth tuning for, and
                returns what was computed: a tensor or several, the same for every config.
    """

    name: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    product: bool
    candidates: tuple[Config, ...]
    safe: Config
    trial: Callable[[Config, torch.device], Callable[[], Any]]

    def tried(self, arch: str) -> tuple[Config, ...]:
        """The candidates on this architecture; of one that no candidate names, those for any."""
        return tuple(config for config in self.candidates if config.only in ("", arch))


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel with its shape classes; `fn` is what @triton.jit returned."""

    name: str
    fn: Any
    variants: Mapping[str, Variant] = field(default_factory=dict)


_kernels: dict[str, Kernel] = {}
_forced: ContextVar[Mapping[str, Config]] = ContextVar("forced", default=MappingProxyType({}))
_timed: dict[tuple[str, str, str], Config] = {}  # what FASTSSL_AUTOTUNE found in this process


def register(kernel: Kernel) -> Kernel:
    """Make a kernel known to the tuner and to the ahead-of-time proof."""
    _kernels[kernel.name] = kernel
    return kernel


def kernels() -> dict[str, Kernel]:
    """Every registered kernel by name, after importing all families' kernels, and Triton."""
    package = __name__.removesuffix(".common.tuning")
    for path in sorted(Path(__file__).parents[1].glob("*/*_triton.py")):
        import_module(f"{package}.{path.parent.name}.{path.stem}")
    return dict(_kernels)


@contextmanager
def forced(kernel: str, config: Config) -> Iterator[None]:
    """Inside, all that this thread launches of `kernel` takes this configuration.

    That of a backward too, which autograd would run in a thread of its own for a GPU.
    """
    token = _forced.set({**_forced.get(), kernel: config})
    try:
        with torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        _forced.reset(token)


def config_for(kernel: Kernel, variant: str, device: torch.device) -> Config:
    """The configuration to launch `kernel` with for this shape class on this device."""
    if kernel.name in _forced.get():
        return _forced.get()[kernel.name]
    shape_class = kernel.variants[variant]
    if not on_gpu(device):
        return shape_class.safe
    if os.environ.get("FASTSSL_AUTOTUNE") == "1":
        return autotuned(kernel, shape_class, device, median_ms)
    return table().get((kernel.name, gpu_of(device).arch, variant), shape_class.safe)


@cache
def table() -> dict[tuple[str, str, str], Config]:
    """tuned.json by (kernel, architecture, class)."""
    content = json.loads(TABLE.read_text(encoding="utf-8"))
    return {
        (kernel, arch, variant): Config.read(entry)
        for kernel, archs in content.items()
        for arch, variants in archs.items()
        for variant, entry in variants.items()
    }


def autotuned(kernel: Kernel, variant: Variant, device: torch.device, clock: Clock) -> Config:
    """The fastest candidate: timed by this process, or before by another; else timed now."""
    known = kernel.name, variant.name, torch.cuda.get_device_name(device)
    if known not in _timed:
        cache = _cache(kernel, known)
        with torch.cuda.device(device):  # whose events and streams the clock takes
            _timed[known] = _read(cache, variant) or _fastest(variant, device, clock, cache)
    return _timed[known]


def _fastest(variant: Variant, device: torch.device, clock: Clock, cache: Any) -> Config:
    """The candidate of the least median, kept for other processes; the safe one if none fits."""
    tried = variant.tried(gpu_of(device).arch)
    times = [_time(variant.trial, config, device, clock) for config in tried]
    best = min(times)
    if math.isinf(best):
        return variant.safe
    chosen = tried[times.index(best)]
    try:
        cache.put(json.dumps({**chosen.fields(), "ms": best}), KEPT)
    except OSError as error:
        warnings.warn(f"the tuning is not kept: {error}", stacklevel=2)
    return chosen


def _time(trial: Callable, config: Config, device: torch.device, clock: Clock) -> float:
    """The median of a launch, infinite where the GPU has not the resources for it."""
    from triton.runtime.errors import OutOfResources, PTXASError

    try:
        return clock(trial(config, device))
    except (OutOfResources, PTXASError):
        return math.inf


def median_ms(launch: Callable[[], Any]) -> float:
    """The median time of a launch on the GPU, each with a cold L2."""
    from triton.testing import do_bench

    return float(do_bench(launch, return_mode="median"))  # pyright: ignore[reportArgumentType]


def _cache(kernel: Kernel, known: tuple[str, str, str]) -> Any:
    """Triton's own cache for what a time depends on: the kernel's source and Triton's version."""
    from triton import __version__
    from triton.runtime.cache import get_cache_manager

    source = getattr(kernel.fn, "cache_key", None) or inspect.getsource(kernel.fn.fn)
    return get_cache_manager(sha256(repr((*known, __version__, source)).encode()).hexdigest())


def _read(cache: Any, variant: Variant) -> Config | None:
    """The candidate that was timed before; None, with a warning, where the file is damaged."""
    path = cache.get_file(KEPT)
    try:
        config = Config.read(json.loads(Path(path).read_text(encoding="utf-8"))) if path else None
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        warnings.warn(f"{path} is damaged and will be overwritten: {error!r}", stacklevel=2)
        return None
    return config if config in variant.candidates else None
