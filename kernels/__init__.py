"""The primitives, each written once: what it computes, its reference, its implementations."""

from ._dispatch import implementations
from .correlation import Moments, column_moments, cross_diagonal, frobenius_sq, standardise
from .masks import (
    PairMask,
    different_group,
    exclude_self,
    exclude_self_and_pair,
    same_group,
)
from .pairwise import pairwise_lse
from .pairwise_sigmoid import pairwise_sigmoid
from .patches import gather_patches, patch_mse
from .tokens import gather_tokens, restore_tokens
from .topk import pairwise_topk

__all__ = [
    "Moments",
    "PairMask",
    "column_moments",
    "cross_diagonal",
    "different_group",
    "exclude_self",
    "exclude_self_and_pair",
    "frobenius_sq",
    "gather_patches",
    "gather_tokens",
    "implementations",
    "pairwise_lse",
    "pairwise_sigmoid",
    "pairwise_topk",
    "patch_mse",
    "restore_tokens",
    "same_group",
    "standardise",
]
