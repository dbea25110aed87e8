"""CropMAE: fill in a crop of which next to nothing is shown, with the wider view of it at hand.

    y = encoder(view 1), all of its patches        x = encoder(view 2), only K visible ones
    loss = mean over the L - K hidden patches of view 2 of the squared error of decoder(x; y)

One encoder reads both.  With 2 of 196 patches left there is nothing to interpolate from: they tell
where in the first view the second lies, and the decoder must look it up there.
Source: Eymael et al. 2024, CropMAE, arXiv:2403.17823, section 3 (98.5 % hidden, patches normalized
by their own moments); the siamese form is SiamMAE's, arXiv:2305.14344, and cross-view completion
CroCo's, arXiv:2210.10716.  The second crop lies within the first (preset `crop_mae`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.losses import MAELoss
from fastssl.masking import Masking, random_masking
from fastssl.models import CrossDecoder

from .base import Batch
from .configs import CropMAEConfig
from .paint import repainted
from .places import MaskedMethod, MaskSchedule, patch_values


class CropMAE(MaskedMethod):
    preset, views, couples_batch = "crop_mae", 2, False

    def __init__(self, encoder: nn.Module, cfg: CropMAEConfig):
        super().__init__(encoder, cfg)
        width, L, values = self.masked.width, self.masked.num_patches, patch_values(self.masked)
        self.schedule = MaskSchedule(cfg.mask_ratio, L)
        self.decoder = CrossDecoder(width, **cfg.decoder, patches=L, values=values)
        self.criterion = MAELoss(self.masked.patch, norm_pix=cfg.norm_pix)

    def encode(self, batch: Batch) -> tuple[Tensor, Masking]:
        whole, crop = batch["views"]
        return self.predict(whole, crop, batch["seeds"])

    def loss(self, encoded: tuple[Tensor, Masking], batch: Batch) -> dict[str, Tensor]:
        prediction, masking = encoded
        return {"loss": self.criterion(prediction, batch["views"][1], masking.masked)}

    def predict(self, whole: Tensor, crop: Tensor, seeds: Tensor) -> tuple[Tensor, Masking]:
        """Values (B, L - K, prod(patch) C) of the crop's hidden patches, and which those are."""
        masking = random_masking(seeds, self.masked.num_patches, self.schedule.keep)
        tokens = self.masked(crop, masking.visible)
        return self.decoder(tokens, masking, self.masked(whole)), masking

    @torch.no_grad()
    def reconstruct(self, images: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """Of each image (B, C, H, W) the middle, magnified: hidden patches grayed, and predicted.

        The image itself is the first view; its middle half, each way, is the second.
        """
        H, W = images.shape[2:]
        middle = images[:, :, H // 4 : H - H // 4, W // 4 : W - W // 4]
        crop = F.interpolate(middle.float(), (H, W), mode="bilinear", antialias=True)
        prediction, masking = self.predict(images, crop, seeds)
        norm_pix = self.cfg.norm_pix
        return repainted(crop, prediction, masking.masked, self.masked.patch, norm_pix=norm_pix)
