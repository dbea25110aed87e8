"""Point-MAE: hide most groups of a cloud's points, encode the rest, predict the hidden points.

    G groups of k points about their centers, K = round((1 - mask_ratio) G) of them visible
    loss = mean over the G - K hidden groups of chamfer(predicted points, points)

Points are relative to their group's center.  The encoder reads the visible groups and their centers
alone; the decoder is told the hidden centers too, and has to find the shape about each.
Source: Pang et al. 2022, Point-MAE, arXiv:2203.06604, section 3 (random masking, 0.6; Chamfer
distance of squared lengths).
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastssl.kernels import chamfer, gather_tokens
from fastssl.masking import Masking, random_masking
from fastssl.models import PointDecoder, PointTransformer
from fastssl.models.point import Groups

from .base import Batch, Method
from .configs import PointMAEConfig
from .places import MaskSchedule


class PointMAE(Method):
    preset, views, couples_batch = "clouds", 1, False

    def __init__(self, encoder: nn.Module, cfg: PointMAEConfig):
        super().__init__()
        if not isinstance(encoder, PointTransformer):
            got = type(encoder).__name__
            raise ValueError(f"method.name=point_mae trains a point_transformer, got {got}")
        self.cfg, self.encoder = cfg, encoder
        self.schedule = MaskSchedule(cfg.mask_ratio, encoder.groups)
        self.decoder = PointDecoder(encoder.width, **cfg.decoder, size=encoder.group_size)

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The predicted points of the hidden groups, and their own: (B, G - K, k, 3) each."""
        (clouds,) = batch["views"]
        prediction, masking, groups = self.predict(clouds, batch["seeds"])
        return prediction, chosen(groups.points, masking.masked)

    def loss(self, encoded: tuple[Tensor, Tensor], batch: Batch) -> dict[str, Tensor]:
        prediction, hidden = encoded
        return {"loss": chamfer(prediction.flatten(0, 1), hidden.flatten(0, 1)).mean()}

    def predict(self, clouds: Tensor, seeds: Tensor) -> tuple[Tensor, Masking, Groups]:
        """Predicted points (B, G - K, k, 3) of the hidden groups, which those are, and all groups.

        clouds (B, N, 3) float32; a 16-bit coordinate would move its point.
        """
        groups = self.encoder.group(clouds)  # type: ignore[operator]
        x, masking = self.encode_visible(groups, seeds)
        return self.decoder(x, groups.centers, masking)[0], masking, groups

    def encode_visible(self, groups: Groups, seeds: Tensor) -> tuple[Tensor, Masking]:
        """Tokens (B, K, E) of the groups that the seeds' masks leave visible, and the masks."""
        masking = random_masking(seeds, groups.centers.shape[1], self.schedule.keep)
        tokens = self.encoder.tokens(chosen(groups.points, masking.visible))  # type: ignore
        seen = gather_tokens(groups.centers, masking.visible)
        return self.encoder.encode(tokens, seen), masking  # type: ignore[operator]

    def features(self, clouds: Tensor) -> Tensor:
        """Clouds (B, N, 3) -> features (B, 2 E) float32: the mean and the maximum over groups."""
        return self.encoder(clouds).float()

    @torch.no_grad()
    def reconstruct(self, clouds: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """The visible groups' points (B, K k, 3), and with them the predicted ones (B, G k, 3)."""
        prediction, masking, (points, centers) = self.predict(clouds, seeds)
        whole = points + centers[:, :, None]
        seen = chosen(whole, masking.visible).flatten(1, 2)
        hidden = prediction.float() + gather_tokens(centers, masking.masked)[:, :, None]
        return seen, torch.cat([seen, hidden.flatten(1, 2)], 1)

    def on_step(self, keep: Any, progress: float) -> None:
        self.schedule.progress = progress


def chosen(points: Tensor, ids: Tensor) -> Tensor:
    """The groups ids (B, K) of points (B, G, k, 3): (B, K, k, 3)."""
    return gather_tokens(points.flatten(2), ids).unflatten(2, points.shape[2:])
