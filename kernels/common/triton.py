"""What all Triton kernels share."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gpu import gpu_of, on_gpu


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in float32; "widened" is the interpreter's, see `precision`."""
    if PRECISION == "widened":
        acc += tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


INTERPRETED = not isinstance(dot, triton.JITFunction)


def precision(exact: str) -> str:
    """What `dot` is told; the interpreter multiplies in float64.

    NumPy has no bfloat16, and rounds x y^T and y x^T differently, which a GPU does not.
    """
    return "widened" if INTERPRETED else exact


def rows_contiguous(x: Tensor) -> Tensor:
    """x, whose rows' elements lie side by side; a copy where they did not."""
    return x if x.stride(1) == 1 else x.contiguous()


def sm_count(device: torch.device) -> int:
    """How many multiprocessors the device has."""
    return gpu_of(device).processors if on_gpu(device) else 1
