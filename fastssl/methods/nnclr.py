"""NNCLR: an image's nearest neighbor among past ones stands in for one of its views.

Source: Dwibedi et al. 2021, With a Little Help from My Friends, arXiv:2104.14548, section 3.2.
"""

from typing import Any

from torch import Tensor, nn

from fastssl.losses import NNCLRLoss
from fastssl.models import feature_dim, projection_head

from .base import Batch, Method
from .configs import NNCLRConfig
from .views import global_views, mean_over_pairs


class NNCLR(Method):
    preset, views, couples_batch = "simclr", (2, None), True

    def __init__(self, encoder: nn.Module, cfg: NNCLRConfig):
        super().__init__()
        self.encoder = encoder
        dim, out = feature_dim(encoder), cfg.projection_dim
        self.head = projection_head(dim, cfg.hidden_dim, out, cfg.layers, final_norm=True)
        self.predictor = projection_head(out, cfg.prediction_hidden_dim, out, 2, final_norm=False)
        self.criterion = NNCLRLoss(cfg.queue_size, out, cfg.temperature)

    def loss(self, encoded: list[Tensor], batch: Batch) -> dict[str, Any]:
        """The queue is to remember the last global view."""
        views, z = batch["views"], [self.head(features) for features in encoded]
        made = [(x, self.predictor(x)) for x in z]

        def loss(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
            return self.criterion(one[0], other[0], one[1], other[1], update=False)

        return {"loss": mean_over_pairs(loss, made, views), "keep": z[global_views(views)[-1]]}

    def on_step(self, keep: Tensor, progress: float) -> None:
        self.criterion.queue.push(keep, check=False)
