"""SimSiam: a view's prediction must point where the other views' projections lie, held still.

    loss = mean over pairs of different views of -cos(p_v, stop_gradient(z_w))

No negatives, no teacher: the stopped gradient and the predictor alone keep the projections apart.
`spread` is logged: their standard deviation once they have length 1, times the root of their width;
1 where they fill the sphere, 0 where they have collapsed.  Only global views draw others to them.
Source: Chen & He 2020, Exploring Simple Siamese Representation Learning, arXiv:2011.10566,
algorithm 1 and section 4.1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.losses import NegativeCosineSimilarity
from fastssl.models import feature_dim, projection_head

from .base import Batch, Method
from .configs import SimSiamConfig
from .views import global_views, queries


class SimSiam(Method):
    preset, views, couples_batch = "mocov2", (2, None), True

    def __init__(self, encoder: nn.Module, cfg: SimSiamConfig):
        super().__init__()
        self.encoder = encoder
        dim, out = feature_dim(encoder), cfg.projection_dim
        self.head = projection_head(dim, out, out, cfg.layers, final_norm=True)
        self.predictor = projection_head(out, cfg.prediction_hidden_dim, out, 2, final_norm=False)
        self.criterion = NegativeCosineSimilarity()

    def loss(self, encoded: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        views, z = batch["views"], [self.head(features) for features in encoded]
        p = [self.predictor(x) for x in z]
        losses = [self.criterion(p[v].float(), z[g].detach().float()) for v, g in queries(views)]
        last = F.normalize(z[global_views(views)[-1]].detach().float(), dim=1)
        spread = last.std(0, correction=0).mean() * last.shape[1] ** 0.5
        return {"loss": torch.stack(losses).mean(), "spread": spread}
