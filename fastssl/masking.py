"""Which patches a sample hides: pure functions of the sample's seed.

A mask comes from a counter-based hash, not from a generator: h_l = mix(mix(seed) + (l + 1) gamma)
for each place l, with mix the finaliser of SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable
pseudorandom number generators", figure 15), and the `keep` smallest hashes are visible.  The same
seed gives the same mask on every device and whatever the split over ranks, and there is no state
to checkpoint.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def _signed(word: int) -> int:
    """A 64-bit word as int64 holds it."""
    return word - (1 << 64) if word >> 63 else word


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX1 = _signed(0xBF58476D1CE4E5B9)
_MIX2 = _signed(0x94D049BB133111EB)


class Masking(NamedTuple):
    """visible (B, keep) and masked (B, L - keep): places, ascending.  restore (B, L): place l is
    token restore[b, l] of the joined sequence (visible, masked).  All int64."""

    visible: Tensor
    masked: Tensor
    restore: Tensor


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: int64's own copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, a bijection of 64-bit words; int64 products wrap, as it needs."""
    x = (x ^ _shift_right(x, 30)) * _MIX1
    x = (x ^ _shift_right(x, 27)) * _MIX2
    return x ^ _shift_right(x, 31)


def random_masking(seeds: Tensor, length: int, keep: int) -> Masking:
    """Keep `keep` of `length` places of each sample, every subset equally likely.

    seeds (B,) int64, one a sample, any values.  Returns Masking on the seeds' device.
    Raises ValueError for other seeds, and keep outside 1..length.
    Source: He et al. 2021, MAE, arXiv:2111.06377, section 3 "Masking".

    >>> mask = random_masking(torch.tensor([7]), length=4, keep=1)
    >>> torch.cat([mask.visible, mask.masked], 1).gather(1, mask.restore).tolist()
    [[0, 1, 2, 3]]
    """
    if seeds.ndim != 1 or seeds.dtype != torch.int64:
        raise ValueError(f"seeds must be (B,) int64, got {tuple(seeds.shape)} {seeds.dtype}")
    if not 1 <= keep <= length:
        raise ValueError(f"keep must lie between 1 and length = {length}, got {keep}")
    places = torch.arange(1, length + 1, device=seeds.device)
    hashes = _mix(_mix(seeds)[:, None] + places * _GAMMA)
    ranks = _inverse(hashes.argsort(dim=1, stable=True))
    order = (ranks >= keep).to(torch.uint8).argsort(dim=1, stable=True)
    return Masking(order[:, :keep], order[:, keep:], _inverse(order))


def _inverse(order: Tensor) -> Tensor:
    """The inverse of each row's permutation."""
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)
