"""Where rivals come from: libraries that may not be installed, and torch.compile.

Nothing is imported or compiled before a rival's first call, so that a case can be built where its
rivals cannot, and a library that breaks while it is imported fails as the rival it is, alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fastssl.bench.registry import OURS, REFERENCE, Absent, Outputs, Rival
from fastssl.kernels import implementations

BACKEND = "inductor"  # what "compile" compiles with
Rivals = dict[str, Rival | Absent]


class Late:
    """A rival that `build` makes at its first call; `rival` is what it made, None before."""

    def __init__(self, build: Callable[[], Any]) -> None:
        self._build = build
        self.rival: Any = None

    def __call__(self, *inputs: Any) -> Outputs:
        if self.rival is None:
            self.rival = self._build()
        return self.rival(*inputs)


_REMEDY = "pip install 'fastssl-torch[rivals]'"


def library(module: str, build: Callable[[Any], Rival], *, remedy: str = _REMEDY) -> Rival | Absent:
    """The rival that `build(module)` makes, or Absent(remedy) where its package is not installed.

    module: dotted name; only its first part is looked for here.  What the import or the build
    raises comes out of the rival's first call.

    >>> library("math", lambda math: math.sqrt)(4.0)
    2.0
    >>> library("no_such_package", lambda module: module.loss)
    Absent(why="pip install 'fastssl-torch[rivals]'")
    """
    if not has_packages(module):
        return Absent(remedy)
    return Late(lambda: build(import_module(module)))


def on_cuda(device: torch.device, rival: Rival | Absent) -> Rival | Absent:
    """A rival whose kernels are for CUDA alone; Absent, saying so, on another device.

    >>> on_cuda(torch.device("cpu"), abs)
    Absent(why='has kernels for CUDA alone')
    """
    return rival if device.type == "cuda" else Absent("has kernels for CUDA alone")


def has_packages(*modules: str) -> bool:
    """Whether the packages of all these modules are there; imports none of them."""
    return all(find_spec(module.partition(".")[0]) is not None for module in modules)


def compile_late(reference: Rival) -> Rival:
    """torch.compile of `reference`, for the one shape it is called with; no graph break allowed.

    torch counts what it compiles by function and gives up after a few shapes of one: what was
    compiled before is forgotten here, so that a sweep's last shape is compiled as its first.
    """

    def build() -> Rival:
        torch._dynamo.reset()
        return torch.compile(reference, backend=BACKEND, fullgraph=True, dynamic=False)

    return Late(build)


def beside(ours: Rival | Absent, reference: Rival) -> Rivals:
    """What every case has: ours, the formula as written, and that compiled."""
    return {OURS: ours, REFERENCE: reference, "compile": compile_late(reference)}


def by_implementation(
    call: Callable[..., Outputs], device: torch.device, *, primitive: str = "", **options: Any
) -> Rivals:
    """`call(*inputs, impl=...)` with what `auto` picks, the formula as written, and that compiled.

    Where `auto` picks a fused kernel, the chunked implementation stands beside it.
    primitive: its name, where `call` is not the primitive itself.  options: what it is told.
    """
    ours: Rivals = {OURS: partial(call, impl="auto", **options)}
    if implementations(device)[primitive or call.__name__] == "triton":
        ours[OURS + " torch"] = partial(call, impl="torch", **options)
    return ours | beside(ours[OURS], partial(call, impl="reference", **options))


class _Upstream(torch.autograd.Function):
    """The identity, whose gradient is w."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.saved_tensors[0], None


def weigh(rivals: Rivals) -> Rivals:
    """The same rivals, whose result has the last input as its gradient.

    The clock differentiates a sum, whose gradient is the same everywhere: it takes no memory to
    read, and standardized columns turn it into zero.  A loss weighs every element.
    """
    return {
        name: rival if isinstance(rival, Absent) else partial(_weigh_one, rival)
        for name, rival in rivals.items()
    }


def _weigh_one(rival: Rival, *inputs: Tensor) -> Outputs:
    out: Any = rival(*inputs[:-1])
    return _Upstream.apply(out, inputs[-1].to(out.dtype))  # type: ignore[return-value]


def nbytes(*tensors: Tensor) -> int:
    """What the tensors hold, in bytes.

    >>> nbytes(torch.zeros(3), torch.zeros(2, dtype=torch.int64))
    28
    """
    return sum(x.numel() * x.element_size() for x in tensors)
