"""The head of DINO and its kin: features -> a point on a sphere -> its scores with K prototypes.

    z = MLP(x) / |MLP(x)|        scores = z W'

    last     rows of W                                        as
    normed   of length 1                                      DINO
    scaled   of a learned length, 1 at first                  DINOv2
    plain    free: W is a linear layer's weight               DINOv3
Source: Caron et al. 2021, arXiv:2104.14294, appendix C; Oquab et al. 2023, arXiv:2304.07193.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Last = Literal["normed", "scaled", "plain"]
_HALVES = (torch.float16, torch.bfloat16)


class LastLayer(nn.Module):
    """z (R, D) -> scores (R, K), in z's dtype.  weight_v (K, D); weight_g (K, 1) where scaled."""

    def __init__(self, dim: int, count: int, last: Last) -> None:
        super().__init__()
        self.last = last
        self.weight_v = nn.Parameter(torch.empty(count, dim))
        if last == "plain":
            nn.init.trunc_normal_(self.weight_v, std=0.02)
        else:
            nn.init.uniform_(self.weight_v, -(dim**-0.5), dim**-0.5)
        if last == "scaled":
            self.weight_g = nn.Parameter(torch.ones(count, 1))

    def forward(self, z: Tensor) -> Tensor:
        return F.linear(z, self.rows())

    def rows(self) -> Tensor:
        """W (K, D)."""
        if self.last == "plain":
            return self.weight_v
        rows = F.normalize(self.weight_v, dim=1)
        return rows * self.weight_g if self.last == "scaled" else rows


class DINOHead(nn.Module):
    """x (R, dim) -> scores (R, prototypes): `layers` linear ones with GELU, then `LastLayer`.

    Raises ValueError for fewer than one layer.
    """

    def __init__(
        self,
        dim: int,
        prototypes: int,
        *,
        hidden: int = 2048,
        bottleneck: int = 256,
        layers: int = 3,
        last: Last = "normed",
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"a head needs at least 1 layer, got layers={layers}")
        widths = [dim, *[hidden] * (layers - 1), bottleneck]
        modules: list[nn.Module] = []
        for wide, narrow in zip(widths[:-1], widths[1:], strict=True):
            linear = nn.Linear(wide, narrow)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            modules += [linear, nn.GELU()]
        self.mlp = nn.Sequential(*modules[:-1])
        self.last = LastLayer(bottleneck, prototypes, last)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.embed(x))

    def embed(self, x: Tensor) -> Tensor:
        """The points (R, bottleneck) of length 1."""
        z = self.mlp(x)
        return F.normalize(z, dim=-1, eps=1e-6 if z.dtype in _HALVES else 1e-12)
