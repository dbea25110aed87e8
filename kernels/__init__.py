"""The primitives, each written once: what it computes, its reference, its implementations."""

from .common.dispatch import implementations
from .correlation.correlation import Correlation, correlation_plan, cross_correlation, frobenius_sq
from .correlation.mixed import Mixed, mixed_correlation
from .correlation.moments import Moments, column_moments, cross_diagonal, standardise
from .pairwise.lse import pairwise_lse
from .pairwise.masks import (
    PairMask,
    different_group,
    exclude_self,
    exclude_self_and_pair,
    same_group,
)
from .pairwise.sigmoid import pairwise_sigmoid
from .pairwise.topk import pairwise_topk
from .patches.patches import Normalised, gather_patches, patch_mse
from .regression.chamfer import chamfer
from .regression.cosine import scaled_cosine_error
from .tokens.bias import gather_bias
from .tokens.tokens import gather_packed, gather_tokens, restore_tokens, scatter_tokens

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
