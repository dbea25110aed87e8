"""What the autograd.Functions of primitives and losses share: precision, first order alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch

from .operators import seen_through

Run = Callable[
    [Sequence[torch.Tensor], Sequence[bool]], tuple[torch.Tensor, Sequence[torch.Tensor]]
]

# Asked once, here: torch 2.11's compiler cannot look inside, and torch.compiler's decorator for
# that imports all of torch._dynamo, which costs more than torch itself.
_DEVICES = ("cpu", "cuda", "hpu", "maia", "mps", "mtia", "privateuseone", "xla", "xpu")
_HAVE_AUTOCAST = frozenset(d for d in _DEVICES if torch.amp.is_autocast_available(d))

_WHOSE = "a fused primitive or loss"
_FORMULA = "take impl='reference' of the primitive, or the *_reference that stands beside the loss"


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Outside autocast, where one is on; devices such as meta have none to leave."""
    if device.type in _HAVE_AUTOCAST and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _refuse_second(grad: torch.Tensor) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(f"{_WHOSE}, compiled, has no second derivative: {_FORMULA}")


def _watch(x: torch.Tensor) -> torch.Tensor:
    """x; where a graph runs as it was traced, its gradient is refused under create_graph=True.

    There the compiler turns gradients off within backward, which cannot see it for itself, and the
    derivative would lack a part without a word.  One that lowers the graph has tensors of its own.
    """
    if type(x) is torch.Tensor and x.requires_grad and not torch._C._len_torch_dispatch_stack():
        x.register_hook(_refuse_second)
    return x


_watched = seen_through("first_order", _watch)


def refuse_torch_func(whose: str = _WHOSE, instead: str = _FORMULA) -> None:
    """Raise RuntimeError, with what to do instead, inside a transform of torch.func."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(f"torch.func cannot transform {whose}: {instead}")


class FirstOrder(torch.autograd.Function):
    """The Function of a primitive or a loss: for torch.autograd and torch.compile.

    `call` is `apply` with what torch says badly or not at all: a transform of torch.func would want
    what backward needs as outputs of forward, and a rule for batches; torch says so in words that
    help no user of a loss.  A compiler takes `apply` as it is, whatever a subclass makes of it.
    """

    whose, instead = _WHOSE, _FORMULA  # which function it is, and what to take in its place

    @classmethod
    def call(cls, *arguments: Any) -> Any:
        """What forward gives for the arguments, with its gradient."""
        if not torch.compiler.is_compiling():
            refuse_torch_func(cls.whose, cls.instead)
            return cls.apply(*arguments)
        made: Any = cls.apply(*arguments)
        return tuple(map(_watched, made)) if isinstance(made, tuple) else _watched(made)


def first_order(
    backward: Callable[..., Any], whose: str = _WHOSE, instead: str = _FORMULA
) -> Callable[..., Any]:
    """Mark a primitive's backward: outside autocast, and not differentiable a second time.

    create_graph=True raises RuntimeError at once.  torch's once_differentiable would raise in the
    second backward, and not even there if that goes to some inputs alone, as torch.autograd.grad
    does: the derivative would lack a part without a word.
    """

    @wraps(backward)
    def guarded(ctx: Any, *grads: torch.Tensor) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # see `_watch`
            raise RuntimeError(f"{whose} has no second derivative: {instead}")
        with torch.no_grad(), full_precision(grads[0].device):
            return backward(ctx, *grads)

    return guarded


class _Ahead(torch.autograd.Function):
    """Backward multiplies the gradients where they lie; a second one makes them anew.

    The step of a small batch is short beside what `FirstOrder` and `first_order` do at every call:
    here they are asked where something is to be done.  torch casts what backward returns to the
    dtype of the input, and drops what no input asked for.
    """

    @staticmethod
    def forward(ctx: Any, run: Run, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*tensors)
        ctx.run, need = run, ctx.needs_input_grad[1:]
        if tensors[0].is_cpu and not torch.is_autocast_enabled("cpu"):
            value, ctx.made = run(tensors, need)
            return value
        with full_precision(tensors[0].device):
            value, ctx.made = run(tensors, need)
        return value

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        made, ctx.made = ctx.made, None
        if made is None or torch.is_grad_enabled():
            return _make_again(ctx, grad)
        if type(grad) is torch.Tensor and grad.is_cpu and float(grad) == 1:  # else looking waits
            return None, *made
        return _multiply(ctx, made, grad)


@first_order
def _make_again(ctx: Any, grad: torch.Tensor) -> Any:
    return _multiply(ctx, ctx.run(ctx.saved_tensors, ctx.needs_input_grad[1:])[1], grad)


def _multiply(ctx: Any, made: Sequence[torch.Tensor], grad: torch.Tensor) -> Any:
    need = ctx.needs_input_grad
    return None, *(g.mul_(grad) if n else None for g, n in zip(made, need[1:], strict=True))


def ahead(run: Run, *tensors: torch.Tensor) -> torch.Tensor:
    """A number of the tensors whose gradients are made with it, so that backward only multiplies.

    run: of the tensors, and of which gradients are needed, gives the number and those gradients,
    in any float dtype: something, whatever it is, in the place of one that is not needed.
    For plain tensors (`can_read_values`): torch.compile keeps no tensors outside of its graph, and
    torch.func has words of its own for such an operation.
    """
    return _Ahead.apply(run, *tensors)  # pyright: ignore[reportReturnType]


def finished(x: torch.Tensor) -> torch.Tensor:
    """The result of an autograd.Function's forward that wrote it in place: x, or a copy.

    torch.compile (seen in torch 2.11) silently gives such a result the gradient zero.  A copy has
    the right gradient, and the compiler removes the copy itself; outside of it x is returned.
    """
    return x.clone() if torch.compiler.is_compiling() else x


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums and results have: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32
