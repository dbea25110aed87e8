"""Tokens in and out of masked sequences, and their attention bias."""

from .bias import gather_bias
from .tokens import gather_packed, gather_tokens, restore_tokens, scatter_tokens

__all__ = [
    "gather_bias",
    "gather_packed",
    "gather_tokens",
    "restore_tokens",
    "scatter_tokens",
]
