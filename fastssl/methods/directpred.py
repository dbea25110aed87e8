"""DirectPred: BYOL whose predictor is not trained, but computed from the projections it is shown.

Its eigenvectors are those of the projections' running correlation, which BYOL's predictor comes to
slowly (`fastssl.models.DirectPred`).  A step is predicted by the correlation of the steps before.
Source: Tian, Chen & Ganguli 2021, arXiv:2102.06810, section 4.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastssl.models import DirectPred as ComputedPredictor

from .base import Batch
from .byol import BYOL
from .configs import BYOLConfig, DirectPredConfig


class DirectPred(BYOL):
    predictor: ComputedPredictor

    def build_predictor(self, cfg: BYOLConfig) -> nn.Module:
        assert isinstance(cfg, DirectPredConfig)
        return ComputedPredictor(cfg.projection_dim, rho=cfg.rho, eps=cfg.eps, every=cfg.every)

    def loss(self, encoded: list[Tensor], batch: Batch) -> dict[str, Any]:
        z = [self.student[1](features) for features in encoded]
        return {"loss": self.compare([self.predictor(x) for x in z], batch), "keep": z}

    def on_step(self, keep: list[Tensor], progress: float) -> None:
        self.predictor.update(torch.cat(keep).float())
        super().on_step(keep, progress)

    def get_extra_state(self) -> int:
        """The predictor's count on the host, which an engine that restores buffers leaves out."""
        return self.predictor.steps

    def set_extra_state(self, state: int) -> None:
        self.predictor.steps = int(state)
