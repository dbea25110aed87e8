"""The only place that picks an implementation.

A primitive declares what it has; adding a fused kernel is one more keyword there:

    _LSE = declare("pairwise_lse", torch=_lse_torch, reference=pairwise_lse_reference)

`auto` picks by the device: "triton" on CUDA where it is declared, "torch" elsewhere; what the
kernel is not made for (a dtype, a mask) a primitive sends to torch by a rule that it states.  A
named implementation never falls back.  Every implementation runs outside autocast, which would
otherwise round the products inside a primitive to 16 bits; `first_order` does it for backward.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch

_primitives: dict[str, Primitive] = {}


class Primitive:
    """The implementations of one primitive, callable as primitive(impl, device, *args)."""

    def __init__(self, name: str, implementations: dict[str, Callable[..., Any]]) -> None:
        self.name, self.implementations = name, implementations

    def choose(self, impl: str, device: torch.device) -> str:
        """The name of the implementation that impl means on this device.

        Raises ValueError when this primitive has no such implementation.
        """
        if impl == "auto":
            on_gpu = device.type == "cuda" and "triton" in self.implementations
            return "triton" if on_gpu else "torch"
        if impl not in self.implementations:
            known = ", ".join(["auto", *self.implementations])
            raise ValueError(f"impl must be one of {known} for {self.name}, got {impl!r}")
        return impl

    def __call__(self, impl: str, device: torch.device, *args: Any) -> Any:
        run = self.implementations[self.choose(impl, device)]
        with full_precision(device):
            return run(*args)


# Asked once, here: torch 2.11's compiler cannot look inside, and torch.compiler's decorator for
# that imports all of torch._dynamo, which costs more than torch itself.
_DEVICES = ("cpu", "cuda", "hpu", "maia", "mps", "mtia", "privateuseone", "xla", "xpu")
_HAVE_AUTOCAST = frozenset(d for d in _DEVICES if torch.amp.is_autocast_available(d))


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Outside autocast, where one is on; devices such as meta have none to leave."""
    if device.type in _HAVE_AUTOCAST and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def declare(name: str, **implementations: Callable[..., Any]) -> Primitive:
    """Register a primitive's implementations: `torch` and `reference` at least."""
    _primitives[name] = Primitive(name, implementations)
    return _primitives[name]


def implementations(device: torch.device | str) -> dict[str, str]:
    """Which implementation `auto` picks for each primitive on this device.

    >>> implementations("cpu")["pairwise_lse"]
    'torch'
    """
    device = torch.device(device)
    return {name: p.choose("auto", device) for name, p in sorted(_primitives.items())}


class _NoSecond(torch.autograd.Function):
    """A gradient whose own gradient is an error."""

    @staticmethod
    def forward(ctx: Any, grad: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise RuntimeError("this primitive has no second derivative; use impl='reference'")


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a primitive's backward: outside autocast, and not differentiable a second time.

    torch's once_differentiable lets a second derivative through, as zero, when the incoming
    gradient is a constant; here every one raises RuntimeError.
    """

    @wraps(backward)
    def guarded(ctx: Any, *grads: torch.Tensor) -> Any:
        device = grads[0].device
        with torch.no_grad(), full_precision(device):
            out = backward(ctx, *grads)
        if not torch.is_grad_enabled():  # create_graph=False, the usual case
            return out
        anchor = torch.zeros((), device=device, requires_grad=True)
        several = out if isinstance(out, tuple) else (out,)
        return tuple(None if g is None else _NoSecond.apply(g, anchor) for g in several)

    return guarded


def finished(x: torch.Tensor) -> torch.Tensor:
    """x, to be returned from a forward that wrote it in place.

    Compiled by torch 2.11, such an output has gradient zero, silently; a copy has the right one,
    and the compiler takes the copy out again.
    """
    return x.clone() if torch.compiler.is_compiling() else x


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums and results have: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def require_float(**tensors: torch.Tensor) -> None:
    """Raise ValueError, naming the argument, for a tensor that is not of a floating dtype."""
    for name, x in tensors.items():
        if not x.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {x.dtype}")


def for_dtype(impl: str, x: torch.Tensor) -> str:
    """What `impl` says, but that auto is torch for float64, which no kernel is made for."""
    return "torch" if impl == "auto" and x.dtype == torch.float64 else impl


def check_fused_input(name: str, x: torch.Tensor, interpreted: bool) -> None:
    """Raise ValueError for a tensor that impl="triton" does not take.

    interpreted: kernels run anywhere.
    """
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        got = f"{name} in {x.dtype}"
        raise ValueError(f"impl='triton' is for float32, bfloat16 and float16, got {got}")
    if x.device.type != "cuda" and not interpreted:
        raise ValueError(
            f"impl='triton' needs CUDA tensors, got {name} on {x.device}; "
            "TRITON_INTERPRET=1 set before the import runs it there, slowly"
        )


def may_look(x: torch.Tensor) -> bool:
    """Whether a check may read values of x: on a device it would wait, and a traced x has none."""
    return type(x) is torch.Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling()
