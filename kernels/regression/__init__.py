"""Errors of predicted latents and points."""

from .chamfer import chamfer
from .cosine import scaled_cosine_error

__all__ = [
    "chamfer",
    "scaled_cosine_error",
]
