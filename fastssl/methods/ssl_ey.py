"""SSL-EY: views are drawn to their canonical correlations, all at once, by an unconstrained loss.

Source: Chapman, Wells & Lawry Aguila 2023, arXiv:2310.01012, section 4 (views and heads of
VICReg).
"""

from torch import Tensor, nn

from fastssl.losses import SSLEYLoss
from fastssl.models import feature_dim, projection_head

from .base import Batch, Method
from .configs import SSLEYConfig


class SSLEY(Method):
    preset, views, couples_batch = "vicreg", (2, None), True

    def __init__(self, encoder: nn.Module, cfg: SSLEYConfig):
        super().__init__()
        self.encoder = encoder
        self.head = projection_head(
            feature_dim(encoder), cfg.hidden_dim, cfg.projection_dim, cfg.layers, final_norm=False
        )
        self.criterion = SSLEYLoss()

    def loss(self, encoded: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        return {"loss": self.criterion([self.head(features) for features in encoded])}
