"""The only place that picks an implementation.

A primitive states its formula and the function that runs by a backend's name:

    _BIAS = declare("gather_bias", _run, gather_bias_reference)     _run(bias, ids, impl)
    _BIAS(impl, bias, ids, inputs={"bias": bias})

"auto" is "triton" for CUDA tensors of a dtype that the kernels take, and "torch" otherwise.  A
named implementation never falls back: what it cannot take is a ValueError.  Every implementation
runs outside autocast, which would otherwise round the products inside a primitive to 16 bits;
`first_order` does it for backward.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .autograd import full_precision
from .gpu import on_gpu

# Triton itself is imported with the first kernel that is launched: it costs as much as the losses.
HAS_TRITON = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")

FUSED = (torch.float32, torch.bfloat16, torch.float16)  # the dtypes kernels are made for

_primitives: dict[str, Primitive] = {}


class Primitive:
    """The implementations of one primitive by name.  fused: the dtypes that its kernels take."""

    def __init__(
        self,
        name: str,
        implementations: dict[str, Callable[..., Any]],
        fused: tuple[torch.dtype, ...] = FUSED,
    ) -> None:
        self.name, self.implementations, self.fused = name, implementations, fused

    def choose(self, impl: str, device: torch.device) -> str:
        """The name of the implementation that impl means on this device.

        Raises ValueError when this primitive has no such implementation.
        """
        if impl == "auto":
            fused = on_gpu(device) and "triton" in self.implementations
            return "triton" if fused else "torch"
        if impl not in self.implementations:
            known = ", ".join(["auto", *self.implementations])
            raise ValueError(f"impl must be one of {known} for {self.name}, got {impl!r}")
        return impl

    def choose_for(self, impl: str, inputs: Mapping[str, Tensor], problem: str = "") -> str:
        """`choose` for these inputs, which lie on one device.

        problem: why the kernels cannot do it, as a sentence, or "".  For "auto" it means torch, as
        does a dtype that they do not take; for "triton" both are a ValueError.
        """
        unfit = [x for x in inputs.values() if x.dtype not in self.fused]
        if impl == "auto" and (problem or unfit):
            impl = "torch"
        chosen = self.choose(impl, next(iter(inputs.values())).device)
        if chosen == "triton":
            if problem:
                raise ValueError(problem)
            for name, x in inputs.items():
                _check_fused_input(name, x, self.fused)
        return chosen

    def __call__(
        self, impl: str, *args: Any, inputs: Mapping[str, Tensor], problem: str = ""
    ) -> Any:
        """The result of args.  inputs: those of them, by name, that decide the implementation."""
        run = self.implementations[self.choose_for(impl, inputs, problem)]
        with full_precision(next(iter(inputs.values())).device):
            return run(*args)


def declare(
    name: str,
    run: Callable[..., Any],
    reference: Callable[..., Any],
    fused: tuple[torch.dtype, ...] = FUSED,
) -> Primitive:
    """Register a primitive.  run: takes a backend's name, "torch" or "triton", as last argument.

    fused: the dtypes that its kernels take; none: it has no kernels.
    """
    backends = ("torch", "triton") if HAS_TRITON and fused else ("torch",)
    runs = {backend: _by_backend(run, backend) for backend in backends}
    _primitives[name] = Primitive(name, {**runs, "reference": reference}, fused)
    return _primitives[name]


def _by_backend(run: Callable[..., Any], backend: str) -> Callable[..., Any]:
    return lambda *args: run(*args, backend)


def implementations(device: torch.device | str) -> dict[str, str]:
    """Which implementation `auto` picks for each primitive on this device.

    >>> implementations("cpu")["pairwise_lse"]
    'torch'
    """
    device = torch.device(device)
    return {name: p.choose("auto", device) for name, p in sorted(_primitives.items())}


def _check_fused_input(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if x.dtype not in dtypes:
        got = f"{name} in {x.dtype}"
        raise ValueError(f"impl='triton' is for float32, bfloat16 and float16, got {got}")
    if not on_gpu(x.device) and not INTERPRETED:
        raise ValueError(
            f"impl='triton' needs CUDA tensors, got {name} on {x.device}; "
            "TRITON_INTERPRET=1 set before the import runs it there, slowly"
        )
