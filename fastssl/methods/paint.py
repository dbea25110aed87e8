"""Predicted patches put back into their images, for the report's pictures.

images (B, C, *S), S of 1 to 3 sides   patch: one side each   g_i = S_i / p_i, L = prod g
"""

from math import prod

import torch
from torch import Tensor

from fastssl.kernels import gather_patches


def paint(images: Tensor, patches: Tensor, ids: Tensor, patch: tuple[int, ...]) -> Tensor:
    """`images` with the patches at `ids` (B, K) replaced by `patches` (B, K, prod(patch) C).

    >>> signal = torch.arange(4.0).view(1, 1, 4)
    >>> paint(signal, torch.tensor([[[8.0, 9.0]]]), torch.tensor([[1]]), (2,)).tolist()
    [[[0.0, 1.0, 8.0, 9.0]]]
    """
    n, (B, C) = len(patch), images.shape[:2]
    grid = [s // p for s, p in zip(images.shape[2:], patch, strict=True)]
    cut = images.reshape(B, C, *(side for pair in zip(grid, patch, strict=True) for side in pair))
    cells = cut.permute(0, *range(2, 2 + 2 * n, 2), *range(3, 3 + 2 * n, 2), 1)
    rows = cells.reshape(B, prod(grid), -1).clone()
    rows.scatter_(1, ids[..., None].expand_as(patches), patches.to(rows.dtype))
    whole = rows.reshape(cells.shape)
    back = (side for i in range(n) for side in (1 + i, 1 + n + i))
    return whole.permute(0, 1 + 2 * n, *back).reshape(images.shape)


def repainted(
    images: Tensor, prediction: Tensor, ids: Tensor, patch: tuple[int, ...], *, norm_pix: bool
) -> tuple[Tensor, Tensor]:
    """The images with the patches at `ids` grayed, and with them as predicted.

    norm_pix: the prediction is of contrast only, so each patch's own mean and deviation are put
    back, as in the MAE paper's figures.
    """
    truth = gather_patches(images, ids, patch).float()
    prediction = prediction.float()
    if norm_pix:
        std = (truth.var(-1, keepdim=True) + 1e-6).sqrt()
        prediction = prediction * std + truth.mean(-1, keepdim=True)
    gray = paint(images, torch.zeros_like(truth), ids, patch)
    return gray, paint(images, prediction, ids, patch)
