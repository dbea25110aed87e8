"""VICReg: two views' embeddings agree, while every feature varies and none repeats another.

Source: Bardes et al. 2022, VICReg, arXiv:2105.04906, algorithm 1 and section 4.
"""

from torch import Tensor, nn

from fastssl.losses import VICRegLoss
from fastssl.models import feature_dim, projection_head

from . import watch
from .base import Batch, Method
from .configs import VICRegConfig
from .views import mean_over_pairs


class VICReg(Method):
    """Its views are BYOL's, whose protocol the paper takes over."""

    preset, views, couples_batch = "vicreg", (2, None), True

    def __init__(self, encoder: nn.Module, cfg: VICRegConfig):
        super().__init__()
        self.encoder = encoder
        self.head = projection_head(
            feature_dim(encoder), cfg.hidden_dim, cfg.projection_dim, cfg.layers, final_norm=False
        )
        self.criterion = VICRegLoss(cfg.lambda_param, cfg.mu_param, cfg.nu_param)

    def loss(self, encoded: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        z = [self.head(features) for features in encoded]
        loss = mean_over_pairs(self.criterion, z, batch["views"])
        return {"loss": loss, **watch.of_embeddings(*encoded)}
