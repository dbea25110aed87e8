"""MoCo v2: a view's query must find the other view's key among the keys of past batches.

Keys are made by a slowly moving teacher, and wait in a queue.
Source: Chen et al. 2020, Improved Baselines with Momentum Contrastive Learning, arXiv:2003.04297;
He et al. 2020, MoCo, arXiv:1911.05722, algorithm 1.  There the keys' batch norms see a shuffled
batch, so that a query does not know its key by the statistics they share; here nothing is shuffled,
and batch norms over all ranks (engine.sync_batchnorm) have none to share that tell ranks apart.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastssl.losses import MoCoLoss
from fastssl.models import feature_dim

from .base import Batch
from .configs import MoCoV2Config
from .taught import Taught
from .views import check_others


class MoCoV2(Taught):
    preset, views, couples_batch = "mocov2", 2, False

    def __init__(self, encoder: nn.Module, cfg: MoCoV2Config):
        hidden = nn.Linear(feature_dim(encoder), cfg.hidden_dim)
        out = nn.Linear(cfg.hidden_dim, cfg.projection_dim)
        super().__init__(encoder, nn.Sequential(hidden, nn.ReLU(), out), cfg)
        self.criterion = MoCoLoss(cfg.projection_dim, cfg.temperature, cfg.queue_size)

    def encode(self, batch: Batch) -> Tensor:
        check_others(batch["views"])
        return self.encoder(self.cast(batch["views"][0]))

    def targets(self, batch: Batch) -> Tensor:
        """The teacher's features of the second view."""
        encoder, _ = self.teacher.model.children()
        return encoder(self.cast(batch["views"][1]))

    def loss(self, encoded: Tensor, batch: Batch) -> dict[str, Any]:
        _, head = self.teacher.model.children()
        with torch.no_grad():
            key = head(batch["targets"])
        return {"loss": self.criterion(self.student[1](encoded), key, update=False), "keep": key}

    def on_step(self, keep: Tensor, progress: float) -> None:
        self.criterion.queue.push(keep, check=False)
        super().on_step(keep, progress)
