"""MoCo v3: a view's query must find the other views' keys, made by a slowly moving teacher.

Only global views have keys; of two views the loss is the sum of both directions, of more twice the
mean of all.

Source: Chen, Xie & He 2021, An Empirical Study of Training Self-Supervised Vision Transformers,
arXiv:2104.02057, algorithm 1; the momentum rises to 1 over half a cosine (section 4.1).
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastssl.losses import MoCoV3Loss
from fastssl.models import EMA, feature_dim, projection_head
from fastssl.schedules.config import at

from . import watch
from .base import Batch, Method
from .configs import MoCoV3Config
from .views import global_views, queries


class MoCoV3(Method):
    preset, views, couples_batch = "mocov3", (2, None), True

    def __init__(self, encoder: nn.Module, cfg: MoCoV3Config):
        super().__init__()
        self.cfg = cfg
        dim, out = feature_dim(encoder), cfg.projection_dim
        head = projection_head(dim, cfg.hidden_dim, out, cfg.layers, final_norm=True)
        self.student = nn.Sequential(encoder, head)
        self.teacher = EMA(self.student)
        self.predictor = projection_head(out, cfg.hidden_dim, out, 2, final_norm=True)
        self.criterion = MoCoV3Loss(cfg.temperature)

    @property
    def encoder(self) -> nn.Module:  # type: ignore[override]
        return self.student[0]

    def networks(self) -> dict[str, nn.Module]:
        teacher = self.teacher.model.get_submodule("0")
        return {"encoder": self.encoder, "teacher": teacher}

    def targets(self, batch: Batch) -> list[Tensor]:
        """The teacher's features of every global view."""
        encoder, _ = self.teacher.model.children()
        views = batch["views"]
        return [encoder(self.cast(views[g])) for g in global_views(views)]

    def loss(self, encoded: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        views, (_, head) = batch["views"], self.teacher.model.children()
        q = [self.predictor(self.student[1](features)) for features in encoded]
        with torch.no_grad():
            k = dict(zip(global_views(views), map(head, batch["targets"]), strict=True))
        losses = [self.criterion(q[v], k[g]) for v, g in queries(views)]
        loss = torch.stack(losses).sum() * (2 / len(losses))
        return {"loss": loss, **watch.of_embeddings(*encoded)}

    def on_step(self, keep: Any, progress: float) -> None:
        self.teacher.update(self.student, at(self.cfg.momentum, progress))
