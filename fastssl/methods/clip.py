"""CLIP: an image tower and a caption tower, whose embeddings of one pair must find each other.

The captions are the classes' names, by number: each class has a learned embedding, as a text tower
of one word would.  Images of one class share their caption, so that the loss does not reach 0.
Source: Radford et al. 2021, arXiv:2103.00020, figure 3 and section 2.5 (the scale's start and end).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.losses import CLIPLoss
from fastssl.models import feature_dim

from .base import Batch, Method
from .configs import CLIPConfig

_MOST = math.log(100)  # of the scale's logarithm


class CLIP(Method):
    """One text tower, evaluated once a caption instead of once an image."""

    preset, views, couples_batch = "clip", 1, True
    captions: Tensor

    def __init__(self, encoder: nn.Module, cfg: CLIPConfig):
        super().__init__()
        self.encoder, out = encoder, cfg.projection_dim
        self.image_head = nn.Linear(feature_dim(encoder), out, bias=False)
        self.text = nn.Sequential(
            nn.Embedding(cfg.captions, cfg.hidden_dim),
            nn.LayerNorm(cfg.hidden_dim),
            nn.Linear(cfg.hidden_dim, cfg.hidden_dim),
            nn.GELU(),
            nn.Linear(cfg.hidden_dim, out, bias=False),
        )
        self.log_scale = nn.Parameter(torch.tensor([-math.log(cfg.temperature)]))
        self.register_buffer("captions", torch.arange(cfg.captions), persistent=False)
        self.criterion = CLIPLoss()

    def no_weight_decay(self) -> set[str]:
        return {"log_scale"}

    def loss(self, encoded: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        """Beside the loss: the scale, and `accuracy`, the share of images nearest their caption."""
        (features,) = encoded
        x = F.normalize(self.image_head(features), dim=-1)
        captions = F.normalize(self.text(self.captions), dim=-1)
        log_scale = self.log_scale.float()
        # At most 100, by a constant: a clamp has gradient 0, and a scale above would stay there.
        scale = (log_scale - (log_scale.detach() - _MOST).clamp(min=0)).exp().squeeze(0)
        nearest = (x.detach() @ captions.detach().T).argmax(-1)
        return {
            "loss": self.criterion(x, captions[batch["label"]], scale),
            "scale": scale.detach(),
            "accuracy": (nearest == batch["label"]).float().mean(),
        }

    def on_step(self, keep: Any, progress: float) -> None:
        """Keep the scale at most 100, where the parameter is whole: not at ZeRO's stage 3."""
        with torch.no_grad():
            self.log_scale.clamp_(max=_MOST)
