"""Barlow Twins: the cross-correlation of two views' embeddings becomes the identity.

Source: Zbontar et al. 2021, Barlow Twins, arXiv:2103.03230, algorithm 1.
"""

from torch import Tensor, nn

from fastssl.losses import BarlowTwinsLoss
from fastssl.models import feature_dim, projection_head

from . import watch
from .base import Batch, Method
from .configs import BarlowTwinsConfig
from .views import mean_over_pairs


class BarlowTwins(Method):
    preset, views, couples_batch = "barlow_twins", (2, None), True

    def __init__(self, encoder: nn.Module, cfg: BarlowTwinsConfig):
        super().__init__()
        self.encoder = encoder
        self.head = projection_head(
            feature_dim(encoder), cfg.hidden_dim, cfg.projection_dim, cfg.layers, final_norm=False
        )
        self.criterion = BarlowTwinsLoss(cfg.lambda_param)

    def loss(self, encoded: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        z = [self.head(features) for features in encoded]
        loss = mean_over_pairs(self.criterion, z, batch["views"])
        return {"loss": loss, **watch.of_embeddings(*encoded)}
