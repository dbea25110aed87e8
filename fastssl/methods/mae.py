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
from fastssl.models import MAEDecoder, MaskedViT

from .base import Batch, Method
from .configs import MAEConfig
from .paint import repainted
from .places import MaskSchedule, draw_mask, patch_values


class MAE(Method):
    preset, views, couples_batch = "mae", 1, False

    def __init__(self, encoder: nn.Module, cfg: MAEConfig):
        super().__init__()
        self.cfg = cfg
        self.masked = MaskedViT(encoder)
        patch, L = self.masked.patch, self.masked.num_patches
        self.schedule = MaskSchedule(cfg.mask_ratio, L)
        self.decoder = MAEDecoder(
            self.masked.width,
            width=cfg.decoder_dim,
            depth=cfg.decoder_depth,
            heads=cfg.decoder_heads,
            patches=L,
            values=patch_values(self.masked),
        )
        self.loss = MAELoss(patch, norm_pix=cfg.norm_pix)
        for keep in self.schedule.counts():  # what cannot be drawn is found out here, not in a step
            self.mask(torch.zeros(1, dtype=torch.int64), keep)

    @property
    def encoder(self) -> nn.Module:  # type: ignore[override]
        return self.masked.vit

    @property
    def visible(self) -> int:
        """K, as it is now."""
        return self.schedule.keep

    def mask(self, seeds: Tensor, keep: int) -> Masking:
        """Which patches each sample hides, all but `keep`; seeds (B,) int64."""
        return draw_mask(self.cfg.masking, seeds, self.masked.grid, keep)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        (images,) = batch["views"]
        prediction, masking = self.predict(images, batch["seeds"])
        return {"loss": self.loss(prediction, images, masking.masked)}

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

    def after_step(self, progress: float) -> None:
        self.schedule.progress = progress
