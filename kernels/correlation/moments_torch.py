"""Column statistics in torch, on any device: the functions that `moments.py` builds on.

Sums of squares are taken about a first mean and corrected by a second, so that a column far from
zero loses nothing to cancellation.  Its mean is kept as two numbers, shift + rest, for as long as
it is to be subtracted: at 1e6 the sum of them has a rounding error of 0.03 in float32.

A CPU has torch's own batch norm, one pass but for the statistics; it computes x * scale + offset,
which costs |mean| / std roundings.  Where they are more than FAR, it runs on differences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.autograd import accumulator
from ..common.checks import can_read_values
from ..common.chunks import row_spans

FAR = 4.0  # means, in standard deviations


def column_dot(a: Tensor, b: Tensor) -> Tensor:
    """sum_n a_nd b_nd: (D,), without the (N, D) product."""
    acc = accumulator(a.dtype)
    total: Tensor | None = None
    for i in row_spans(a, a.shape[1]):
        part = (a[i].to(acc) * b[i].to(acc)).sum(0)
        total = part if total is None else total.add_(part)
    return a.new_zeros(a.shape[1], dtype=acc) if total is None else total


def moments(z: Tensor) -> Tensor:
    """(3, D) of rows (N, D): shift and rest, together the mean, and sum_n (z_nd - mean_d)^2."""
    shift = z.mean(0, dtype=accumulator(z.dtype))
    rest, m2 = torch.zeros_like(shift), torch.zeros_like(shift)
    for i in row_spans(z, z.shape[1]):
        rows = z[i] - shift
        rest += rows.sum(0)
        m2 += rows.square_().sum(0)
    rest /= len(z)
    return torch.stack([shift, rest, (m2 - len(z) * rest.square()).clamp_min_(0)])


def join(parts: Tensor, rows: int) -> Tensor:
    """`moments` (3, D) of all ranks together, from those of each, (W, 3, D), of `rows` rows.

    Means are joined by their differences from the first one's shift.
    """
    shift, rest, m2 = parts.unbind(1)
    means = shift - shift[0] + rest
    middle = means.mean(0)
    m2 = m2.sum(0) + rows * (means - middle).square().sum(0)
    return torch.stack([shift[0], middle, m2])


def inverse(var: Tensor, eps: float) -> Tensor:
    """1 / sqrt(var + eps), and 0 where that is 1 / 0: a constant column becomes zeros.

    NaN for an infinite variance, which stands for one that has passed float32's range.
    """
    total = var + eps
    return total.rsqrt().masked_fill(total == 0, 0.0).masked_fill(total.isinf(), torch.nan)


def standardize(z: Tensor, eps: float, unbiased: bool) -> Tensor:
    """One process: (z - mean) / sqrt(var + eps) in z's dtype, by torch's own graph."""
    n = z.shape[0]
    x = z.to(accumulator(z.dtype))
    share = (n - 1) / n if unbiased else 1.0  # of the unbiased variance is the biased one
    near = False
    if can_read_values(x):
        out, mean, inv_std = _batch_norm(x, eps * share)
        far = torch.linalg.vector_norm(mean.detach() * inv_std.detach(), torch.inf)
        near = far.item() <= FAR
    if not near:
        out, _, inv_std = _batch_norm(x - x[0].detach(), eps * share)
        if eps > 0:  # 0 of an infinite variance, see `inverse`
            out = out + torch.zeros_like(inv_std).masked_fill(inv_std.detach() == 0, torch.nan)
    out = out * share**0.5 if unbiased else out
    return out.to(z.dtype)


def _batch_norm(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The result; mean and 1 / sqrt(var + eps), which is 0 where that is 1 / 0."""
    return torch.native_batch_norm(x, None, None, None, None, True, 0.0, eps)


def apply(
    z: Tensor, shift: Tensor, rest: Tensor, scale: Tensor, offset: Tensor | None = None
) -> Tensor:
    """(z - shift - rest) * scale + offset in z's dtype."""
    out = torch.empty_like(z, memory_format=torch.contiguous_format)
    for i in row_spans(z, z.shape[1]):
        rows = (z[i] - shift).sub_(rest).mul_(scale)
        out[i] = rows if offset is None else rows.add_(offset)
    return out


def sums(grad: Tensor, out: Tensor) -> Tensor:
    """(2, D): the columns' sums of grad and of grad * out."""
    acc = accumulator(grad.dtype)
    return torch.stack([grad.sum(0, dtype=acc), column_dot(grad, out)])


def gradient(grad: Tensor, out: Tensor, inv_std: Tensor, g_mean: Tensor, g_out: Tensor) -> Tensor:
    """inv_std * (grad - g_mean - out * g_out): the gradient of `standardize`, in out's dtype."""
    dz = torch.empty_like(out)
    offset, factor = g_mean * inv_std, g_out * inv_std
    for i in row_spans(out, out.shape[1]):
        dz[i] = (grad[i] * inv_std).sub_(offset).addcmul_(out[i].to(offset.dtype), factor, value=-1)
    return dz
