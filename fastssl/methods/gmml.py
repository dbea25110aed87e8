"""GMML: corrupt groups of connected patches, and recover the image from what the encoder makes.

    x~ = x with the patches of M replaced by noise, by zeros or by another image's
    y = MLP(encoder(x~))            loss = mean over l in M, or over all l, of |y_l - patch_l(x)|

The encoder reads corrupted images whole, as it will read images afterwards: no mask token, nothing
left out.  A group is some connected patches, a part of an object and not scattered pieces of it.
Source: Atito et al. 2022, GMML, arXiv:2205.14986, section 3, with the reconstruction part of their
SiT, arXiv:2104.03602.  There the share corrupted is random up to 70 %; here it is fixed, or goes
from the first to the last of a pair.
"""

import torch
from torch import Tensor, nn

from fastssl.kernels import gather_tokens
from fastssl.losses import MAELoss
from fastssl.masking import Masking, connected_masking, corrupt

from .base import Batch
from .configs import GMMLConfig
from .paint import paint
from .places import MaskedMethod, MaskSchedule, patch_values


class GMML(MaskedMethod):
    """Swapped patches come from the next image of the batch, on each rank from its own part."""

    preset, views, couples_batch = "mae", 1, False

    def __init__(self, encoder: nn.Module, cfg: GMMLConfig):
        super().__init__(encoder, cfg)
        self.schedule = MaskSchedule(cfg.mask_ratio, self.masked.num_patches)
        width, values = self.masked.width, patch_values(self.masked)
        self.head = nn.Sequential(
            *(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU()),
            nn.Linear(width, values),
        )
        self.criterion = MAELoss(self.masked.patch, norm_pix=False, kind=cfg.error)
        self.schedule.check(self.mask)

    def mask(self, seeds: Tensor, keep: int) -> Masking:
        """Which patches each sample has corrupted, all but `keep`; seeds (B,) int64."""
        groups = self.cfg.groups
        try:
            return connected_masking(seeds, self.masked.grid, keep, groups=groups)
        except ValueError as error:
            raise ValueError(f"method.groups={groups}: {error}") from error

    def prepare(self, batch: Batch) -> Batch:
        """With the corrupted images as "corrupted", and as "hidden" the places to predict."""
        (images,) = batch["views"]
        masking = self.mask(batch["seeds"], self.schedule.keep)
        places = torch.arange(self.masked.num_patches, device=images.device)
        ids = places.expand(len(images), -1) if self.cfg.everywhere else masking.masked
        corrupted = self.corrupted(images, batch["seeds"], masking)
        return {**batch, "corrupted": corrupted, "hidden": ids}

    def encode(self, batch: Batch) -> Tensor:
        return self.predict(batch["corrupted"], batch["hidden"])

    def loss(self, encoded: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self.criterion(encoded, *batch["views"], batch["hidden"])}

    def corrupted(self, images: Tensor, seeds: Tensor, masking: Masking) -> Tensor:
        """The images with the patches of `masking.masked` replaced."""
        return corrupt(images, seeds, masking, self.masked.patch, self.cfg.corruption)

    def predict(self, corrupted: Tensor, ids: Tensor) -> Tensor:
        """Predicted pixels (B, N, prod(patch) C) of the patches at `ids` (B, N)."""
        return self.head(gather_tokens(self.masked(corrupted)[:, self.masked.prefix :], ids))

    @torch.no_grad()
    def reconstruct(self, images: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """The corrupted images, and the images with those patches predicted; both like `images`."""
        masking = self.mask(seeds, self.schedule.keep)
        corrupted = self.corrupted(images, seeds, masking)
        prediction = self.predict(corrupted, masking.masked)
        return corrupted, paint(images, prediction, masking.masked, self.masked.patch)
