"""Matrix products with float32 sums of inputs in any dtype."""

import torch
from torch import Tensor

from .autograd import accumulator
from .gpu import on_gpu

# Before 2.10 torch.addmm had to be given a total in the inputs' 16 bits.
_ADDS_WIDER = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10)


def allows_tf32() -> bool:
    """Whether torch may round the float32 inputs of a CUDA product to TF32's 10 bits.

    By torch.set_float32_matmul_precision, or by the newer torch.backends.cuda.matmul.fp32_precision
    and what that inherits; torch.get_float32_matmul_precision raises where the newer one was set.

    >>> allows_tf32()
    False
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32 (float64 of float64).  CUDA multiplies 16-bit inputs as they are."""
    acc = accumulator(a.dtype)
    if on_gpu(a.device) and a.dtype != acc:
        return torch.mm(a, b, out_dtype=acc)
    return a.to(acc) @ b.to(acc)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a b to `total`, whose dtype is that of sums, in one pass over it."""
    if not on_gpu(a.device) or a.dtype == total.dtype:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
    elif _ADDS_WIDER:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += product(a, b)


def weighted(x: Tensor, weights: Tensor) -> Tensor:
    """x weights, of weights in the dtype of sums.

    Where CUDA multiplies 16-bit x as it is, the weights are rounded to them, in units of the
    largest.
    """
    if x.dtype == weights.dtype or not on_gpu(x.device):
        return x.to(weights.dtype) @ weights
    largest = weights.abs().amax().clamp_min(torch.finfo(weights.dtype).tiny)
    return product(x, (weights / largest).to(x.dtype)) * largest
