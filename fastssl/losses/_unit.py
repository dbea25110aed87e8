"""Rows of length one, of embeddings of any size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.kernels._dispatch import accumulator


def unit(z: Tensor) -> Tensor:
    """z with rows of length one, in float32, or float64 for float64; a zero row stays zero.

    Rows are divided by their largest number first, whose square float32 might not hold.  One below
    the least normal number counts as zero: a device may have none of those.
    """
    wide = z.to(accumulator(z.dtype))
    largest = wide.detach().abs().amax(-1, keepdim=True)
    least = torch.finfo(wide.dtype).tiny
    return F.normalize(wide / torch.where(largest < least, 1, largest), dim=-1)
