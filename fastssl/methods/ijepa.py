"""I-JEPA: from one context block, predict what a teacher makes of other blocks of the image.

    t = layer_norm(teacher(all patches))                  no gradient, no affine; E features each
    p_m = predictor(student(context), places of block m)  M target blocks, each on its own
    loss = mean over blocks, places and features of rho(p_ml - t_l)

rho: smooth L1, as the authors train, or the square of their paper.  The teacher is the moving mean
of the student, its momentum rising to 1 in a straight line.  Nothing but that keeps the features
from collapsing: `target_std`, the spread of the targets over the images, is logged to be watched.
Source: Assran et al. 2023, I-JEPA, arXiv:2301.08243, section 3.  There the teacher's features are
evaluated and positions are sine waves; here the student's are, and positions the encoder's own.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.kernels import gather_tokens
from fastssl.masking import Blocks, multi_block_masking
from fastssl.models import EMA, LatentPredictor
from fastssl.schedules.config import at

from .base import Batch, Method
from .configs import IJEPAConfig
from .places import DrawnOnce, of_one_size


class IJEPA(Method):
    preset, views, couples_batch = "ijepa", 1, False

    def __init__(self, encoder: nn.Module, cfg: IJEPAConfig):
        super().__init__()
        self.cfg, self.places = cfg, DrawnOnce(self.mask)
        self.student = of_one_size(encoder, cfg.name)
        self.teacher = EMA(self.student)
        L, width = self.student.num_patches, self.student.width
        self.predictor = LatentPredictor(width, **cfg.decoder, patches=L, values=width)
        self.counts = max(1, round(cfg.context * L)), max(1, round(cfg.target * L))
        try:
            self.mask(torch.zeros(1, dtype=torch.int64))
        except ValueError as error:
            given = f"context={cfg.context}, target={cfg.target}, blocks={cfg.blocks}"
            raise ValueError(f"method.{given} of {L} patches: {error}") from error

    @property
    def encoder(self) -> nn.Module:  # type: ignore[override]
        return self.student.vit

    def networks(self) -> dict[str, nn.Module]:
        teacher = self.teacher.model.get_submodule("vit")
        return {"encoder": self.encoder, "teacher": teacher}

    def mask(self, seeds: Tensor) -> Blocks:
        """Each sample's context and targets; seeds (B,) int64."""
        context, target = self.counts
        grid, blocks = self.student.grid, self.cfg.blocks
        return multi_block_masking(seeds, grid, context=context, target=target, blocks=blocks)

    def encode(self, batch: Batch) -> Tensor:
        """Predicted features (B, M, T, E) float32."""
        (images,) = batch["views"]
        places = self.places(batch["seeds"])
        context = self.student(images, places.context)
        return self.predictor(context, places.context, places.targets).float()

    def targets(self, batch: Batch) -> Tensor:
        (images,) = batch["views"]
        return self.teach(images, self.places(batch["seeds"]).targets)

    def loss(self, encoded: Tensor, batch: Batch) -> dict[str, Tensor]:
        wanted = batch["targets"]
        rho = F.smooth_l1_loss if self.cfg.error == "smooth_l1" else F.mse_loss
        spread = wanted.flatten(1, 2).mean(1).std(0, correction=0).mean()
        return {"loss": rho(encoded, wanted), "target_std": spread}

    @torch.no_grad()
    def teach(self, images: Tensor, ids: Tensor) -> Tensor:
        """What the teacher makes of the places ids (B, M, T): (B, M, T, E) float32."""
        self.teacher.eval()  # no dropped paths
        h = self.teacher(images)[:, self.student.prefix :].float()
        whole = F.layer_norm(h, h.shape[-1:])
        return gather_tokens(whole, ids.flatten(1)).unflatten(1, ids.shape[1:])

    def on_step(self, keep: Any, progress: float) -> None:
        self.teacher.update(self.student, at(self.cfg.momentum, progress))
