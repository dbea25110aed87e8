"""The Triton kernels of column statistics as operators of torch: what `moments.py` builds on.

They are the functions of `moments_torch`, by the same names; torch.compile keeps each whole in its
graph.  They know no gradient: `moments.py` has it.  Rows are (N, D) in float32, bfloat16 or
float16, in any layout; what is said of columns is (D,) in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from ..common.tuning import Config, Kernel, config_for, forced, register
from ..pairwise.scores_triton import rows_contiguous
from . import moments_configs as configs
from . import moments_triton as fused

FEW_ROWS = 256  # not worth a split

operator = torch.library.custom_op


def processors(device: torch.device) -> int:
    """How many multiprocessors the device has."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _splits(kernel: Kernel, x: Tensor) -> bool:
    """Whether a launch for each phase, over rows too, fills the device where one would not.

    A third of the multiprocessors draw nearly all that the memory gives.
    """
    N, D = x.shape
    config = config_for(kernel, configs.shape_class(kernel.variants, x, "whole"), x.device)
    blocks = triton.cdiv(D, config.blocks["BLOCK_D"])
    return N > FEW_ROWS and 3 * blocks < processors(x.device)


class _Launch:
    """A launch over x (N, D), by blocks of columns, and shares of rows unless it does it all."""

    def __init__(self, kernel: Kernel, x: Tensor, part: str) -> None:
        name = configs.shape_class(kernel.variants, x, part)
        self.fn, self.x, (N, D) = kernel.fn, x, x.shape
        self.constants = dict(kernel.variants[name].constexprs)
        config = config_for(kernel, name, x.device)
        self.options = {**config.blocks, **config.options}
        step, both = config.blocks["BLOCK_N"], part == "whole"
        self.constants["HELD"] = both and step >= N
        self.columns = triton.cdiv(D, config.blocks["BLOCK_D"])
        most = 1 if both else max(1, 4 * processors(x.device) // self.columns)
        self.share = triton.cdiv(triton.cdiv(N, most), step) * step
        self.shares = triton.cdiv(N, self.share)

    def __call__(self, **given: Any) -> None:
        (N, D), share = self.x.shape, self.share
        with torch.cuda.device_of(self.x):
            launch: Any = self.fn[self.columns, self.shares]
            launch(N=N, D=D, share=share, **{**self.constants, **given}, **self.options)


def _floats(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _join(parts: Tensor, share: int, N: int, root: tuple[float, float] | None = None) -> Tensor:
    """(3, D) of parts (P, 3, D), each of `share` rows but the last; N rows in all.

    root: eps and divisor, for inv_std in m2's place.
    """
    P, _, D = parts.shape
    out, config = _floats(parts, 3, D), config_for(JOIN, "join", parts.device)
    eps, divisor = root or (0.0, 1.0)
    with torch.cuda.device_of(parts):
        launch: Any = fused.join[(triton.cdiv(D, config.blocks["BLOCK_D"]),)]
        launch(
            parts, out, P, D, share, N, eps, divisor, ROOT=root is not None,
            **config.blocks, **config.options,
        )  # fmt: skip
    return out


def _measured(z: Tensor) -> tuple[Tensor, int]:
    """Each share's shift, rest and m2 (P, 3, D), and how many rows are a share."""
    launch = _Launch(FORWARD, z, "measure")
    parts = _floats(z, launch.shares, 3, z.shape[1])
    launch(Z=z, PARTS=parts, z_row=z.stride(0), eps=0.0, divisor=1.0)
    return parts, launch.share


@operator("fastssl::moments", mutates_args=())
def moments(z: Tensor) -> Tensor:
    """(3, D) of this rank's rows: shift and rest, together the mean, and sum_n (z - mean)^2."""
    z = rows_contiguous(z)
    parts, share = _measured(z)
    return parts[0] if len(parts) == 1 else _join(parts, share, len(z))


@operator("fastssl::moments_joined", mutates_args=())
def joined(parts: Tensor, rows: int) -> Tensor:
    """`moments` (3, D) of all ranks together, from those of each, (W, 3, D), of `rows` rows."""
    return _join(parts.contiguous(), rows, rows * len(parts))


@operator("fastssl::standardised", mutates_args=())
def standardised(z: Tensor, eps: float, unbiased: bool) -> tuple[Tensor, Tensor]:
    """One process: (z - mean) / sqrt(var + eps), in z's dtype, and 1 / sqrt(var + eps)."""
    z, divisor = rows_contiguous(z), float(len(z) - int(unbiased))
    if _splits(FORWARD, z):
        shift, rest, inv_std = _join(*_measured(z), len(z), (eps, divisor))
        return _applied(z, shift, rest, inv_std, None), inv_std.clone()
    out, inv_std = _like(z), _floats(z, z.shape[1])
    launch = _Launch(FORWARD, z, "whole")
    launch(Z=z, OUT=out, SCALE=inv_std, z_row=z.stride(0), eps=eps, divisor=divisor)
    return out, inv_std


@operator("fastssl::moments_applied", mutates_args=())
def applied(
    z: Tensor, shift: Tensor, rest: Tensor, scale: Tensor, offset: Tensor | None = None
) -> Tensor:
    """(z - shift - rest) * scale + offset in z's dtype."""
    return _applied(rows_contiguous(z), shift, rest, scale, offset)


def _applied(
    z: Tensor, shift: Tensor, rest: Tensor, scale: Tensor, offset: Tensor | None
) -> Tensor:
    out, columns = _like(z), {"SHIFT": shift, "REST": rest, "SCALE": scale}
    columns |= {} if offset is None else {"OFFSET": offset}
    columns = {name: x.contiguous() for name, x in columns.items()}
    launch = _Launch(FORWARD, z, "apply" if offset is None else "affine")
    launch(Z=z, OUT=out, z_row=z.stride(0), eps=0.0, divisor=1.0, **columns)
    return out


def _summed(grad: Tensor, out: Tensor) -> Tensor:
    launch = _Launch(BACKWARD, out, "sums")
    parts = _floats(out, launch.shares, 2, out.shape[1])
    launch(
        G=grad, OUT=out, SUMS=parts, g_row=grad.stride(0), out_row=out.stride(0), divisor=1.0
    )  # fmt: skip
    return parts.sum(0)


@operator("fastssl::moments_sums", mutates_args=())
def sums(grad: Tensor, out: Tensor) -> Tensor:
    """(2, D): the columns' sums of grad and of grad * out."""
    return _summed(rows_contiguous(grad), rows_contiguous(out))


def column_dot(a: Tensor, b: Tensor) -> Tensor:
    """sum_n a_nd b_nd: (D,)."""
    return sums(a, b)[1]


@operator("fastssl::moments_gradient", mutates_args=())
def gradient(grad: Tensor, out: Tensor, inv_std: Tensor, g_mean: Tensor, g_out: Tensor) -> Tensor:
    """inv_std * (grad - g_mean - out * g_out): the gradient of `standardised`, in out's dtype."""
    grad, out = rows_contiguous(grad), rows_contiguous(out)
    return _gradient(grad, out, inv_std, g_mean, g_out)


def _gradient(grad: Tensor, out: Tensor, inv_std: Tensor, g_mean: Tensor, g_out: Tensor) -> Tensor:
    dz, columns = _like(out), {"INV_STD": inv_std, "G_MEAN": g_mean, "G_OUT": g_out}
    columns = {name: x.contiguous() for name, x in columns.items()}
    launch, strides = _Launch(BACKWARD, out, "apply"), (grad.stride(0), out.stride(0))
    launch(G=grad, OUT=out, DZ=dz, g_row=strides[0], out_row=strides[1], divisor=1.0, **columns)
    return dz


@operator("fastssl::moments_gradient_whole", mutates_args=())
def gradient_whole(grad: Tensor, out: Tensor, inv_std: Tensor, divisor: int) -> Tensor:
    """`gradient` in one process; divisor: that of the variance."""
    grad, out = rows_contiguous(grad), rows_contiguous(out)
    if _splits(BACKWARD, out):
        g_sum, g_out = _summed(grad, out)
        return _gradient(grad, out, inv_std, g_sum / len(out), g_out / divisor)
    dz, strides = _like(out), (grad.stride(0), out.stride(0))
    launch = _Launch(BACKWARD, out, "whole")
    launch(
        G=grad, OUT=out, DZ=dz, INV_STD=inv_std.contiguous(), g_row=strides[0], out_row=strides[1],
        divisor=float(divisor),
    )  # fmt: skip
    return dz


@moments.register_fake
def _(z):
    return z.new_empty(3, z.shape[1], dtype=torch.float32)


@joined.register_fake
def _(parts, rows):
    return parts.new_empty(parts.shape[1:])


@standardised.register_fake
def _(z, eps, unbiased):
    return z.new_empty(z.shape), z.new_empty(z.shape[1], dtype=torch.float32)


@applied.register_fake
def _(z, shift, rest, scale, offset=None):
    return z.new_empty(z.shape)


@sums.register_fake
def _(grad, out):
    return out.new_empty(2, out.shape[1], dtype=torch.float32)


@gradient.register_fake
def _(grad, out, inv_std, g_mean, g_out):
    return out.new_empty(out.shape)


@gradient_whole.register_fake
def _(grad, out, inv_std, divisor):
    return out.new_empty(out.shape)


Launch = Callable[[], Any]


def _try_forward(dtype: str, part: str, config: Config, device: torch.device) -> Launch:
    (z,) = configs.trial_rows(dtype, part, device)
    column = torch.ones(z.shape[1], device=device)

    def run() -> Any:
        with forced(FORWARD.name, config):
            if part == "measure":
                shift, rest, m2 = moments(z)
                return shift + rest, m2
            if part in configs.PHASES:
                return applied(z, column, column, column, column if part == "affine" else None)
            return standardised(z, 1e-5, False)

    return run


def _try_backward(dtype: str, part: str, config: Config, device: torch.device) -> Launch:
    grad, out = configs.trial_rows(dtype, part, device, 2)
    column = torch.ones(out.shape[1], device=device)

    def run() -> Any:
        with forced(BACKWARD.name, config):
            if part == "sums":
                return sums(grad, out)
            if part == "apply":
                return gradient(grad, out, column, column, column)
            return gradient_whole(grad, out, column, 10 * len(out))

    return run


def _try_join(config: Config, device: torch.device) -> Launch:
    generator = torch.Generator(device).manual_seed(0)
    parts = torch.rand(16, 3, configs.TRIAL[1], generator=generator, device=device)

    def run() -> Any:
        with forced(JOIN.name, config):
            shift, rest, inv_std = _join(parts, 64, 1000, (1e-5, 1000.0))
        return shift + rest, inv_std

    return run


def _registered(name: str, fn: Any, parts: Any, trial: Any) -> Kernel:
    return register(Kernel(f"standardise_{name}", fn, configs.variants(fn, parts, trial)))


FORWARD = _registered("forward", fused.forward, configs.FORWARD, _try_forward)
BACKWARD = _registered("backward", fused.backward, configs.BACKWARD, _try_backward)
JOIN = register(Kernel("standardise_join", fused.join, configs.join_variants(_try_join)))
