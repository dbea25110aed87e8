"""Losses of a student that predicts its teacher's distribution over prototypes."""

from .gram import gram_distance
from .linear import linear_soft_cross_entropy
from .nearest import Neighbors, nearest, nearest_reference
from .sinkhorn import linear_sinkhorn, sinkhorn
from .soft import check_soft, soft_cross_entropy, soft_cross_entropy_ahead

__all__ = [
    "Neighbors",
    "check_soft",
    "gram_distance",
    "linear_sinkhorn",
    "linear_soft_cross_entropy",
    "nearest",
    "nearest_reference",
    "sinkhorn",
    "soft_cross_entropy",
    "soft_cross_entropy_ahead",
]
