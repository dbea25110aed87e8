"""Losses of predicted latents and of predicted points."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.kernels import chamfer, gather_tokens, scaled_cosine_error
from fastssl.kernels.common import accumulator, full_precision
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


class VJEPALoss(Loss):
    """Predict the teacher's layer-normed features of the hidden places: mean |pred - target|^p / p.

    The formula is `vjepa_reference`, over the chosen rows.

    Shapes   pred (B, K, D), target (B, L, D) as the teacher made it, any float dtype each, and ids
             (B, K) int64: the hidden places; without ids K = L.  Or sequences of pred and of ids, a
             mask each: the mean over masks, however many places each has.
    Returns  scalar float32, 0 <= loss.  The gradient goes to pred alone.
    Raises   ValueError: shapes that disagree, ids that are no places, as many pred as ids, p < 1.
    Ranks    no collective: with as many places on every rank, averaging gradients is exact.
    Source   Bardes et al. 2024, V-JEPA, arXiv:2404.08471, eq. 1, and Assran et al. 2025, V-JEPA 2,
             arXiv:2506.09985: p = 1.

    >>> target = torch.tensor([[[1.0, 3.0], [5.0, 9.0]]])  # normed: -1, 1 both
    >>> pred = torch.tensor([[[0.0, 1.0]]])
    >>> round(VJEPALoss()(pred, target, torch.tensor([[1]])).item(), 4)
    0.5
    """

    shown = ("p",)

    def __init__(self, p: float = 1.0) -> None:
        super().__init__()
        check_positive(p=p)
        if p < 1:
            raise ValueError(f"p must be >= 1, got {p}")
        self.p = p

    def forward(
        self,
        pred: Tensor | Sequence[Tensor],
        target: Tensor,
        ids: Tensor | Sequence[Tensor] | None = None,
    ) -> Tensor:
        preds = [pred] if isinstance(pred, Tensor) else list(pred)
        places = [ids] * len(preds) if ids is None or isinstance(ids, Tensor) else list(ids)
        if not preds or len(preds) != len(places):
            raise ValueError(f"pred must be as many as ids, got {len(preds)} and {len(places)}")
        terms = [self._term(x, target.detach(), at) for x, at in zip(preds, places, strict=True)]
        return torch.stack(terms).mean()

    def _term(self, pred: Tensor, target: Tensor, ids: Tensor | None) -> Tensor:
        if ids is not None:
            target = gather_tokens(target, ids)
        if pred.ndim != 3 or 0 in pred.shape or pred.shape != target.shape:
            got = f"{tuple(pred.shape)} for targets {tuple(target.shape)}"
            raise ValueError(f"pred must be (B, K, D) as the chosen targets, none empty, got {got}")
        for name, x in (("pred", pred), ("target", target)):
            if not x.is_floating_point():
                raise ValueError(f"{name} must be floating-point, got {x.dtype}")
        acc = accumulator(pred.dtype)
        with full_precision(pred.device):
            t = F.layer_norm(target.to(acc), target.shape[-1:])
            if self.p in (1, 2):
                rho = F.l1_loss if self.p == 1 else F.mse_loss
                return rho(pred.to(acc), t) / self.p
            return (pred.to(acc) - t).abs().pow(self.p).mean() / self.p


def vjepa_reference(pred: Tensor, target: Tensor, p: float = 1.0) -> Tensor:
    """The formula of features pred and target of the same places."""
    t = target - target.mean(-1, keepdim=True)
    t = t / (t.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return (pred - t).abs().pow(p).mean() / p


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
