"""The negative cosine of predictions and projections: SimSiam's and BYOL's."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.losses._checks import check_not_negative
from fastssl.losses._loss import Loss


class NegativeCosineSimilarity(Loss):
    """-cos(x0, x1) along dim, averaged.

    Shapes   x0, x1 alike, or that broadcast; any float dtype.  Gradient to both: detach a target.
    Returns  scalar in the inputs' dtype, in -1..1.
    Raises   ValueError: eps < 0.
    Ranks    no collective: with as many rows on every rank, averaging gradients is exact.
    Source   Chen & He 2020, arXiv:2011.10566, eq. 1; as lightly.loss.NegativeCosineSimilarity.

    >>> round(NegativeCosineSimilarity()(torch.eye(2), 3 * torch.eye(2)).item(), 4)
    -1.0
    """

    shown = ("dim", "eps")

    def __init__(self, dim: int = 1, eps: float = 1e-8) -> None:
        super().__init__()
        check_not_negative(eps=eps)
        self.dim, self.eps = dim, eps

    def forward(self, x0: Tensor, x1: Tensor) -> Tensor:
        return -torch.cosine_similarity(x0, x1, self.dim, self.eps).mean()
