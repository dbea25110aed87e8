"""The negative cosine of predictions and projections: SimSiam's and BYOL's."""

from __future__ import annotations

from collections.abc import Sequence

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


class SymNegCosineSimilarityLoss(NegativeCosineSimilarity):
    """The mean of -cos(p0, z1) and -cos(p1, z0), the projections z without gradient.

    Shapes   out0, out1: pairs (z, p) of a view's projection and prediction, (B, ..., D) all alike;
             any float dtype.
    Returns  scalar in the inputs' dtype, in -1..1.
    Raises   ValueError: what is not a pair.
    Ranks    as NegativeCosineSimilarity.
    Source   Chen & He 2020, arXiv:2011.10566, eq. 2 and 3; as lightly before 1.3 had it, without
             its warning.

    >>> z = torch.eye(2)
    >>> SymNegCosineSimilarityLoss()((z, z), (z, z)).item()
    -1.0
    """

    def __init__(self) -> None:
        super().__init__(dim=-1)

    def forward(self, out0: Sequence[Tensor], out1: Sequence[Tensor]) -> Tensor:  # pyright: ignore
        for name, pair in (("out0", out0), ("out1", out1)):
            if len(pair) != 2:
                raise ValueError(f"{name} must be a pair (z, p), got {len(pair)}")
        (z0, p0), (z1, p1) = out0, out1
        one, other = super().forward(p0, z1.detach()), super().forward(p1, z0.detach())
        return (one + other) / 2
