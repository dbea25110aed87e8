"""The yardstick for kernels and losses: no worse than eager, judged in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def as_accurate_as_eager(
    actual: Tensor, eager: Tensor, truth: Tensor, slack: float = 2.0, ulps: float = 4.0
) -> None:
    """Fail unless max|actual - truth| <= slack * max|eager - truth| + ulps eps max|truth|."""
    assert actual.shape == truth.shape and actual.dtype == eager.dtype
    assert torch.isfinite(actual).all(), f"{(~torch.isfinite(actual)).sum()} non-finite values"
    if actual.numel() == 0:
        return
    err, par = ((t.double() - truth).abs().max().item() for t in (actual, eager))
    floor = ulps * torch.finfo(actual.dtype).eps * truth.abs().max().item()
    assert err <= slack * par + floor, f"ours {err:.3e}, eager {par:.3e}, floor {floor:.3e}"


class _Upstream(torch.autograd.Function):
    """The identity, whose backward hands on the incoming gradient in the layout it is told."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.layout = layout
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.layout(grad), None


def _weighted(x: Tensor) -> Tensor:
    """A sum with a weight for each element, no two alike: their gradient is contiguous."""
    ramp = torch.arange(1, x.numel() + 1, device=x.device, dtype=torch.float64)
    return (x * (0.7 * ramp).sin().reshape(x.shape).to(x.dtype)).sum()


def _gaps(grad: Tensor) -> Tensor:
    """The same values, in a tensor whose neighbors in memory are nan."""
    return torch.stack([grad, torch.full_like(grad, torch.nan)], dim=-1)[..., 0]


UPSTREAM: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": _weighted,
    "expanded": lambda x: x.sum(),
    "sliced": lambda x: _weighted(_Upstream.apply(x, _gaps)),  # pyright: ignore[reportArgumentType]
}


def grads(
    fn: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    reduce: Callable[[Tensor], Tensor] = UPSTREAM["contiguous"],
) -> list[Tensor]:
    """[fn(*inputs), then the gradient of its reduction to each floating-point input]."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    out = fn(*leaves)
    wanted = [x for x in leaves if x.requires_grad]
    return [out.detach(), *torch.autograd.grad(reduce(out), wanted)]


def assert_no_worse(
    ours: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    reduce: Callable[[Tensor], Tensor] = UPSTREAM["contiguous"],
    slack: float = 2.0,
) -> None:
    """Value and every gradient of `ours` against `eager`, both judged by eager in float64.

    The gradient of a single number may be sixteen times eager's error, and err by 16 eps: it is a
    sum of many terms that cancel, in which eager is often lucky.
    """
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    truth = grads(eager, wide, reduce)
    mine = grads(ours, inputs, reduce)
    par = grads(lambda *a: eager(*a).to(mine[0].dtype), inputs, reduce)
    for i, (a, e, t) in enumerate(zip(mine, par, truth, strict=True)):
        alone = i > 0 and t.ndim == 0
        as_accurate_as_eager(a, e, t, max(slack, 16.0) if alone else slack, 16.0 if alone else 4.0)


class _Largest(TorchDispatchMode):
    """Notes the most elements any tensor made under it has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:  # a view, however large, holds nothing
            tensors = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
            sizes = [t.untyped_storage().nbytes() // t.element_size() for t in tensors]
            self.elements = max([self.elements, *sizes])
        return out


def largest_tensor(fn: Callable[[], Any]) -> int:
    """The elements of the largest tensor that fn's operations make, forward and backward."""
    with _Largest() as seen:
        fn()
    return seen.elements


def saved_elements(fn: Callable[[], Tensor]) -> int:
    """The elements that fn's graph keeps for backward, shared storage counted once."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = fn()
    del out
    return sum(kept.values())
