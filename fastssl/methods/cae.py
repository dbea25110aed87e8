"""CAE, the context autoencoder: predict the latents of hidden patches, and from those their pixels.

    z_v = encoder(visible patches)        z_h = sg encoder(hidden patches)
    z = regressor(places of the hidden ones; z_v)        y = decoder(z), which never sees z_v
    loss = mean over hidden patches of |y - pixels|^2 + w mean |z - z_h|^2

The regressor completes, in the encoder's own space, and the decoder paints: neither is left to the
encoder, which only has to represent what it sees.
Source: Chen et al. 2022, Context Autoencoder, arXiv:2202.03026, section 3 (w = 2, half of the
patches hidden in blocks).  There targets are the tokens of a trained discrete VAE, under a cross-
entropy; here pixels, normalized patch by patch as MAE's.  There one attention reads visible latents
and queries together; here each block reads the first, then the second.  Positions are learned.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.masking import Masking
from fastssl.models import LatentRegressor, PlaceDecoder

from .base import Batch
from .configs import CAEConfig
from .mae import MAE
from .places import DrawnOnce, patch_values


class CAE(MAE):
    def __init__(self, encoder: nn.Module, cfg: CAEConfig):
        super().__init__(encoder, cfg)
        self.places = DrawnOnce(self.mask)
        L, width = self.masked.num_patches, self.masked.width
        sizes = {"patches": L, "width": cfg.decoder_dim, "heads": cfg.decoder_heads}
        self.regressor = LatentRegressor(width, depth=cfg.regressor_depth, values=width, **sizes)
        values = patch_values(self.masked)
        self.decoder = PlaceDecoder(width, depth=cfg.decoder_depth, values=values, **sizes)

    def regress(self, images: Tensor, masking: Masking) -> Tensor:
        """z (B, L - K, E)."""
        return self.regressor(self.masked(images, masking.visible), masking)

    def predict(self, images: Tensor, seeds: Tensor) -> tuple[Tensor, Masking]:
        masking = self.mask(seeds, self.visible)
        return self.decoder(self.regress(images, masking), masking.masked), masking

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor, Masking]:
        (images,), masking = batch["views"], self.places(batch["seeds"], self.visible)
        latents = self.regress(images, masking)
        return latents, self.decoder(latents, masking.masked), masking

    def targets(self, batch: Batch) -> Tensor:
        (images,), masking = batch["views"], self.places(batch["seeds"], self.visible)
        return self.masked(images, masking.masked)[:, self.masked.prefix :].float()

    def loss(self, encoded: tuple[Tensor, Tensor, Masking], batch: Batch) -> dict[str, Tensor]:
        latents, prediction, masking = encoded
        alignment = F.mse_loss(latents.float(), batch["targets"])
        loss = super().loss((prediction, masking), batch)["loss"]
        return {"loss": loss + self.cfg.alignment * alignment, "alignment": alignment.detach()}
