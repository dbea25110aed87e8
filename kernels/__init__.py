"""The primitives, each written once: what it computes, its reference, its implementations."""

from .common import implementations
from .correlation import (
    Correlation,
    Mixed,
    Moments,
    column_moments,
    correlation_plan,
    cross_correlation,
    cross_diagonal,
    frobenius_sq,
    mixed_correlation,
    standardise,
)
from .pairwise import (
    PairMask,
    different_group,
    exclude_self,
    exclude_self_and_pair,
    pairwise_lse,
    pairwise_sigmoid,
    pairwise_topk,
    same_group,
)
from .patches import Normalised, gather_patches, patch_mse
from .regression import chamfer, scaled_cosine_error
from .tokens import gather_bias, gather_packed, gather_tokens, restore_tokens, scatter_tokens

__all__ = [
    "Correlation",
    "Mixed",
    "Moments",
    "Normalised",
    "PairMask",
    "chamfer",
    "column_moments",
    "correlation_plan",
    "cross_correlation",
    "cross_diagonal",
    "different_group",
    "exclude_self",
    "exclude_self_and_pair",
    "frobenius_sq",
    "gather_bias",
    "gather_packed",
    "gather_patches",
    "gather_tokens",
    "implementations",
    "mixed_correlation",
    "pairwise_lse",
    "pairwise_sigmoid",
    "pairwise_topk",
    "patch_mse",
    "restore_tokens",
    "same_group",
    "scaled_cosine_error",
    "scatter_tokens",
    "standardise",
]
