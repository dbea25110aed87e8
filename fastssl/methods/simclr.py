"""SimCLR: two views of an image attract, all other images of the batch repel.

Source: Chen et al. 2020, A Simple Framework for Contrastive Learning of Visual Representations,
arXiv:2002.05709, algorithm 1.
"""

from torch import Tensor, nn

from fastssl.losses import NTXentLoss
from fastssl.models import feature_dim, projection_head

from . import watch
from .base import Batch, Method
from .configs import SimCLRConfig
from .views import mean_over_pairs


class SimCLR(Method):
    preset, views, couples_batch = "simclr", (2, None), True

    def __init__(self, encoder: nn.Module, cfg: SimCLRConfig):
        super().__init__()
        self.encoder = encoder
        self.head = projection_head(
            feature_dim(encoder), cfg.hidden_dim, cfg.projection_dim, cfg.layers, final_norm=True
        )
        self.criterion = NTXentLoss(cfg.temperature)

    def loss(self, encoded: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        z = [self.head(features) for features in encoded]
        loss = mean_over_pairs(self.criterion, z, batch["views"])
        return {"loss": loss, **watch.of_embeddings(*encoded)}
