"""SLA: labels are augmented: of an image turned four ways, which class it is and which way it lies.

    z_j = encoder(x turned j times a quarter)      N classes, M = 4 turns
    loss = 1/M sum over j of CE(softmax over all N M of W z_j, (label, j))
    p = softmax over i of 1/M sum over j of (W z_j)_(i, j)         the aggregated inference
    distilled, the class of the image as it is:  loss + KL(sg p || softmax(U z_0)) + beta CE(U z_0)

One task of joint classes asks no feature to be blind to turns, as two tasks side by side would.
Source: Lee, Hwang & Shin 2020, Self-supervised Label Augmentation, arXiv:1910.05872, section 3
(SLA, SLA+AG and SLA+SD).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.models import feature_dim

from .base import Batch, Method
from .configs import SLAConfig
from .turns import quarter_turns


class SLA(Method):
    preset, views, couples_batch = "mae", 1, False

    def __init__(self, encoder: nn.Module, cfg: SLAConfig):
        super().__init__()
        self.encoder, self.cfg, dim = encoder, cfg, feature_dim(encoder)
        self.joint = nn.Linear(dim, 4 * cfg.classes)
        self.single = nn.Linear(dim, cfg.classes) if cfg.distill else None

    def encode(self, batch: Batch) -> Tensor:
        """Features of the four turns: (B, 4, F)."""
        (images,) = batch["views"]
        turned = quarter_turns(self.cast(images)).flatten(0, 1)
        return self.encoder(turned).unflatten(0, (-1, 4))

    def loss(self, encoded: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Beside the loss the share of images of whose class the aggregate is right."""
        label, logits = batch["label"], self.joint(encoded).float()
        wanted = 4 * label[:, None] + torch.arange(4, device=label.device)
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        aggregate = self.aggregate(logits).detach()
        if self.single is not None:
            own = self.single(encoded[:, 0]).float()
            kl = F.kl_div(own.log_softmax(1), aggregate.softmax(1), reduction="batchmean")
            loss = loss + kl + self.cfg.beta * F.cross_entropy(own, label)
        return {"loss": loss, "accuracy": (aggregate.argmax(1) == label).float().mean()}

    def aggregate(self, logits: Tensor) -> Tensor:
        """(B, N): of joint logits (B, 4, 4 N) each turn's with itself as turn, their mean."""
        return logits.unflatten(2, (-1, 4)).diagonal(dim1=1, dim2=3).mean(-1)

    def classify(self, images: Tensor) -> Tensor:
        """Logits (B, N): in one pass by the distilled head, else aggregated over four turns."""
        if self.single is not None:
            return self.single(self.encoder(self.cast(images))).float()
        return self.aggregate(self.joint(self.encode({"views": [images]})).float())
