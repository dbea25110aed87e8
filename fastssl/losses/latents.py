"""Losses of predicted latents and of predicted points."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.kernels import chamfer, scaled_cosine_error
from fastssl.losses._checks import check_positive
from fastssl.losses._loss import Loss


class ScaledCosineLoss(Loss):
    """Predict the features of the hidden places, by direction.

    The formula is `scaled_cosine_reference`, over the chosen rows.

    Shapes   pred, target (N, D), or (B, L, D) with ids (B, K) int64: the hidden places, each at
             most once; without ids every row counts.  gamma >= 1: what is nearly right counts less.
    Returns  scalar float32, in 0..2^gamma.  Gradients to pred and target.
    Raises   ValueError: no row at all and everything scaled_cosine_error refuses.
    Ranks    no collective: with as many rows on every rank, averaging gradients is exact.
    Source   Hou et al. 2022, GraphMAE, arXiv:2205.10803, eq. 2.

    >>> pred, target = torch.tensor([[1.0, 0], [0, 2]]), torch.tensor([[3.0, 0], [4, 0]])
    >>> ScaledCosineLoss(gamma=3.0)(pred, target).item()
    0.5
    """

    shown = ("gamma",)

    def __init__(self, gamma: float = 2.0) -> None:
        super().__init__()
        check_positive(gamma=gamma)
        if gamma < 1:
            raise ValueError(f"gamma must be >= 1, got {gamma}")
        self.gamma = gamma

    def forward(self, pred: Tensor, target: Tensor, ids: Tensor | None = None) -> Tensor:
        errors = scaled_cosine_error(pred, target, ids, gamma=self.gamma)
        if errors.numel() == 0:
            raise ValueError(f"pred must have at least one chosen row, got {tuple(errors.shape)}")
        return errors.mean()


class ChamferLoss(Loss):
    """Predict the points of the hidden groups, in whatever order.

        "l2"  loss = mean over groups of mean_n min_m |p_n - t_m|^2 + mean_m min_n |p_n - t_m|^2
        "l1"  the same of distances instead of their squares, halved

    Shapes   pred (G, N, D), target (G, M, D), D <= 8: the predicted and the true points of each of
             G groups, for example all hidden groups of a batch; or (B, K, N, D) and (B, K, M, D).
    Returns  scalar float32, 0 <= loss, in the points' unit squared ("l2") or their unit ("l1").
             Gradients to pred and target.
    Raises   ValueError: no group at all and everything chamfer refuses.
    Ranks    no collective: with as many groups on every rank, averaging gradients is exact.
    Source   Pang et al. 2022, Point-MAE, arXiv:2203.06604, section 3.3 ("l2").

    >>> ChamferLoss()(torch.zeros(1, 2, 3), torch.ones(1, 4, 3)).item()
    6.0
    """

    shown = ("kind",)

    def __init__(self, kind: str = "l2") -> None:
        super().__init__()
        if kind not in ("l2", "l1"):
            raise ValueError(f"kind must be 'l2' or 'l1', got {kind!r}")
        self.kind = kind

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        if pred.ndim == target.ndim == 4 and pred.shape[:2] == target.shape[:2]:
            pred, target = pred.flatten(0, 1), target.flatten(0, 1)
        distances = chamfer(pred, target, kind=self.kind)
        if distances.numel() == 0:
            raise ValueError(f"pred must have at least one group, got {tuple(pred.shape)}")
        return distances.mean()


def scaled_cosine_reference(pred: Tensor, target: Tensor, gamma: float) -> Tensor:
    """The formula, of rows (N, D) that all count."""
    cos = (F.normalize(pred, dim=-1) * F.normalize(target, dim=-1)).sum(-1)
    return (1 - cos).pow(gamma).mean()


def chamfer_reference(pred: Tensor, target: Tensor, kind: str) -> Tensor:
    """The formula, all (G, N, M) distances at once."""
    differences = pred[:, :, None] - target[:, None]
    if kind == "l2":
        far = differences.square().sum(-1)
        return far.amin(2).mean() + far.amin(1).mean()
    far = torch.linalg.vector_norm(differences, dim=-1)
    return (far.amin(2).mean() + far.amin(1).mean()) / 2
