"""Column statistics and standardized rows in Triton, by the functions that moments_torch has.

    z (N, D)    mean_d = shift_d + rest_d    m2_d = sum_n (z_nd - mean_d)^2
    out = (z - mean) * inv_std    inv_std = 1 / sqrt(m2 / divisor + eps), 0 where that is 1 / 0
    dz = inv_std * (g - sum g / N - out * sum(g out) / divisor)

A program has a block of columns and a share of the rows, and one or both of two phases: to measure
(or sum, backward) and to apply.

held     all rows of the block fit in registers: one read, one write
whole    both phases in one program; it goes back over its rows from the last to the first, so that
         those it has seen last, still in L2, come first
split    the columns alone would not fill the GPU, or other ranks have rows too: the phases are two
         launches, both split over rows; `join` puts the shares' statistics together

Each place of a row block runs its own Welford mean of differences from its first row; they are
joined once, at the end, so that nothing is exchanged within the loop.  Joining starts from a row as
it stands, which makes a constant column's m2 an exact 0, and the mean is kept as two floats, the
nearest one and what that leaves: at a mean of 1e6 one alone has an error of 0.03.
Traffic: forward z and out once each from HBM, backward g, out and dz.  Memory-bound.  No atomics:
the same bits each run.  In place: nothing.
In the kernels capitals are pointers.
Source: Welford 1962, "Note on a method for calculating corrected sums of squares and products";
Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance".
"""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import kernel_by_part, launcher
from ..common.triton import rows_contiguous, sm_count
from ..common.tuning import Config, Kernel, config_for
from . import moments_configs as configs


@triton.jit
def _at(start, lane, row, d):
    """Offsets of rows from `start` on, `row` elements apart; int64, as they pass 2**31."""
    return (start + lane).to(tl.int64)[:, None] * row + d[None, :]


@triton.jit
def _rows(X, start, lane, stop, d, D, row, POLICY: tl.constexpr):
    """A block of rows in float32, 0 outside."""
    ok = (start + lane < stop)[:, None] & (d < D)[None, :]
    return tl.load(X + _at(start, lane, row, d), ok, 0.0, eviction_policy=POLICY).to(tl.float32)


@triton.jit
def _keep(X, x, start, lane, stop, d, D):
    """Write a block of rows."""
    ok = (start + lane < stop)[:, None] & (d < D)[None, :]
    tl.store(X + _at(start, lane, D, d), x.to(X.dtype.element_ty), ok)


@triton.jit
def _inverse(var, eps):
    """1 / sqrt(var + eps), and 0 where that is 1 / 0."""
    total = var + eps
    return tl.where(total == 0, 0.0, tl.div_rn(1.0, tl.sqrt_rn(tl.where(total == 0, 1.0, total))))


@triton.jit
def _about(s, mean, seen, shift):
    """How far means s + mean, of `seen` rows each, are from `shift`."""
    return tl.where(seen > 0, s - shift + mean, 0.0)


