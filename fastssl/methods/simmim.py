"""SimMIM: mask tokens stand for the hidden patches, the encoder reads all, a linear layer paints.

    x_l = embed(patch_l) where visible, else the mask token       h = encoder(x + positions)
    loss = mean over hidden patches, then pixels, of |W h_l + b - patch_l|

L patches of an image, hidden in units of u x u patches.  Hidden patches are never embedded: only
visible pixels are read, and the mask token is put in where the others belong.
Source: Xie et al. 2022, SimMIM, arXiv:2111.09886, sections 3.2 to 3.5 (random masking by units of
32 pixels, raw pixels, L1, a linear head).  Its positions are relative biases; here the encoder's.
"""

from math import prod

import torch
from torch import Tensor, nn

from fastssl.kernels import gather_tokens, restore_tokens
from fastssl.losses import MAELoss
from fastssl.masking import Masking, unit_masking

from .base import Batch
from .configs import SimMIMConfig
from .paint import repainted
from .places import MaskedMethod, MaskSchedule, patch_values


class SimMIM(MaskedMethod):
    preset, views, couples_batch = "simmim", 1, False

    def __init__(self, encoder: nn.Module, cfg: SimMIMConfig):
        super().__init__(encoder, cfg)
        patch, grid = self.masked.patch, self.masked.grid
        if any(side % cfg.unit for side in grid):
            raise ValueError(f"method.unit={cfg.unit} does not divide the patch grid {grid}")
        self.schedule = MaskSchedule(cfg.mask_ratio, prod(side // cfg.unit for side in grid))
        width = self.masked.width
        self.mask_token = nn.Parameter(torch.zeros(width))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.head = nn.Linear(width, patch_values(self.masked))
        self.criterion = MAELoss(patch, norm_pix=False, kind=cfg.error)

    def encode(self, batch: Batch) -> tuple[Tensor, Masking]:
        (images,) = batch["views"]
        return self.predict(images, batch["seeds"])

    def loss(self, encoded: tuple[Tensor, Masking], batch: Batch) -> dict[str, Tensor]:
        prediction, masking = encoded
        return {"loss": self.criterion(prediction, *batch["views"], masking.masked)}

    def predict(self, images: Tensor, seeds: Tensor) -> tuple[Tensor, Masking]:
        """Predicted pixels (B, L - K, prod(patch) C) of the hidden patches, and which those are."""
        masking = unit_masking(seeds, self.masked.grid, self.cfg.unit, self.schedule.keep)
        tokens = self.masked.tokens(images, masking.visible)
        h = self.masked.encode(restore_tokens(tokens, masking.restore, self.mask_token))
        return self.head(gather_tokens(h[:, self.masked.prefix :], masking.masked)), masking

    @torch.no_grad()
    def reconstruct(self, images: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """The images with hidden patches grayed, and with them predicted; both like `images`."""
        prediction, masking = self.predict(images, seeds)
        return repainted(images, prediction, masking.masked, self.masked.patch, norm_pix=False)
