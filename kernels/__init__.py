"""The primitives, each written once: what it computes, its reference, its implementations."""

from ._dispatch import implementations
from .bias import gather_bias
from .chamfer import chamfer
from .correlation import Correlation, correlation_plan, cross_correlation, frobenius_sq
from .correlation_mixed import Mixed, mixed_correlation
from .latents import scaled_cosine_error
from .masks import (
    PairMask,
    different_group,
    exclude_self,
    exclude_self_and_pair,
    same_group,
)
from .moments import Moments, column_moments, cross_diagonal, standardise
from .pairwise import pairwise_lse
from .pairwise_sigmoid import pairwise_sigmoid
from .patches import Normalised, gather_patches, patch_mse
from .tokens import gather_packed, gather_tokens, restore_tokens, scatter_tokens
from .topk import pairwise_topk

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
