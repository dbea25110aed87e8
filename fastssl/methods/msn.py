"""MSN: a view with hidden patches is assigned to the prototypes that a whole view is assigned to.

    target   the first global view, whole, by the teacher
    anchors  the other global views, a share of their patches hidden, and the local ("focal") views
    loss = mean over anchors of CE(q, p) + lambda (log K - H(mean of p))

p of an anchor is a softmax of its cosines with K learned prototypes, q that of its target, sharper,
and used alike by Sinkhorn.  Hidden patches are never embedded.
Source: Assran et al. 2022, Masked Siamese Networks, arXiv:2204.07141, section 3.  The authors read
the class token, here it is what the encoder pools; ReLU stands for GELU in the head.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.losses import MSNLoss
from fastssl.masking import keep_of
from fastssl.models import EMA, MaskedViT, Prototypes, feature_dim, projection_head
from fastssl.random import hashes
from fastssl.schedules.config import at

from .base import Batch, Method
from .configs import MSNConfig
from .places import draw_mask
from .views import by_size, check_others, global_views


class MSN(Method):
    preset, views, couples_batch = "msn", (2, None), True

    def __init__(self, encoder: nn.Module, cfg: MSNConfig):
        super().__init__()
        self.cfg, out = cfg, cfg.projection_dim
        head = projection_head(
            feature_dim(encoder), cfg.hidden_dim, out, cfg.layers, final_norm=False
        )
        self.student = nn.Sequential(MaskedViT(encoder), head)
        self.teacher = EMA(self.student)
        self.prototypes = Prototypes(cfg.prototypes, out)
        how = cfg.temperature, cfg.sinkhorn_iterations, cfg.regularization
        self.criterion = MSNLoss(*how, gather_distributed=True)
        self.mask(torch.zeros(1, dtype=torch.int64), self.masked.grid)

    @property
    def masked(self) -> MaskedViT:
        return self.student[0]  # type: ignore[return-value]

    @property
    def encoder(self) -> nn.Module:  # type: ignore[override]
        return self.masked.vit

    def networks(self) -> dict[str, nn.Module]:
        teacher = self.teacher.model.get_submodule("0.vit")
        return {"encoder": self.encoder, "teacher": teacher}

    def mask(self, seeds: Tensor, grid: tuple[int, ...]) -> Tensor | None:
        """The visible patches (B, K) of each sample; None: all.  seeds (B,) int64.

        Raises ValueError for a share that leaves no patch.
        """
        if self.cfg.mask_ratio == 0:
            return None
        try:
            keep = keep_of(prod(grid), self.cfg.mask_ratio)
        except ValueError as error:
            raise ValueError(f"method.mask_{error}") from error
        return draw_mask(self.cfg.masking, seeds, grid, keep).visible

    def encode(self, batch: Batch) -> list[Tensor]:
        """Features (B, F) of each anchor.  Raises ValueError for a single view."""
        check_others(batch["views"])
        views = [self.cast(view) for view in batch["views"]]
        target, *masked = global_views(views)
        seeds = hashes(batch["seeds"], len(views))
        made = {}
        for v in masked:
            ids = self.mask(seeds[:, v], self.masked.grid_of(views[v]))
            made[v] = pooled(self.masked, views[v], ids)
        focal = [v for v in range(len(views)) if v not in (target, *masked)]
        for part in by_size([views[v] for v in focal]):
            rows = pooled(self.masked, torch.cat([views[focal[n]] for n in part]))
            made |= dict(zip((focal[n] for n in part), rows.chunk(len(part)), strict=True))
        return [made[v] for v in range(len(views)) if v != target]

    def targets(self, batch: Batch) -> Tensor:
        masked, _ = self.teacher.model.children()
        return pooled(masked, self.cast(batch["views"][global_views(batch["views"])[0]]))

    def loss(self, encoded: Sequence[Tensor], batch: Batch) -> dict[str, Tensor]:
        _, head = self.teacher.model.children()
        with torch.no_grad():
            target = head(batch["targets"]).float()
        anchors = torch.cat([self.student[1](features).float() for features in encoded])
        return {"loss": self.criterion(anchors, target, self.prototypes(), self.cfg.sharpening)}

    def on_step(self, keep: Any, progress: float) -> None:
        self.teacher.update(self.student, at(self.cfg.momentum, progress))


def pooled(masked: nn.Module, images: Tensor, ids: Tensor | None = None) -> Tensor:
    """What the encoder gives (B, F), of the patches `ids` (B, K) alone; None: of all."""
    return masked.vit.forward_head(masked(images, ids), pre_logits=True)  # type: ignore[operator, union-attr]
