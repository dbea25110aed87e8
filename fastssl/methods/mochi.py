"""MoCHi: MoCo v2, whose queries also meet hard negatives that are mixed from the queue's nearest.

With synthetic = 0 and from_query = 0 it is MoCo v2: a view's query must find the other view's key,
made by a slowly moving teacher, among the keys of past batches.
Source: Kalantidis et al. 2020, Hard Negative Mixing, arXiv:2010.01028, section 4; Chen et al. 2020,
MoCo v2, arXiv:2003.04297 (an MLP head without norms, views as SimCLR's with weaker color).
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastssl.losses import MoCHiLoss
from fastssl.models import EMA, feature_dim
from fastssl.schedules.config import at

from .base import Batch, Method
from .configs import MoCHiConfig


class MoCHi(Method):
    preset, views, couples_batch = "simclr", 2, True

    def __init__(self, encoder: nn.Module, cfg: MoCHiConfig):
        super().__init__()
        self.cfg, dim = cfg, feature_dim(encoder)
        head = nn.Sequential(
            nn.Linear(dim, cfg.hidden_dim), nn.ReLU(), nn.Linear(cfg.hidden_dim, cfg.projection_dim)
        )
        self.student = nn.Sequential(encoder, head)
        self.teacher = EMA(self.student)
        sizes = {"top_n": cfg.top_n, "s": cfg.synthetic, "s_prime": cfg.from_query}
        self.criterion = MoCHiLoss(cfg.projection_dim, cfg.temperature, cfg.queue_size, **sizes)

    @property
    def encoder(self) -> nn.Module:  # type: ignore[override]
        return self.student[0]

    def networks(self) -> dict[str, nn.Module]:
        teacher = self.teacher.model.get_submodule("0")
        return {"encoder": self.encoder, "teacher": teacher}

    def encode(self, batch: Batch) -> Tensor:
        return self.encoder(self.cast(batch["views"][0]))

    def targets(self, batch: Batch) -> Tensor:
        """The teacher's features of the second view."""
        encoder, _ = self.teacher.model.children()
        return encoder(self.cast(batch["views"][1]))

    def loss(self, encoded: Tensor, batch: Batch) -> dict[str, Any]:
        _, head = self.teacher.model.children()
        with torch.no_grad():
            key = head(batch["targets"])
        loss = self.criterion(self.student[1](encoded), key, update=False)
        return {"loss": loss, "keep": key}

    def on_step(self, keep: Tensor, progress: float) -> None:
        self.criterion.remember(keep)
        self.teacher.update(self.student, at(self.cfg.momentum, progress))
