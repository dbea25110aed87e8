"""NNCLR: an image's nearest neighbor among past ones stands in for one of its views.

Source: Dwibedi et al. 2021, With a Little Help from My Friends, arXiv:2104.14548, section 3.2.
"""

from torch import Tensor, nn

from fastssl.losses import NNCLRLoss
from fastssl.models import feature_dim, projection_head

from .base import Batch, Method
from .configs import NNCLRConfig


class NNCLR(Method):
    preset, views, couples_batch = "simclr", 2, True

    def __init__(self, encoder: nn.Module, cfg: NNCLRConfig):
        super().__init__()
        self.encoder = encoder
        dim, out = feature_dim(encoder), cfg.projection_dim
        self.head = projection_head(dim, cfg.hidden_dim, out, cfg.layers, final_norm=True)
        self.predictor = projection_head(out, cfg.prediction_hidden_dim, out, 2, final_norm=False)
        self.loss = NNCLRLoss(cfg.queue_size, out, cfg.temperature)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        z_0, z_1 = (self.head(self.encoder(self.cast(view))) for view in batch["views"])
        loss = self.loss(z_0, z_1, self.predictor(z_0), self.predictor(z_1), update=False)
        if self.training:  # a step that is skipped must not leave its NaN among the neighbors
            self.loss.queue.push(z_1.detach().nan_to_num(0.0, 0.0, 0.0), check=False)
        return {"loss": loss}
