"""BYOL: a view's prediction must point where a slowly moving teacher puts the other views.

    loss(v, g) = |p_v / |p_v| - z_g / |z_g||^2 = 2 - 2 cos(p_v, z_g)

p the predictor of the student's projection, z the teacher's projection.  Nothing repels; only
global views have a z.  Of two views the loss is the sum of both directions, of more twice the mean
of all.
Source: Grill et al. 2020, Bootstrap Your Own Latent, arXiv:2006.07733, section 3.1; the momentum
rises to 1 over half a cosine (section 3.2).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.losses import NegativeCosineSimilarity
from fastssl.models import feature_dim, projection_head

from .base import Batch
from .configs import BYOLConfig
from .taught import Taught
from .views import queries


class BYOL(Taught):
    preset, views, couples_batch = "byol", (2, None), True

    def __init__(self, encoder: nn.Module, cfg: BYOLConfig):
        dim, out = feature_dim(encoder), cfg.projection_dim
        super().__init__(
            encoder, projection_head(dim, cfg.hidden_dim, out, cfg.layers, final_norm=False), cfg
        )
        self.predictor = self.build_predictor(cfg)
        self.criterion = NegativeCosineSimilarity()

    def build_predictor(self, cfg: BYOLConfig) -> nn.Module:
        """From projections to predictions, both (B, projection_dim)."""
        return projection_head(
            cfg.projection_dim, cfg.hidden_dim, cfg.projection_dim, 2, final_norm=False
        )

    def loss(self, encoded: list[Tensor], batch: Batch) -> dict[str, Any]:
        z = [self.student[1](features) for features in encoded]
        return {"loss": self.compare([self.predictor(x) for x in z], batch)}

    def compare(self, p: Sequence[Tensor], batch: Batch) -> Tensor:
        """The loss of each view's prediction (B, projection_dim), 0-d float32."""
        z = self.projections(batch)
        losses = [
            2 + 2 * self.criterion(p[v].float(), z[g].float()) for v, g in queries(batch["views"])
        ]
        return torch.stack(losses).sum() * (2 / len(losses))
