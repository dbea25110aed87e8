"""Rows of length one, of embeddings of any size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.kernels.common import accumulator, can_read_values


def unit(z: Tensor) -> Tensor:
    """z with rows of length one, in float32, or float64 for float64; a zero row stays zero.

    Rows whose squares float32 cannot add are divided by their largest number first.  One below the
    least normal number counts as zero: a device may have none of those.
    """
    wide = z.to(accumulator(z.dtype))
    if can_read_values(wide) and wide.numel():  # no row needs it, as a rule
        norms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        low, high = norms.detach().aminmax()
        if low >= 1e-9 and high <= 1e15:
            return wide / norms
    largest = wide.detach().abs().amax(-1, keepdim=True)
    tiny = (largest < 1e-10) & (largest >= torch.finfo(wide.dtype).tiny)
    return F.normalize(wide / torch.where(tiny | (largest > 1e15), largest, 1), dim=-1)
