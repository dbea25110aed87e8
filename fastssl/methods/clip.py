"""CLIP: an image tower and a caption tower, whose embeddings of one pair must find each other.

The captions are the classes' names, by number: each class has a learned embedding, as a text tower
of one word would.  Images of one class share their caption, so that the loss does not reach 0.
Source: Radford et al. 2021, arXiv:2103.00020, figure 3 and section 2.5 (the scale's start and end).
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fastssl.losses import CLIPLoss
from fastssl.models import feature_dim

from .base import Batch, Method, MethodConfig

_MOST = math.log(100)  # of the scale's logarithm


class CLIPConfig(MethodConfig):
    name: Literal["clip"] = "clip"
    captions: int = Field(10, ge=1, description="How many classes may caption an image.")
    temperature: float = Field(0.07, gt=0, description="Of the learned scale, at first.")
    projection_dim: int = Field(128, ge=1, description="Width of the embeddings compared.")
    hidden_dim: int = Field(256, ge=1, description="Width inside the caption tower.")


class CLIP(Method):
    preset, views, joint = "mae", 1, True

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
        self.loss = CLIPLoss()

    def no_weight_decay(self) -> set[str]:
        return {"log_scale"}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        if "label" not in batch:
            raise ValueError("clip needs images with classes, got a data source without labels")
        (images,) = batch["views"]
        x = F.normalize(self.image_head(self.encoder(self.cast(images))), dim=-1)
        t = F.normalize(self.text(batch["label"]), dim=-1)
        scale = self.log_scale.float().clamp(max=_MOST).exp()
        return {"loss": self.loss(x, t, scale), "scale": scale.detach()}
