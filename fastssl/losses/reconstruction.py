"""Reconstruction losses over the patch primitives."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastssl.kernels import Normalized, patch_mse
from fastssl.losses._loss import Loss


class MAELoss(Loss):
    """Predict the pixels of the hidden patches of images, clips, spectrograms or signals.

        target = (x - mean(x)) / sqrt(var(x) + 1e-6) over each patch's own values (norm_pix)
        loss = mean over hidden patches, then values, of f(pred - target)
        f(e) = e^2 (l2, as published), |e| (l1), e^2 / 2 or |e| - 1/2 past 1 (smooth_l1)

    Shapes   pred (B, K, prod(patch) * C): one prediction per hidden patch, its pixels row-major
             and each pixel's channels side by side: 'h w c' of an image, 't h w c' of a clip.
             images (B, C, *S), S of 1, 2 or 3 sides: float, uint8 (read as 0..255) or
             `Normalized`; read as they are, never patchified, no gradient.
             masked_ids (B, K) int64: each hidden patch's place in the row-major patch grid.
    Returns  scalar float32: the mean over B * K hidden patches, 0 <= loss.  With norm_pix the
             variance is unbiased, and a constant patch's target is 0.
    Raises   ValueError: K = 0 and everything patch_mse refuses.
    Ranks    no collective: with the same B and K on every rank, averaging gradients is exact.
    Source   He et al. 2021, MAE, arXiv:2111.06377, section 3 "Reconstruction target"; the values of
             facebookresearch/mae, which predicts every patch and masks the sum.  l1: Xie et al.
             2021, SimMIM, arXiv:2111.09886, section 3.4.

    >>> import torch
    >>> images, ids = torch.ones(1, 1, 4, 4), torch.tensor([[1, 3]])
    >>> MAELoss(patch=2)(torch.full((1, 2, 4), 0.5), images, ids).item()
    0.25
    >>> clip, ids = torch.ones(1, 1, 2, 4, 4), torch.tensor([[0]])
    >>> MAELoss(patch=(2, 4, 4), kind="l1")(torch.full((1, 1, 32), 0.5), clip, ids).item()
    0.5
    """

    shown = ("patch", "norm_pix", "kind")

    def __init__(
        self, patch: int | tuple[int, ...], norm_pix: bool = True, kind: str = "l2"
    ) -> None:
        super().__init__()
        self.patch, self.norm_pix, self.kind = patch, norm_pix, kind

    def forward(self, pred: Tensor, images: Tensor | Normalized, masked_ids: Tensor) -> Tensor:
        if masked_ids.numel() == 0:
            got = tuple(masked_ids.shape)
            raise ValueError(f"masked_ids must name at least one hidden patch, got shape {got}")
        options = {"norm_pix": self.norm_pix, "kind": self.kind}
        return patch_mse(pred, images, masked_ids, self.patch, **options).mean()


def mae_reference(
    pred: Tensor, images: Tensor, masked_ids: Tensor, patch: int, norm_pix: bool = True
) -> Tensor:
    """The formula of kind "l2", of images (B, C, H, W) whose patches are all made."""
    pixels = F.unfold(images, patch, stride=patch).unflatten(1, (images.shape[1], -1))
    patches = pixels.permute(0, 3, 2, 1).flatten(2)  # (B, L, patch * patch * C)
    target = patches.gather(1, masked_ids.unsqueeze(-1).expand_as(pred))
    if norm_pix:
        mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        target = (target - mean) / (var + 1e-6).sqrt()
    return (pred - target).square().mean()
