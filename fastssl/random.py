"""Random numbers that are pure functions of a sample's seed, the same on every device.

They come from a counter-based hash, not from a generator: h_l = mix(mix(seed) + (l + 1) gamma) for
each place l, with mix the finaliser of SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable
pseudorandom number generators", figure 15).  A sample's numbers do not depend on the batch it is
in, and there is no state to checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(word: int) -> int:
    """A 64-bit word as int64 holds it."""
    return word - (1 << 64) if word >> 63 else word


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX1 = _signed(0xBF58476D1CE4E5B9)
_MIX2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: int64's own copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, a bijection of 64-bit words; int64 products wrap, as it needs."""
    x = (x ^ _shift_right(x, 30)) * _MIX1
    x = (x ^ _shift_right(x, 27)) * _MIX2
    return x ^ _shift_right(x, 31)


def hashes(seeds: Tensor, length: int) -> Tensor:
    """(B, length) int64, any of the 2^64 words equally likely; seeds (B,) int64, any values."""
    places = torch.arange(1, length + 1, device=seeds.device)
    return mix(mix(seeds)[:, None] + places * _GAMMA)


def uniform(seeds: Tensor, length: int) -> Tensor:
    """(B, length) float32 in [0, 1), multiples of 2^-24; seeds (B,) int64, any values.

    Raises ValueError for other seeds.

    >>> draws = uniform(torch.tensor([7, 8]), 3)
    >>> draws.shape, bool((draws[1] == uniform(torch.tensor([8]), 3)).all())
    (torch.Size([2, 3]), True)
    """
    if seeds.ndim != 1 or seeds.dtype != torch.int64:
        raise ValueError(f"seeds must be (B,) int64, got {tuple(seeds.shape)} {seeds.dtype}")
    return _shift_right(hashes(seeds, length), 40).float() * 2.0**-24