@triton.jit
def _measure(
    Z, first, stop, d, D, z_row,
    HELD: tl.constexpr, POLICY: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The rows minus shift, if they are HELD; shift, rest and m2 of all, each (1, BLOCK_D)."""
    lane = tl.arange(0, BLOCK_N)
    s = _rows(Z, first, lane, stop, d, D, z_row, POLICY)
    mean, m2 = tl.zeros_like(s), tl.zeros_like(s)
    if not HELD:
        k = 1.0
        for start in tl.range(first + BLOCK_N, stop, BLOCK_N, num_stages=STAGES):
            k += 1.0
            x = _rows(Z, start, lane, stop, d, D, z_row, POLICY)
            delta = tl.where((start + lane < stop)[:, None], x - s - mean, 0.0)
            mean += delta * (1.0 / k)
            m2 += delta * delta * (1.0 - 1.0 / k)
    seen = ((stop - first - lane + BLOCK_N - 1) // BLOCK_N).to(tl.float32)[:, None]
    n = (stop - first).to(tl.float32)
    base = tl.load(Z + first.to(tl.int64) * z_row + d, d < D, 0.0).to(tl.float32)[None, :]
    shift = base + tl.sum(_about(s, mean, seen, base) * seen, 0)[None, :] / n
    far = _about(s, mean, seen, shift)
    rest = tl.sum(far * seen, 0)[None, :] / n
    m2 = tl.sum(m2 + far * far * seen, 0)[None, :] - n * rest * rest
    return far, shift, rest, tl.where(m2 < 0, 0.0, m2)


@triton.jit
def _forward(
    Z, OUT, PARTS, SHIFT, REST, SCALE, OFFSET, N, D, z_row, share, eps, divisor,
    MEASURE: tl.constexpr, APPLY: tl.constexpr, HELD: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    lane, d = tl.arange(0, BLOCK_N), tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.program_id(1) * share
    stop, here = tl.minimum(first + share, N), (d < D)[None, :]
    at = d[None, :]
    if MEASURE:
        policy: tl.constexpr = "evict_last" if APPLY and not HELD else ""
        far, shift, rest, m2 = _measure(
            Z, first, stop, d, D, z_row, HELD, policy, BLOCK_N, STAGES
        )  # fmt: skip
        if APPLY:
            scale = _inverse(m2 / divisor, eps)
            tl.store(SCALE + at, scale, here)
        else:
            PARTS += tl.program_id(1).to(tl.int64) * 3 * D
            tl.store(PARTS + at, shift, here)
            tl.store(PARTS + D + at, rest, here)
            tl.store(PARTS + 2 * D + at, m2, here)
    else:
        shift, rest = tl.load(SHIFT + at, here, 0.0), tl.load(REST + at, here, 0.0)
        scale = tl.load(SCALE + at, here, 0.0)
    if APPLY:
        if OFFSET is not None:
            offset = tl.load(OFFSET + at, here, 0.0)
        if HELD:
            _keep(OUT, (far - rest) * scale, first, lane, stop, d, D)
        else:
            last = first + (stop - first - 1) // BLOCK_N * BLOCK_N
            for back in tl.range(0, stop - first, BLOCK_N, num_stages=STAGES):
                x = _rows(Z, last - back, lane, stop, d, D, z_row, "evict_first")
                x = (x - shift - rest) * scale
                if OFFSET is not None:
                    x += offset
                _keep(OUT, x, last - back, lane, stop, d, D)


@triton.jit
def _join_kernel(
    PARTS, OUT, P, D, share, N, eps, divisor,
    ROOT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """PARTS (P, 3, D), the last of a share or fewer rows -> OUT (3, D); ROOT: inv_std for m2."""
    lane = tl.arange(0, BLOCK_P)
    at = (tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    n, here = tl.cast(N, tl.float32), at < D
    base = tl.load(PARTS + at, here, 0.0)
    mean = tl.zeros_like(base)
    for start in range(0, P, BLOCK_P):
        i = (start + lane)[:, None]
        seen = tl.where(i < P, tl.minimum(share, N - i * share), 0).to(tl.float32)
        part, ok = PARTS + i.to(tl.int64) * 3 * D + at, (i < P) & here
        far = _about(tl.load(part, ok, 0.0), tl.load(part + D, ok, 0.0), seen, base)
        mean += tl.sum(far * seen, 0)[None, :]
    shift = base + mean / n
    rest, m2 = tl.zeros_like(base), tl.zeros_like(base)
    for start in range(0, P, BLOCK_P):
        i = (start + lane)[:, None]
        seen = tl.where(i < P, tl.minimum(share, N - i * share), 0).to(tl.float32)
        part, ok = PARTS + i.to(tl.int64) * 3 * D + at, (i < P) & here
        far = _about(tl.load(part, ok, 0.0), tl.load(part + D, ok, 0.0), seen, shift)
        rest += tl.sum(far * seen, 0)[None, :]
        m2 += tl.sum(tl.load(part + 2 * D, ok, 0.0) + far * far * seen, 0)[None, :]
    rest /= n
    m2 -= n * rest * rest
    m2 = tl.where(m2 < 0, 0.0, m2)
    tl.store(OUT + at, shift, here)
    tl.store(OUT + D + at, rest, here)
    tl.store(OUT + 2 * D + at, _inverse(m2 / divisor, eps) if ROOT else m2, here)


@triton.jit
def _backward(
    G, OUT, DZ, SUMS, INV_STD, G_MEAN, G_OUT, N, D, g_row, out_row, share, divisor,
    MEASURE: tl.constexpr, APPLY: tl.constexpr, HELD: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    lane, d = tl.arange(0, BLOCK_N), tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.program_id(1) * share
    stop, here = tl.minimum(first + share, N), (d < D)[None, :]
    at = d[None, :]
    if MEASURE:
        policy: tl.constexpr = "evict_last" if APPLY and not HELD else ""
        g = _rows(G, first, lane, stop, d, D, g_row, policy)
        out = _rows(OUT, first, lane, stop, d, D, out_row, policy)
        total, dot = g, g * out
        if not HELD:
            for start in tl.range(first + BLOCK_N, stop, BLOCK_N, num_stages=STAGES):
                more = _rows(G, start, lane, stop, d, D, g_row, policy)
                total += more
                dot += more * _rows(OUT, start, lane, stop, d, D, out_row, policy)
        g_mean, g_out = tl.sum(total, 0)[None, :], tl.sum(dot, 0)[None, :]
        if APPLY:
            g_mean, g_out = g_mean / (stop - first).to(tl.float32), g_out / divisor
        else:
            SUMS += tl.program_id(1).to(tl.int64) * 2 * D
            tl.store(SUMS + at, g_mean, here)
            tl.store(SUMS + D + at, g_out, here)
    else:
        g_mean, g_out = tl.load(G_MEAN + at, here, 0.0), tl.load(G_OUT + at, here, 0.0)
    if APPLY:
        inv_std = tl.load(INV_STD + at, here, 0.0)
        if HELD:
            _keep(DZ, (g - g_mean - out * g_out) * inv_std, first, lane, stop, d, D)
        else:
            last = first + (stop - first - 1) // BLOCK_N * BLOCK_N
            for back in tl.range(0, stop - first, BLOCK_N, num_stages=STAGES):
                g = _rows(G, last - back, lane, stop, d, D, g_row, "evict_first")
                out = _rows(OUT, last - back, lane, stop, d, D, out_row, "evict_first")
                dz = (g - g_mean - out * g_out) * inv_std
                _keep(DZ, dz, last - back, lane, stop, d, D)


FEW_ROWS = 256  # not worth a split


def _splits(kernel: Kernel, x: Tensor) -> bool:
    """Whether a launch for each phase, over rows too, fills the device where one would not.

    A third of the multiprocessors draw nearly all that the memory gives.
    """
    N, D = x.shape
    config = config_for(kernel, configs.shape_class(kernel.variants, x, "whole"), x.device)
    blocks = triton.cdiv(D, config.blocks["BLOCK_D"])
    return N > FEW_ROWS and 3 * blocks < sm_count(x.device)


class _Launch:
    """How x (N, D) is launched: by blocks of columns, and shares of rows unless it does it all."""

    def __init__(self, kernel: Kernel, x: Tensor, part: str) -> None:
        name, (N, D) = configs.shape_class(kernel.variants, x, part), x.shape
        constants = kernel.variants[name].constexprs
        self.config = config_for(kernel, name, x.device)
        step, both = self.config.blocks["BLOCK_N"], part == "whole"
        self.phases = {"MEASURE": constants["MEASURE"], "APPLY": constants["APPLY"]}
        self.phases["HELD"] = both and step >= N
        columns = triton.cdiv(D, self.config.blocks["BLOCK_D"])
        most = 1 if both else max(1, 4 * sm_count(x.device) // columns)
        self.share = triton.cdiv(triton.cdiv(N, most), step) * step
        self.shares = triton.cdiv(N, self.share)
        self.grid = columns, self.shares


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
        _join_kernel[(triton.cdiv(D, config.blocks["BLOCK_D"]),)](
            parts, out, P, D, share, N, eps, divisor, ROOT=root is not None, **config.arguments
        )
    return out


def _measure_shares(z: Tensor) -> tuple[Tensor, int]:
    """Each share's shift, rest and m2 (P, 3, D), and how many rows are a share."""
    launch = _Launch(FORWARD, z, "measure")
    parts = _floats(z, launch.shares, 3, z.shape[1])
    with torch.cuda.device_of(z):
        _forward[launch.grid](
            z, None, parts, None, None, None, None, *z.shape, z.stride(0), launch.share, 0.0, 1.0,
            **launch.phases, **launch.config.arguments,
        )  # fmt: skip
    return parts, launch.share


def moments(z: Tensor) -> Tensor:
    """(3, D) of this rank's rows: shift and rest, together the mean, and sum_n (z - mean)^2."""
    z = rows_contiguous(z)
    parts, share = _measure_shares(z)
    return parts[0] if len(parts) == 1 else _join(parts, share, len(z))


def join(parts: Tensor, rows: int) -> Tensor:
    """`moments` (3, D) of all ranks together, from those of each, (W, 3, D), of `rows` rows."""
    return _join(parts.contiguous(), rows, rows * len(parts))


def standardize(z: Tensor, eps: float, unbiased: bool) -> tuple[Tensor, Tensor]:
    """One process: (z - mean) / sqrt(var + eps), in z's dtype, and 1 / sqrt(var + eps)."""
    z, divisor = rows_contiguous(z), float(len(z) - int(unbiased))
    if _splits(FORWARD, z):
        shift, rest, inv_std = _join(*_measure_shares(z), len(z), (eps, divisor))
        return _apply(z, shift, rest, inv_std, None), inv_std.clone()
    out, inv_std = _like(z), _floats(z, z.shape[1])
    launch = _Launch(FORWARD, z, "whole")
    with torch.cuda.device_of(z):
        _forward[launch.grid](
            z, out, None, None, None, inv_std, None, *z.shape, z.stride(0), launch.share, eps,
            divisor, **launch.phases, **launch.config.arguments,
        )  # fmt: skip
    return out, inv_std


def apply(
    z: Tensor, shift: Tensor, rest: Tensor, scale: Tensor, offset: Tensor | None = None
) -> Tensor:
    """(z - shift - rest) * scale + offset in z's dtype."""
    return _apply(rows_contiguous(z), shift, rest, scale, offset)


def _apply(z: Tensor, shift: Tensor, rest: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    out, launch = _like(z), _Launch(FORWARD, z, "apply" if offset is None else "affine")
    shift, rest, scale = (x.contiguous() for x in (shift, rest, scale))
    offset = None if offset is None else offset.contiguous()
    with torch.cuda.device_of(z):
        _forward[launch.grid](
            z, out, None, shift, rest, scale, offset, *z.shape, z.stride(0), launch.share, 0.0, 1.0,
            **launch.phases, **launch.config.arguments,
        )  # fmt: skip
    return out


def _sum(grad: Tensor, out: Tensor) -> Tensor:
    if not out.numel():
        return out.new_zeros(2, out.shape[1], dtype=torch.float32)
    launch = _Launch(BACKWARD, out, "sums")
    parts = _floats(out, launch.shares, 2, out.shape[1])
    with torch.cuda.device_of(out):
        _backward[launch.grid](
            grad, out, None, parts, None, None, None, *out.shape, grad.stride(0), out.stride(0),
            launch.share, 1.0, **launch.phases, **launch.config.arguments,
        )  # fmt: skip
    return parts.sum(0)


def sums(grad: Tensor, out: Tensor) -> Tensor:
    """(2, D): the columns' sums of grad and of grad * out."""
    return _sum(rows_contiguous(grad), rows_contiguous(out))


def column_dot(a: Tensor, b: Tensor) -> Tensor:
    """sum_n a_nd b_nd: (D,)."""
    return sums(a, b)[1]


def gradient(grad: Tensor, out: Tensor, inv_std: Tensor, g_mean: Tensor, g_out: Tensor) -> Tensor:
    """inv_std * (grad - g_mean - out * g_out): the gradient of `standardized`, in out's dtype."""
    grad, out = rows_contiguous(grad), rows_contiguous(out)
    return _gradient(grad, out, inv_std, g_mean, g_out)


def _gradient(grad: Tensor, out: Tensor, inv_std: Tensor, g_mean: Tensor, g_out: Tensor) -> Tensor:
    dz, launch = _like(out), _Launch(BACKWARD, out, "apply")
    inv_std, g_mean, g_out = (x.contiguous() for x in (inv_std, g_mean, g_out))
    with torch.cuda.device_of(out):
        _backward[launch.grid](
            grad, out, dz, None, inv_std, g_mean, g_out, *out.shape, grad.stride(0), out.stride(0),
            launch.share, 1.0, **launch.phases, **launch.config.arguments,
        )  # fmt: skip
    return dz


def gradient_whole(grad: Tensor, out: Tensor, inv_std: Tensor, divisor: int) -> Tensor:
    """`gradient` in one process; divisor: that of the variance."""
    grad, out = rows_contiguous(grad), rows_contiguous(out)
    if _splits(BACKWARD, out):
        g_sum, g_out = _sum(grad, out)
        return _gradient(grad, out, inv_std, g_sum / len(out), g_out / divisor)
    dz, launch = _like(out), _Launch(BACKWARD, out, "whole")
    with torch.cuda.device_of(out):
        _backward[launch.grid](
            grad, out, dz, None, inv_std.contiguous(), None, None, *out.shape, grad.stride(0),
            out.stride(0), launch.share, float(divisor), **launch.phases, **launch.config.arguments,
        )  # fmt: skip
    return dz


def _try_forward(dtype: str, part: str, config: Config, device: torch.device) -> Any:
    (z,) = configs.trial_rows(dtype, part, device)
    column, run = torch.ones(z.shape[1], device=device), partial(launcher, FORWARD.name, config)
    if part == "measure":
        return run(lambda: [(x := moments(z))[0] + x[1], x[2]])
    if part in configs.PHASES:
        return run(apply, z, column, column, column, column if part == "affine" else None)
    return run(standardize, z, 1e-5, False)


def _try_backward(dtype: str, part: str, config: Config, device: torch.device) -> Any:
    grad, out = configs.trial_rows(dtype, part, device, 2)
    column, run = torch.ones(out.shape[1], device=device), partial(launcher, BACKWARD.name, config)
    if part == "sums":
        return run(sums, grad, out)
    if part == "apply":
        return run(gradient, grad, out, column, column, column)
    return run(gradient_whole, grad, out, column, 10 * len(out))


def _try_join(dtype: str, part: str, config: Config, device: torch.device) -> Any:
    generator = torch.Generator(device).manual_seed(0)
    parts = torch.rand(16, 3, configs.TRIAL[1], generator=generator, device=device)

    def run() -> tuple[Tensor, Tensor]:
        shift, rest, inv_std = _join(parts, 64, 1000, (1e-5, 1000.0))
        return shift + rest, inv_std

    return launcher(JOIN.name, config, run)


FORWARD, BACKWARD = (
    kernel_by_part(f"standardize_{name}", fn, configs.TYPES, parts, trial, halved="BLOCK_D")
    for name, fn, parts, trial in (
        ("forward", _forward, configs.parts(configs.FORWARD), _try_forward),
        ("backward", _backward, configs.parts(configs.BACKWARD), _try_backward),
    )
)
JOIN = kernel_by_part(
    "standardize_join", _join_kernel, configs.TYPES, {"": configs.JOIN}, _try_join, ["join"]
)
