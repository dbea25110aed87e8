"""MoCo v3: a view's query must find the other view's key, made by a slowly moving teacher.

Source: Chen, Xie & He 2021, An Empirical Study of Training Self-Supervised Vision Transformers,
arXiv:2104.02057, algorithm 1; the momentum rises to 1 over half a cosine (section 4.1).
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastssl.losses import MoCoV3Loss
from fastssl.models import EMA, feature_dim, projection_head
from fastssl.schedules import cosine

from .base import Batch, Method
from .configs import MoCoV3Config


class MoCoV3(Method):
    preset, views, couples_batch = "mocov3", 2, True

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
        """The teacher's features of every view."""
        encoder, _ = self.teacher.model.children()
        return [encoder(self.cast(view)) for view in batch["views"]]

    def loss(self, encoded: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        q_0, q_1 = (self.predictor(self.student[1](features)) for features in encoded)
        _, head = self.teacher.model.children()
        with torch.no_grad():
            k_0, k_1 = map(head, batch["targets"])
        return {"loss": self.criterion(q_0, k_1) + self.criterion(q_1, k_0)}

    def on_step(self, keep: Any, progress: float) -> None:
        self.teacher.update(self.student, cosine(progress, self.cfg.momentum, 1.0))
