"""Statistics of columns over the joined batch, and the size of cross-correlations."""

from .correlation import Correlation, correlation_plan, cross_correlation, frobenius_sq
from .mixed import Mixed, mixed_correlation
from .moments import Moments, column_moments, cross_diagonal, standardize

__all__ = [
    "Correlation",
    "Mixed",
    "Moments",
    "column_moments",
    "correlation_plan",
    "cross_correlation",
    "cross_diagonal",
    "frobenius_sq",
    "mixed_correlation",
    "standardize",
]
