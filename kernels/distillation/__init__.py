"""Losses of a student that predicts its teacher's distribution over prototypes."""

from .sinkhorn import sinkhorn
from .soft import check_soft, soft_cross_entropy, soft_cross_entropy_ahead

__all__ = [
    "check_soft",
    "sinkhorn",
    "soft_cross_entropy",
    "soft_cross_entropy_ahead",
]
