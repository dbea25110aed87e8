"""DINO: every view of the student's is to say what a teacher says of each other, global, view.

    q_g = softmax((t_g - c) / teacher_temp)      t, s: scores of a view with K prototypes
    p_v = softmax(s_v / student_temp)            c: the moving mean of t, of the steps before
    loss = mean over g != v and images of -q_g . log p_v

The teacher is the moving mean of the student; it is what a run evaluates and keeps first.
Source: Caron et al. 2021, arXiv:2104.14294, algorithm 1, with the multi-crop of section 3.1.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastssl.losses.dino import cross_entropies
from fastssl.models import EMA, DINOHead, feature_dim, still
from fastssl.schedules.config import at

from .base import Batch, Method
from .configs import DINOConfig
from .teachers import Clock, Targets, watched
from .views import encode_views, global_views, others


class DINO(Method):
    preset, views, couples_batch = "dino", (2, None), True  # with Sinkhorn, that is

    def __init__(self, encoder: nn.Module, cfg: DINOConfig):
        super().__init__()
        self.cfg, self.clock = cfg, Clock()
        self.student = nn.Sequential(encoder, DINOHead(**cfg.head(feature_dim(encoder))))
        self.teacher = EMA(self.student)
        still(self.teacher)
        self.assign = Targets(cfg.prototypes, cfg.assignment, cfg.center_momentum)
        self.couples_batch = cfg.assignment == "sinkhorn"

    @property
    def encoder(self) -> nn.Module:  # type: ignore[override]
        return self.student[0]

    def networks(self) -> dict[str, nn.Module]:
        return {"teacher": self.teacher.model.get_submodule("0"), "student": self.encoder}

    def features(self, images: Tensor) -> Tensor:
        """The teacher's."""
        return self.networks()["teacher"](self.cast(images)).float()

    def encode(self, batch: Batch) -> list[Tensor]:
        return encode_views(self.encoder, [self.cast(view) for view in batch["views"]])

    def targets(self, batch: Batch) -> list[Tensor]:
        """The teacher's features of every global view."""
        views, (encoder, _) = batch["views"], self.teacher.model.children()
        return encode_views(encoder, [self.cast(views[g]) for g in global_views(views)])

    def loss(self, encoded: list[Tensor], batch: Batch) -> dict[str, Any]:
        _, head = self.teacher.model.children()
        student = encode_views(self.student[1], encoded)
        with torch.no_grad():
            teacher = encode_views(head, batch["targets"])
        temp = at(self.cfg.teacher_temp, self.clock.progress)
        center, pairs = self.assign.of(teacher, temp), others(batch["views"])
        loss = cross_entropies(student, teacher, center, pairs, (self.cfg.student_temp, temp))
        told = watched(encoded[:1], teacher[0], temp, center)
        kept = self.assign.kept(teacher)
        return {"loss": loss / sum(map(sum, pairs)), **told, "keep": kept}

    def on_step(self, keep: Any, progress: float) -> None:
        self.clock.progress = progress
        self.assign.move(keep)
        self.teacher.update(self.student, at(self.cfg.momentum, progress))
