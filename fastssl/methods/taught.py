"""What methods with a teacher share: an encoder with its head, and the moving mean of both."""

from typing import Any

import torch
from torch import Tensor, nn

from fastssl.models import EMA
from fastssl.schedules.config import at

from .base import Batch, Method
from .views import global_views


class Taught(Method):
    """`student` is the encoder, then the head; `teacher` follows it by cfg.momentum.

    The targets are the teacher's features of every global view.
    """

    cfg: Any

    def __init__(self, encoder: nn.Module, head: nn.Module, cfg: Any):
        super().__init__()
        self.cfg = cfg
        self.student = nn.Sequential(encoder, head)
        self.teacher = EMA(self.student)

    @property
    def encoder(self) -> nn.Module:  # type: ignore[override]
        return self.student[0]

    def networks(self) -> dict[str, nn.Module]:
        teacher = self.teacher.model.get_submodule("0")
        return {"encoder": self.encoder, "teacher": teacher}

    def targets(self, batch: Batch) -> Any:
        encoder, _ = self.teacher.model.children()
        views = batch["views"]
        return [encoder(self.cast(views[g])) for g in global_views(views)]

    @torch.no_grad()
    def projections(self, batch: Batch) -> dict[int, Tensor]:
        """The teacher's head on the targets, by the number of the view."""
        _, head = self.teacher.model.children()
        chosen = global_views(batch["views"])
        return dict(zip(chosen, map(head, batch["targets"]), strict=True))

    def on_step(self, keep: Any, progress: float) -> None:
        self.teacher.update(self.student, at(self.cfg.momentum, progress))
