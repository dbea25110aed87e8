"""VICReg: two views' embeddings agree, while every feature varies and none repeats another.

Source: Bardes et al. 2022, VICReg, arXiv:2105.04906, algorithm 1 and section 4.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from fastssl.losses import VICRegLoss
from fastssl.models import feature_dim, projection_head

from .base import Batch, Method, MethodConfig


class VICRegConfig(MethodConfig):
    name: Literal["vicreg"] = "vicreg"
    lambda_param: float = Field(25.0, ge=0, description="Weight of the views' agreement.")
    mu_param: float = Field(25.0, ge=0, description="Weight of the variances' hinge.")
    nu_param: float = Field(1.0, ge=0, description="Weight of the squared covariances.")
    hidden_dim: int = Field(8192, ge=1, description="Width inside the projection head.")
    projection_dim: int = Field(8192, ge=1, description="Width D of the embeddings.")
    layers: int = Field(3, ge=1, description="Linear layers of the projection head.")


class VICReg(Method):
    """Its views are BYOL's, whose protocol the paper takes over."""

    preset, views, couples_batch = "vicreg", 2, True

    def __init__(self, encoder: nn.Module, cfg: VICRegConfig):
        super().__init__()
        self.encoder = encoder
        self.head = projection_head(
            feature_dim(encoder), cfg.hidden_dim, cfg.projection_dim, cfg.layers, final_norm=False
        )
        self.loss = VICRegLoss(cfg.lambda_param, cfg.mu_param, cfg.nu_param)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        z_a, z_b = (self.head(self.encoder(self.cast(view))) for view in batch["views"])
        return {"loss": self.loss(z_a, z_b)}
