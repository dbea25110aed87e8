"""Patches straight from pixels: chosen ones, and the error of predicting them."""

from .patches import Normalised, gather_patches, patch_mse

__all__ = [
    "Normalised",
    "gather_patches",
    "patch_mse",
]
