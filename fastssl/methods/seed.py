"""SEED: an image's likeness to past ones, as a frozen teacher sees it, is the student's soft label.

    t = norm(teacher(view)), s = norm(head(student(view))), Q = [t; the last K teacher's features]
    loss = mean over views and images of CE(softmax(Q t / teacher_temperature),
                                            softmax(Q s / temperature))            [nats]

The pseudo-labels are the queue's entries, K + 1 of them, and the image's own is the first.
Source: Fang et al. 2021, SEED, arXiv:2101.04731, section 3.2, equations 4 to 6.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.kernels import soft_cross_entropy
from fastssl.losses.queue import Queue
from fastssl.models import feature_dim, projection_head

from . import watch
from .base import Batch, Method
from .configs import SEEDConfig


class SEED(Method):
    preset, views, couples_batch, has_teacher = "simclr", (1, None), True, True

    def __init__(self, encoder: nn.Module, cfg: SEEDConfig, teacher: nn.Module):
        super().__init__()
        self.cfg, self.encoder, self.teacher = cfg, encoder, teacher
        sizes = cfg.hidden_dim, feature_dim(teacher), cfg.layers
        self.head = projection_head(feature_dim(encoder), *sizes, final_norm=False)
        self.queue = Queue(cfg.queue_size, feature_dim(teacher))

    def networks(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder, "teacher": self.teacher}

    def targets(self, batch: Batch) -> list[Tensor]:
        made = [self.teacher(self.cast(view)).float() for view in batch["views"]]
        return [F.normalize(t, dim=1) for t in made]

    def loss(self, encoded: list[Tensor], batch: Batch) -> dict[str, Any]:
        """The queue is to remember the first view."""
        t, keys = torch.cat(batch["targets"]), self.queue.keys.T
        s = F.normalize(torch.cat([self.head(x) for x in encoded]).float(), dim=1)
        student, teacher = (torch.cat([(x * t).sum(1, keepdim=True), x @ keys], 1) for x in (s, t))
        temps = {"student_temp": self.cfg.temperature, "teacher_temp": self.cfg.teacher_temperature}
        loss = soft_cross_entropy(student, teacher, **temps).mean()
        told = watch.of_teacher(teacher, self.cfg.teacher_temperature)
        watched = {**watch.of_embeddings(*encoded), "teacher_entropy": told["teacher_entropy"]}
        return {"loss": loss, **watched, "keep": batch["targets"][0]}

    def on_step(self, keep: Tensor, progress: float) -> None:
        self.queue.push(keep, check=False)
