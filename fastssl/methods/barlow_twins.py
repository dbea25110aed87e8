"""Barlow Twins: the cross-correlation of two views' embeddings becomes the identity.

Source: Zbontar et al. 2021, Barlow Twins, arXiv:2103.03230, algorithm 1.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from fastssl.losses import BarlowTwinsLoss
from fastssl.models import feature_dim, projection_head

from .base import Batch, Method, MethodConfig


class BarlowTwinsConfig(MethodConfig):
    name: Literal["barlow_twins"] = "barlow_twins"
    lambda_param: float = Field(5e-3, gt=0, description="Weight of the off-diagonal terms.")
    hidden_dim: int = Field(8192, ge=1, description="Width inside the projection head.")
    projection_dim: int = Field(8192, ge=1, description="Width D of the embeddings correlated.")
    layers: int = Field(3, ge=1, description="Linear layers of the projection head.")


class BarlowTwins(Method):
    preset, views, couples_batch = "barlow_twins", 2, True

    def __init__(self, encoder: nn.Module, cfg: BarlowTwinsConfig):
        super().__init__()
        self.encoder = encoder
        self.head = projection_head(
            feature_dim(encoder), cfg.hidden_dim, cfg.projection_dim, cfg.layers, final_norm=False
        )
        self.loss = BarlowTwinsLoss(cfg.lambda_param)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        z_a, z_b = (self.head(self.encoder(self.cast(view))) for view in batch["views"])
        return {"loss": self.loss(z_a, z_b)}
