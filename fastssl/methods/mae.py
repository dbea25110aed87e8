"""MAE: hide most patches, encode the rest, predict the pixels of the hidden ones.

    L patches of an image, K = round((1 - mask_ratio) L) of them visible
Source: He et al. 2022, Masked Autoencoders Are Scalable Vision Learners, arXiv:2111.06377.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fastssl.kernels import gather_patches
from fastssl.losses import MAELoss
from fastssl.masking import Masking, random_masking
from fastssl.models import MAEDecoder, MaskedViT, feature_dim

from .base import Batch, Method, MethodConfig


class MAEConfig(MethodConfig):
    name: Literal["mae"] = "mae"
    mask_ratio: float = Field(0.75, gt=0, lt=1, description="Share of patches hidden.")
    norm_pix: bool = Field(True, description="Predict each patch normalised by its own moments.")
    decoder_dim: int = Field(512, ge=1, description="Width of the decoder.")
    decoder_depth: int = Field(8, ge=1, description="Blocks of the decoder.")
    decoder_heads: int = Field(16, ge=1, description="Attention heads of the decoder.")


class MAE(Method):
    preset, views, joint = "mae", 1, False

    def __init__(self, encoder: nn.Module, cfg: MAEConfig):
        super().__init__()
        self.cfg = cfg
        self.masked = MaskedViT(encoder)
        ph, pw = self.masked.patch
        L, values = self.masked.num_patches, ph * pw * encoder.in_chans  # type: ignore[operator]
        self.visible = round((1 - cfg.mask_ratio) * L)
        if not 0 < self.visible < L:
            raise ValueError(
                f"method.mask_ratio={cfg.mask_ratio} leaves {self.visible} of {L} patches"
            )
        self.decoder = MAEDecoder(
            feature_dim(encoder),
            width=cfg.decoder_dim,
            depth=cfg.decoder_depth,
            heads=cfg.decoder_heads,
            patches=L,
            values=values,  # type: ignore[arg-type]
        )
        self.loss = MAELoss(self.masked.patch, norm_pix=cfg.norm_pix)

    @property
    def encoder(self) -> nn.Module:  # type: ignore[override]
        return self.masked.vit

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        (images,) = batch["views"]
        prediction, masking = self.predict(images, batch["seeds"])
        return {"loss": self.loss(prediction, images, masking.masked)}

    def predict(self, images: Tensor, seeds: Tensor) -> tuple[Tensor, Masking]:
        """Predicted values (B, L - K, p p C) of the hidden patches, and which those are."""
        masking = random_masking(seeds, self.masked.num_patches, self.visible)
        return self.decoder(self.masked(images, masking.visible), masking), masking

    @torch.no_grad()
    def reconstruct(self, images: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """The images with hidden patches greyed, and with them predicted; each (B, C, H, W).

        With norm_pix the decoder predicts contrast only: a patch's own mean and deviation are put
        back, as in the paper's figures.
        """
        prediction, masking = self.predict(images, seeds)
        truth = gather_patches(images, masking.masked, self.masked.patch).float()
        if self.cfg.norm_pix:
            std = (truth.var(-1, keepdim=True) + 1e-6).sqrt()
            prediction = prediction.float() * std + truth.mean(-1, keepdim=True)
        hidden = torch.zeros_like(truth)
        return self._paint(images, hidden, masking), self._paint(images, prediction, masking)

    def _paint(self, images: Tensor, patches: Tensor, masking: Masking) -> Tensor:
        """`images` with their hidden patches replaced by `patches` (B, L - K, p p C)."""
        B, C, H, W = images.shape
        ph, pw = self.masked.patch
        grid = images.reshape(B, C, H // ph, ph, W // pw, pw).permute(0, 2, 4, 3, 5, 1).flatten(3)
        grid = grid.flatten(1, 2).clone()
        grid.scatter_(1, masking.masked[..., None].expand_as(patches), patches.to(grid.dtype))
        grid = grid.reshape(B, H // ph, W // pw, ph, pw, C).permute(0, 5, 1, 3, 2, 4)
        return grid.reshape(B, C, H, W)
