"""Patches straight from pixels: chosen ones, and the error of predicting them."""

from .patches import Normalized, gather_patches, patch_mse

__all__ = [
    "Normalized",
    "gather_patches",
    "patch_mse",
]
