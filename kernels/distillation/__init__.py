"""Losses of a student that predicts its teacher's distribution over prototypes."""

from .linear import linear_soft_cross_entropy
from .sinkhorn import linear_sinkhorn, sinkhorn
from .soft import check_soft, soft_cross_entropy, soft_cross_entropy_ahead

__all__ = [
    "check_soft",
    "linear_sinkhorn",
    "linear_soft_cross_entropy",
    "sinkhorn",
    "soft_cross_entropy",
    "soft_cross_entropy_ahead",
]
