"""CMC: what is seen at once through several streams must find each other, whichever the pair.

    loss = mean over pairs of streams (a, b) of (InfoNCE(z_a, z_b) + InfoNCE(z_b, z_a)) / 2

z: a stream's features, projected by a head of its own and normalized; every stream has its encoder.
The first stream's encoder is the primary one; the others are kept and exported by their names.
Source: Tian, Krishnan & Isola 2020, Contrastive Multiview Coding, arXiv:1906.05849, section 3.3
(the full graph, there a sum) and equation 3; its negatives are of a memory, here of the batch.
"""

from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.losses import CLIPLoss
from fastssl.models import feature_dim, projection_head

from .base import Batch, Method
from .configs import CMCConfig


class CMC(Method):
    preset, views, couples_batch, streams = "mae", 1, True, None

    def __init__(self, encoders: dict[str, nn.Module], cfg: CMCConfig):
        super().__init__()
        self.encoders, self.primary = nn.ModuleDict(encoders), next(iter(encoders))
        sizes = cfg.hidden_dim, cfg.projection_dim, cfg.layers
        self.heads = nn.ModuleDict()
        for name, encoder in encoders.items():
            self.heads[name] = projection_head(feature_dim(encoder), *sizes, final_norm=False)
        self.scale, self.criterion = 1 / cfg.temperature, CLIPLoss()

    @property
    def encoder(self) -> nn.Module:  # type: ignore[override]
        return self.encoders[self.primary]

    def networks(self) -> dict[str, nn.Module]:
        return dict(self.encoders.items())

    def encode(self, batch: Batch) -> dict[str, Tensor]:
        """The features of each stream's view."""
        views = batch["views"]
        return {name: network(self.cast(views[name][0])) for name, network in self.encoders.items()}

    def loss(self, encoded: dict[str, Tensor], batch: Batch) -> dict[str, Any]:
        z = [F.normalize(head(encoded[name]), dim=-1) for name, head in self.heads.items()]
        pairs = [self.criterion(a, b, self.scale) for a, b in combinations(z, 2)]
        return {"loss": torch.stack(pairs).mean()}
