"""Prototypes: directions that embeddings are compared with, learned with them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Prototypes(nn.Module):
    """K directions of length 1: () -> (K, D) float32.

    The parameter's rows are normalized each time they are read, so that no step and no weight decay
    changes a prototype's length: exact wherever ZeRO keeps the parameter.  They begin as directions
    drawn evenly.
    Raises ValueError for K or D below 1.
    """

    def __init__(self, count: int, dim: int):
        super().__init__()
        if count < 1 or dim < 1:
            raise ValueError(f"count and dim must be at least 1, got {count} and {dim}")
        self.weight = nn.Parameter(torch.empty(count, dim))
        with torch.no_grad():
            self.weight.copy_(F.normalize(torch.randn(count, dim), dim=1))

    def forward(self) -> Tensor:
        return F.normalize(self.weight.float(), dim=1)

    def extra_repr(self) -> str:
        return f"count={self.weight.shape[0]}, dim={self.weight.shape[1]}"
