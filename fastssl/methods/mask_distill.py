"""Masked distillation: from visible patches, predict a frozen teacher's view of the hidden ones.

    t_l = 1/K sum over the last K blocks k of layer_norm(block_k(teacher(all patches))_l)
    p = decoder(student(visible patches))      loss = mean over hidden places and features of
                                               rho(p_l - t_l), rho the square or smooth L1

data2vec whose teacher does not move: a large model's knowledge goes into a small one that reads a
quarter of the patches.  Student and teacher have the same grid of patches, and else nothing alike.
Source: Liu et al. 2022, dBOT, arXiv:2209.03917 (one stage of its masked distillation of a frozen
teacher); Huang et al. 2023, G2SD, arXiv:2302.14771 (into a small student, whose decoder predicts:
its generic stage; there also at visible places, from a masked autoencoder's decoder).
"""

from typing import Any

from torch import nn

from fastssl.models import MAEDecoder

from .base import Method
from .configs import MaskDistillConfig
from .data2vec import Data2Vec, LayerMean
from .places import DrawnOnce, MaskSchedule, of_one_size


class MaskDistill(Data2Vec):
    preset, views, couples_batch, has_teacher = "mae", 1, False, True

    def __init__(self, encoder: nn.Module, cfg: MaskDistillConfig, teacher: nn.Module):
        Method.__init__(self)
        self.cfg, self.places = cfg, DrawnOnce(self.mask)
        self.student, taught = (of_one_size(network, cfg.name) for network in (encoder, teacher))
        if taught.grid != self.student.grid:
            raise ValueError(
                f"method.name={cfg.name} compares patches: the teacher's grid {taught.grid} must "
                f"be the student's {self.student.grid}: give a model.kwargs.patch_size like it"
            )
        self.teacher = LayerMean(taught, cfg.layers)  # type: ignore[assignment]
        L = self.student.num_patches
        self.schedule = MaskSchedule(cfg.mask_ratio, L)
        self.decoder = MAEDecoder(self.student.width, **cfg.decoder, patches=L, values=taught.width)
        self.schedule.check(self.mask)

    def networks(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder, "teacher": self.teacher.get_submodule("masked.vit")}

    def on_step(self, keep: Any, progress: float) -> None:
        self.schedule.progress = progress
