"""A limit of the gradient's norm, above which DeepSpeed refuses a step as one that overflowed."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch

from .config import EngineError


@contextlib.contextmanager
def norm_limited(ds: Any, limit: float) -> Iterator[list[float]]:
    """Within: DeepSpeed's step is not applied where the norm of its gradients is above `limit`.

    What it yields receives the norm, of the averaged gradients before they are clipped.  Every
    optimizer of DeepSpeed's asks `is_invalid_grad_norm` of it, whose answer the host waits for
    anyway; torch's own, at stage 0 in float32, is not DeepSpeed's, and asks nobody.
    """
    places = [sys.modules[own.__module__] for own in type(ds.optimizer).__mro__]
    module = next((place for place in places if hasattr(place, "is_invalid_grad_norm")), None)
    norms: list[float] = []
    if module is None and isinstance(ds.optimizer, torch.optim.Optimizer):
        yield norms
        return
    if module is None:
        name = type(ds.optimizer).__name__
        raise EngineError(f"engine.spike: DeepSpeed's {name} does not tell the gradient's norm")
    ask = module.is_invalid_grad_norm

    def invalid(norm: Any) -> bool:
        if ask(norm):
            return True
        norms.append(float(norm))
        return norms[-1] > limit

    module.is_invalid_grad_norm = invalid  # type: ignore[attr-defined]
    try:
        yield norms
    finally:
        module.is_invalid_grad_norm = ask  # type: ignore[attr-defined]
