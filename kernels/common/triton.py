"""Triton where it is installed, and what all of its kernels share.

Kernels' files import `triton` and `tl` from here: where Triton is missing they can still be
imported, and no primitive declares an implementation that would run them.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None


class _Missing:
    """Stands for Triton: any attribute is itself, and a call gives back its argument."""

    @staticmethod
    def jit(fn: Any) -> Any:
        fn.arg_names = fn.__code__.co_varnames[: fn.__code__.co_argcount]
        return fn

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, x: Any = None, *args: Any) -> Any:
        return x


if TYPE_CHECKING:
    import triton
    import triton.language as tl
elif HAS_TRITON:
    import triton
    import triton.language as tl
else:
    triton = tl = _Missing()


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in float32; "widened" is the interpreter's, see `precision`."""
    if PRECISION == "widened":
        acc += tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


INTERPRETED = HAS_TRITON and not isinstance(dot, triton.JITFunction)


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
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
