"""The primitives, each written once: what it computes, its reference, its implementations."""

import warnings
from typing import Any

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
    standardize,
)
from .distillation import (
    gram_distance,
    linear_sinkhorn,
    linear_soft_cross_entropy,
    nearest,
    sinkhorn,
    soft_cross_entropy,
)
from .pairwise import (
    PairMask,
    different_group,
    exclude_self,
    exclude_self_and_pair,
    pairwise_lse,
    pairwise_lse_nested,
    pairwise_sigmoid,
    pairwise_topk,
    same_group,
)
from .patches import Normalized, gather_patches, patch_mse
from .regression import chamfer, scaled_cosine_error
from .tokens import gather_bias, gather_packed, gather_tokens, restore_tokens, scatter_tokens

__all__ = [
    "Correlation",
    "Mixed",
    "Moments",
    "Normalized",
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
    "gram_distance",
    "implementations",
    "mixed_correlation",
    "linear_sinkhorn",
    "linear_soft_cross_entropy",
    "nearest",
    "pairwise_lse",
    "pairwise_lse_nested",
    "pairwise_sigmoid",
    "pairwise_topk",
    "patch_mse",
    "restore_tokens",
    "same_group",
    "scaled_cosine_error",
    "scatter_tokens",
    "sinkhorn",
    "soft_cross_entropy",
    "standardize",
]

_RENAMED = {"standardise": "standardize", "Normalised": "Normalized"}  # old: new


def __getattr__(name: str) -> Any:
    """The names of before, with a warning."""
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    new = _RENAMED[name]
    warnings.warn(f"fastssl.kernels.{name} is now called {new}", DeprecationWarning, stacklevel=2)
    return globals()[new]
