"""DINOv3: DINOv2 with prototypes of any length, and similarities among patches held in place.

    loss = that of DINOv2, its local views' part weighed by local_weight
           + gram_weight mean over global views of mean_ij (x_i . x_j - y_i . y_j)^2

    x: the student's patches of a view, of which some are hidden; y: a Gram teacher's of the same
    crop, larger and without its colors, resized to the student's grid; both of length 1

The Gram teacher is what the teacher was at the last of `gram_updates`; 0: at first.  Its views are
the third and the fourth (preset dinov3_gram).
Source: Simeoni et al. 2025, DINOv3, arXiv:2508.10104, sections 3.2, 4.2 and 4.3.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.kernels import gram_distance
from fastssl.models import EMA
from fastssl.schedules.config import at

from .base import Batch, Encoded
from .configs import DINOv3Config
from .dinov2 import DINOv2
from .views import global_views, others

G = 2  # global views that are anchored


class DINOv3(DINOv2):
    cfg: DINOv3Config

    def __init__(self, encoder: nn.Module, cfg: DINOv3Config):
        super().__init__(encoder, cfg)
        if cfg.has_gram:
            self.gram = EMA(self.masked)

    @property
    def anchored(self) -> float:
        """gram_weight, now."""
        return at(self.cfg.gram_weight, self.clock.progress)

    def compared(self, batch: Batch) -> list[Tensor]:
        views = batch["views"]
        if not self.cfg.has_gram:
            return views
        if len(views) < 2 * G:
            raise ValueError(
                f"method.gram_weight reads {2 * G} views or more, the third and fourth those of "
                f"its Gram teacher, got {len(views)}: give data.augment=dinov3_gram"
            )
        return [*views[:G], *views[2 * G :]]

    def beside(self, h: Tensor) -> dict[str, Tensor]:
        """All patches of the global views, of length 1: (B, G, L, E)."""
        if not self.anchored:
            return {}
        patches = F.normalize(h[:, self.masked.prefix :].float(), dim=-1)
        return {"all": patches.unflatten(0, (G, -1)).transpose(0, 1)}

    def targets(self, batch: Batch) -> Encoded:
        made = super().targets(batch)
        if not self.anchored:
            return made
        self.gram.eval()
        gram, grid = self.gram.model, self.masked.grid_of(batch["views"][0])
        images = torch.cat([self.cast(view) for view in batch["views"][G : 2 * G]])
        h = self.gram(images)[:, self.masked.prefix :].float()
        h = h.mT.unflatten(2, gram.grid_of(images))  # type: ignore[operator]
        h = F.interpolate(h, grid, mode="bicubic", align_corners=False)
        y = F.normalize(h.flatten(2).mT, dim=-1)
        return {**made, "gram": y.unflatten(0, (G, -1)).transpose(0, 1)}

    def loss(self, encoded: Encoded, batch: Batch) -> dict[str, Any]:
        out = super().loss(encoded, batch)
        if not self.anchored:
            return out
        x, y = (z.flatten(0, 1) for z in (encoded["all"], batch["targets"]["gram"]))
        distance = gram_distance(x, y).mean()
        return {**out, "loss": out["loss"] + self.anchored * distance, "gram_loss": distance}

    def pairs(self, views: list[Tensor]) -> list[list[float]]:
        weight, chosen = at(self.cfg.local_weight, self.clock.progress), global_views(views)
        rows = enumerate(others(views))
        return [row if v in chosen else [weight * one for one in row] for v, row in rows]

    def on_step(self, keep: Any, progress: float) -> None:
        before = self.clock.progress
        super().on_step(keep, progress)
        if any(before < mark <= progress for mark in self.cfg.gram_updates):
            self.gram.update(self.teacher.model.get_submodule("masked"), 0.0)
