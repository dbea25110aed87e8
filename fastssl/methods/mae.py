"""MAE: hide most patches, encode the rest, predict the pixels of the hidden ones.

    L patches of an image, K = round((1 - mask_ratio) L) of them visible
    loss = mean over the L - K hidden patches of the squared error of their pixels

Images, clips (B, C, T, H, W) and signals (B, C, W) alike, as the encoder reads them.
Source: He et al. 2022, Masked Autoencoders Are Scalable Vision Learners, arXiv:2111.06377; masks
of filtered noise: Hinojosa et al. 2024, ColorMAE, arXiv:2407.13036; blocks: BEiT, arXiv:2106.08254.
"""

import torch
from torch import Tensor, nn

from fastssl.losses import MAELoss
from fastssl.masking import Masking
from fastssl.models import MAEDecoder

from .base import Batch
from .configs import MAEConfig
from .paint import repainted
from .places import MaskedMethod, MaskSchedule, draw_mask, patch_values


class MAE(MaskedMethod):
    preset, views, couples_batch = "mae", 1, False

    def __init__(self, encoder: nn.Module, cfg: MAEConfig):
        super().__init__(encoder, cfg)
        width, L, values = self.masked.width, self.masked.num_patches, patch_values(self.masked)
        self.schedule = MaskSchedule(cfg.mask_ratio, L)
        self.decoder = MAEDecoder(width, **cfg.decoder, patches=L, values=values)
        self.criterion = MAELoss(self.masked.patch, norm_pix=cfg.norm_pix)
        self.schedule.check(self.mask)

    @property
    def visible(self) -> int:
        """K, as it is now."""
        return self.schedule.keep

    def mask(self, seeds: Tensor, keep: int) -> Masking:
        """Which patches each sample hides, all but `keep`; seeds (B,) int64."""
        return draw_mask(self.cfg.masking, seeds, self.masked.grid, keep)

    def encode(self, batch: Batch) -> tuple[Tensor, Masking]:
        (images,) = batch["views"]
        return self.predict(images, batch["seeds"])

    def loss(self, encoded: tuple[Tensor, Masking], batch: Batch) -> dict[str, Tensor]:
        prediction, masking = encoded
        return {"loss": self.criterion(prediction, *batch["views"], masking.masked)}

    def predict(self, images: Tensor, seeds: Tensor) -> tuple[Tensor, Masking]:
        """Predicted values (B, L - K, prod(patch) C) of the hidden patches, and which those are."""
        masking = self.mask(seeds, self.visible)
        return self.decoder(self.masked(images, masking.visible), masking), masking

    @torch.no_grad()
    def reconstruct(self, images: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """The images with hidden patches grayed, and with them predicted; both like `images`."""
        prediction, masking = self.predict(images, seeds)
        norm_pix = self.cfg.norm_pix
        return repainted(images, prediction, masking.masked, self.masked.patch, norm_pix=norm_pix)
