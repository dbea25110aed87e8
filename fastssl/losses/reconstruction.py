"""Reconstruction losses over the patch primitives."""

from __future__ import annotations

from torch import Tensor, nn

from fastssl.kernels import patch_mse


class MAELoss(nn.Module):
    """Predict the pixels of the hidden patches.

        target = (x - mean(x)) / sqrt(var(x) + 1e-6) over each patch's own pixels (norm_pix)
        loss = mean over hidden patches, then pixels, of (pred - target)^2

    Shapes   pred (B, K, ph * pw * C): one prediction per hidden patch, pixels in 'h w c' order.
             images (B, C, H, W), float or uint8: read as they are, never patchified, no gradient.
             masked_ids (B, K) int64: each hidden patch's place in the row-major patch grid.
    Returns  scalar float32: the mean over B * K hidden patches, 0 <= loss.  With norm_pix the
             variance is unbiased, and a constant patch's target is 0.
    Raises   ValueError: K = 0 and everything patch_mse refuses.
    Ranks    no collective: with the same B and K on every rank, averaging gradients is exact.
    Source   He et al. 2021, MAE, arXiv:2111.06377, section 3 "Reconstruction target"; the values of
             facebookresearch/mae, which predicts every patch and masks the sum.

    >>> import torch
    >>> images, ids = torch.ones(1, 1, 4, 4), torch.tensor([[1, 3]])
    >>> MAELoss(patch=2)(torch.full((1, 2, 4), 0.5), images, ids).item()
    0.25
    """

    def __init__(self, patch: int | tuple[int, int], norm_pix: bool = True) -> None:
        super().__init__()
        self.patch, self.norm_pix = patch, norm_pix

    def forward(self, pred: Tensor, images: Tensor, masked_ids: Tensor) -> Tensor:
        if masked_ids.numel() == 0:
            got = tuple(masked_ids.shape)
            raise ValueError(f"masked_ids must name at least one hidden patch, got shape {got}")
        return patch_mse(pred, images, masked_ids, self.patch, norm_pix=self.norm_pix).mean()

    def extra_repr(self) -> str:
        return f"patch={self.patch}, norm_pix={self.norm_pix}"
