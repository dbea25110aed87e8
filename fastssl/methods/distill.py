"""Distillation of features: from a view, predict what a frozen teacher makes of it.

    t = layer_norm(teacher(view))      no gradient, no affine
    p = head(student(view))            loss = mean over views, images and features of rho(p - t),
                                       rho the square or smooth L1; or 1 - cosine of p and t

No labels, and any two encoders: they share nothing but the view.  The head is left behind.
Source: Wei et al. 2022, Contrastive Learning Rivals Masked Image Modeling in Fine-tuning via
Feature Distillation, arXiv:2205.14141, section 3 (targets whitened by a layer norm, smooth L1).
There every patch's features are distilled by a linear head; here an image's pooled ones.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.models import feature_dim, projection_head

from . import watch
from .base import Batch, Method
from .configs import DistillConfig


class Distill(Method):
    preset, views, couples_batch, has_teacher = "mae", (1, None), True, True

    def __init__(self, encoder: nn.Module, cfg: DistillConfig, teacher: nn.Module):
        super().__init__()
        self.cfg, self.encoder, self.teacher = cfg, encoder, teacher
        width = feature_dim(teacher)
        if cfg.layers == 1:
            self.head: nn.Module = nn.Linear(feature_dim(encoder), width)
        else:
            sizes = cfg.hidden_dim, width, cfg.layers
            self.head = projection_head(feature_dim(encoder), *sizes, final_norm=False)

    def networks(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder, "teacher": self.teacher}

    def targets(self, batch: Batch) -> list[Tensor]:
        """The teacher's features of every view, layer-normed."""
        made = [self.teacher(self.cast(view)).float() for view in batch["views"]]
        return [F.layer_norm(t, t.shape[-1:]) for t in made]

    def loss(self, encoded: list[Tensor], batch: Batch) -> dict[str, Any]:
        p, t = torch.cat([self.head(x).float() for x in encoded]), torch.cat(batch["targets"])
        if self.cfg.error == "cosine":
            loss = 1 - F.cosine_similarity(p, t).mean()
        else:
            loss = (F.smooth_l1_loss if self.cfg.error == "smooth_l1" else F.mse_loss)(p, t)
        return {"loss": loss, **watch.of_embeddings(*encoded)}
