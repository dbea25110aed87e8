"""Second moments of embeddings over the joined batch: what VICReg and its family share.

    c = (z - mu) / sqrt(N - 1)      mu: the mean over the N rows of all ranks         z (N, ..., D)
    covariance = c^T c              variances: its diagonal; one for each middle position

Why: every loss here is a function of c^T c alone, and c sums to zero over the batch, so its
gradient with respect to c does as well: 1^T (c M) = (1^T c) M = 0.  The gradient through the mean,
which would take that sum away, is then nothing, and centering costs no backward pass.  Variances
and covariances come from one product, of N x N or D x D, whichever is smaller.
Source: Bardes et al. 2022, VICReg, arXiv:2105.04906, equations 1 to 4, for the terms.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.distributed import Group, all_gather_nograd, all_reduce_sum, world_size
from fastssl.kernels import cross_correlation
from fastssl.kernels.common import FirstOrder, accumulator, finished, first_order, full_precision
from fastssl.kernels.common.gpu import on_gpu


class _Centered(FirstOrder):
    @staticmethod
    def forward(ctx: Any, z: Tensor, scale: float, group: Group) -> Tensor:
        ctx.scale, ctx.dtype = scale, z.dtype
        shift = z.mean(0, dtype=accumulator(z.dtype))
        rows = z - shift
        rest = rows.mean(0)  # what rounding left of the mean
        if world_size(group) > 1:  # joined by differences from rank 0's mean: nothing cancels
            shifts, rests = all_gather_nograd(torch.stack([shift, rest])[None], group).unbind(1)
            rest = (shifts - shifts[0] + rests).mean(0) - (shift - shifts[0])
        return finished(rows.sub_(rest).mul_(scale)).to(z.dtype)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return (grad * ctx.scale).to(ctx.dtype), None, None


def widen(z: Tensor) -> Tensor:
    """z in float32 where products of 16 bits are made in float32 anyway: everywhere but on CUDA."""
    return z if on_gpu(z.device) else z.to(accumulator(z.dtype))


def center(z: Tensor, scale: float, group: Group) -> Tensor:
    """scale * (z - mean of the joined batch's rows): z (N, ..., D), this rank's rows, `widen`ed.

    The gradient leaves out the mean: only for functions of c^T c, and of other products that sum
    to zero over the batch (see above).
    """
    with full_precision(z.device):
        return _Centered.call(widen(z), scale, group)  # pyright: ignore[reportReturnType]


def covariance_scale(z: Tensor, n: int) -> float:
    """What to multiply centered rows by, so that c^T c is a covariance of n rows.

    It keeps squared covariances of large embeddings finite.  float16 has no digits below 6e-5 to
    spare, and no range to overflow by: there it is 1, and what is asked of c^T c is divided later.
    """
    return 1.0 if z.dtype == torch.float16 else (n - 1) ** -0.5


class _ByPosition(FirstOrder):
    """(P, D) diagonals and (P,) squares off them, of c^T c at each of P positions of c (N, P, D).

    With k = c^T c off its diagonal d, of which |k|^2 is the second: dc = 4 c k, and 2 c for d.
    By Grams c k is g c - c d, g the N x N products of this rank's rows with all.
    """

    @staticmethod
    def forward(ctx: Any, c: Tensor, group: Group) -> tuple[Tensor, Tensor]:
        ctx.group, ctx.dtype, n = group, c.dtype, len(c) * world_size(group)
        mine = c.to(accumulator(c.dtype)).transpose(0, 1)
        ctx.gram = n < c.shape[-1]
        if ctx.gram:
            rows = all_gather_nograd(c, group, check=False).to(mine.dtype).transpose(0, 1)
            product = mine @ rows.mT
            diagonal = all_reduce_sum(mine.square().sum(1), group)
            total = all_reduce_sum(product.square().sum((1, 2)), group)
            off = total - diagonal.square().sum(1)
        else:
            rows, product = mine, all_reduce_sum(mine.mT @ mine, group)
            diagonal = product.diagonal(dim1=1, dim2=2).clone()
            product.diagonal(dim1=1, dim2=2).zero_()
            off = product.square().sum((1, 2))
        ctx.save_for_backward(mine, rows, product, diagonal)
        return finished(diagonal), off

    @staticmethod
    @first_order
    def backward(ctx: Any, g_diagonal: Tensor, g_off: Tensor) -> tuple[Tensor, None]:
        mine, rows, product, diagonal = ctx.saved_tensors
        sums = all_reduce_sum(torch.cat([g_diagonal, g_off[:, None]], 1), ctx.group)
        g_diagonal, g_off = 2 * sums[:, None, :-1], 4 * sums[:, None, -1:]
        if ctx.gram:
            dc = (product @ rows).mul_(g_off).add_(mine * (g_diagonal - g_off * diagonal[:, None]))
        else:
            dc = (mine @ product).mul_(g_off).add_(mine * g_diagonal)
        return dc.transpose(0, 1).to(ctx.dtype), None


def variance_covariance(z: Tensor, eps: float, group: Group) -> tuple[Tensor, Tensor]:
    """VICReg's two regularizers of z (N, ..., D), over the joined batch: scalars, float32.

    The mean over positions and features of max(0, 1 - sqrt(var + eps)), and the mean over positions
    of the sum of squared covariances of different features, divided by D.
    """
    n = len(z) * world_size(group)
    scale = covariance_scale(z, n)
    c = center(z, scale, group)
    if z.ndim == 2:
        diagonal, off = cross_correlation(c, c, process_group=group)
    else:
        with full_precision(z.device):
            diagonal, off = _ByPosition.call(c.flatten(1, -2), group)  # type: ignore[misc]
    unit = 1 / ((n - 1) * scale**2)  # 1, up to rounding, where c has been scaled
    hinge = F.relu(1 - (diagonal * unit + eps).sqrt()).mean()
    if z.shape[-1] == 1:  # no other feature: not the difference of two large sums, nor infinities
        return hinge, torch.zeros_like(hinge)
    return hinge, off.mean() * (unit**2 / z.shape[-1])
