"""VideoMAE V2: few tubes of a clip are encoded, and half of the rest is predicted.

    L = T H W tubelets; K visible, the same places of every frame; D decoded, by a running cell
    loss = mean over the D tubelets of the squared error of their pixels (norm_pix)

The encoder embeds K tubelets and nothing else; the decoder reads those K and asks for D more, so
that its sequence is K + D long and not L.  At the defaults K = 0.1 L and D = 0.5 (L - K).
Source: Wang et al. 2023, VideoMAE V2, arXiv:2303.16727, section 3.2 (dual masking); Tong et al.
2022, VideoMAE, arXiv:2203.12602 (tubes, norm_pix).  There the decoder's subset is drawn of all
tubelets, and the loss taken at those that the encoder does not see, a count that varies; here D
hidden ones are taken, and counts are fixed.  Positions of the decoder are learned.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastssl.losses import MAELoss
from fastssl.masking import Dual, dual_masking, keep_of
from fastssl.models import LatentPredictor

from .base import Batch
from .configs import VideoMAEConfig
from .paint import repainted
from .places import MaskedMethod, patch_values


class VideoMAE(MaskedMethod):
    preset, views, couples_batch = "clips", 1, False

    def __init__(self, encoder: nn.Module, cfg: VideoMAEConfig):
        super().__init__(encoder, cfg)
        if len(self.masked.grid) != 3:
            raise ValueError(
                f"method.name=videomae reads clips, with a vit_video; got a grid {self.masked.grid}"
            )
        T, H, W = self.masked.grid
        try:
            self.keep_per_frame = keep_of(H * W, cfg.mask_ratio)
        except ValueError as error:
            raise ValueError(f"method.mask_{error}") from error
        self.decode = max(1, round(cfg.decode_ratio * T * (H * W - self.keep_per_frame)))
        L, values = self.masked.num_patches, patch_values(self.masked)
        self.decoder = LatentPredictor(self.masked.width, **cfg.decoder, patches=L, values=values)
        self.criterion = MAELoss(self.masked.patch, norm_pix=cfg.norm_pix)

    def mask(self, seeds: Tensor) -> Dual:
        """Each clip's tubes and decoded tubelets; seeds (B,) int64."""
        return dual_masking(seeds, self.masked.grid, self.keep_per_frame, self.decode)

    def on_step(self, keep: Any, progress: float) -> None:
        """Nothing to do: as much is hidden from first to last."""

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The prediction, and which tubelets it is of."""
        (clips,) = batch["views"]
        dual = self.mask(batch["seeds"])
        return self.predict(clips, dual.masking.visible, dual.decoded), dual.decoded

    def loss(self, encoded: tuple[Tensor, Tensor], batch: Batch) -> dict[str, Tensor]:
        prediction, decoded = encoded
        return {"loss": self.criterion(prediction, *batch["views"], decoded)}

    def predict(self, clips: Tensor, visible: Tensor, wanted: Tensor) -> Tensor:
        """Values (B, D, prod(patch) C) of the tubelets `wanted` (B, D) from `visible` (B, K)."""
        tokens = self.masked(clips, visible)
        return self.decoder(tokens, visible, wanted[:, None])[:, 0]

    @torch.no_grad()
    def reconstruct(self, clips: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """The clips with all hidden tubelets grayed, and with them predicted; like `clips`."""
        masking = self.mask(seeds).masking
        prediction = self.predict(clips, masking.visible, masking.masked)
        patch, norm_pix = self.masked.patch, self.cfg.norm_pix
        return repainted(clips, prediction, masking.masked, patch, norm_pix=norm_pix)
