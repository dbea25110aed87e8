"""Where every random number comes from: a hash of what it is for, the same on every device.

    mix(a, b, ...) = f(f(f(0, a), b), ...)        f(h, p) = finish((h xor p) + gamma)
    hashes(s)_l    = finish(finish(s) + (l + 1) gamma)        for each place l

with finish the finalizer of SplitMix64.  A key such as (seed, epoch, index) becomes 64 well-mixed
bits, with no generator state: nothing to checkpoint, nothing that depends on the worker, the rank,
the batch or the machine.  `mix` is numpy's, for keys on the host; `hashes` torch's, for seeds (B,)
on any device.  Keys of different use start with a different tag, so that the order of an epoch says
nothing of its crops.
Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", figures 15-17.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:  # the losses draw by `uniform`, and need torch alone
    import numpy as np
    import numpy.typing as npt

ORDER, SAMPLE, REPLACE, SPLIT, EVALUATE, RESUME = 1, 2, 3, 4, 5, 6  # the tags


def _signed(word: int) -> int:
    """A 64-bit word as int64 holds it."""
    return word - (1 << 64) if word >> 63 else word


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX1 = _signed(0xBF58476D1CE4E5B9)
_MIX2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Any, bits: int) -> Any:
    """Logical shift: int64's own copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def finish(x: Any) -> Any:
    """SplitMix64's finalizer, a bijection of 64-bit words in an int64 tensor or array of at least
    one dimension, whose products wrap, as it needs."""
    x = (x ^ _shift_right(x, 30)) * _MIX1
    x = (x ^ _shift_right(x, 27)) * _MIX2
    return x ^ _shift_right(x, 31)


def hashes(seeds: Tensor, length: int) -> Tensor:
    """(B, length) int64, any of the 2^64 words equally likely; seeds (B,) int64, any values."""
    places = torch.arange(1, length + 1, device=seeds.device)
    return finish(finish(seeds)[:, None] + places * _GAMMA)


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


def mix(*parts: int | npt.ArrayLike) -> np.ndarray:
    """64 bits a key, uint64 of the broadcast shape of `parts` (integers or integer arrays).

    >>> [hex(h) for h in mix(0, [1, 2])]
    ['0x8b4fda8c892b50e', '0xd7cc9674ff5ffa39']
    """
    import numpy as np

    h = np.zeros(1, np.int64)
    for part in parts:  # arrays of at least one dimension wrap around; numpy's scalars would warn
        word = _signed(part % 2**64) if isinstance(part, int) else np.asarray(part, np.int64)
        h = finish((h ^ word) + _GAMMA)
    return h.view(np.uint64)


def sample_seeds(run_seed: int, epoch: npt.ArrayLike, index: npt.ArrayLike) -> np.ndarray:
    """The seeds of samples, (B,) int64 and not negative, from their epochs and indices (B,)."""
    return (mix(SAMPLE, run_seed, epoch, index) >> 1).astype("int64")


def sample_seed(run_seed: int, epoch: int, index: int) -> int:
    """The seed of one sample: sample_seeds for a single index."""
    return int(sample_seeds(run_seed, epoch, index)[0])


def permutation(n: int, *key: int) -> np.ndarray:
    """A permutation of range(n), (n,) int64: the order of the hashes of (key, 0), (key, 1), ..."""
    import numpy as np

    return np.argsort(mix(*key, np.arange(n)), kind="stable")
