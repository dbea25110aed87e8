"""Matrix products with float32 sums of inputs in any dtype."""

import torch
from torch import Tensor

from .autograd import accumulator


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32 (float64 of float64).  CUDA multiplies 16-bit inputs as they are."""
    acc = accumulator(a.dtype)
    if a.device.type == "cuda" and a.dtype != acc:
        return torch.mm(a, b, out_dtype=acc)
    return a.to(acc) @ b.to(acc)


def weighted(x: Tensor, weights: Tensor) -> Tensor:
    """x weights, of weights in the dtype of sums.

    Where CUDA multiplies 16-bit x as it is, the weights are rounded to them, in units of the
    largest.
    """
    if x.dtype == weights.dtype or x.device.type != "cuda":
        return x.to(weights.dtype) @ weights
    largest = weights.abs().amax().clamp_min(torch.finfo(weights.dtype).tiny)
    return product(x, (weights / largest).to(x.dtype)) * largest
