"""Where every random number of the data path comes from: a hash of what it is for.

    mix(a, b, ...) = f(f(f(0, a), b), ...),  f(h, p) = splitmix64's finaliser of (h xor p) + golden

A key such as (seed, epoch, index) becomes 64 well-mixed bits, with no generator state: nothing to
checkpoint, nothing that depends on the worker, the rank or the machine.  Keys of different use
start with a different tag, so that the order of an epoch says nothing of its crops.
Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", figure 17.
"""

import numpy as np
import numpy.typing as npt

ORDER, SAMPLE, REPLACE, SPLIT, EVALUATE = 1, 2, 3, 4, 5  # the tags
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1


def _words(part: int | npt.ArrayLike) -> np.ndarray:
    if isinstance(part, int):
        return np.array([part & _MASK], np.uint64)
    return np.atleast_1d(np.asarray(part, np.int64)).astype(np.uint64)


def mix(*parts: int | npt.ArrayLike) -> np.ndarray:
    """64 bits a key, uint64 of the broadcast shape of `parts` (integers or integer arrays).

    >>> [hex(h) for h in mix(0, [1, 2])]
    ['0x8b4fda8c892b50e', '0xd7cc9674ff5ffa39']
    """
    h = np.zeros(1, np.uint64)
    for part in parts:  # arrays of at least one dimension wrap around; numpy's scalars would warn
        h = (h ^ _words(part)) + _GOLDEN
        h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        h = h ^ (h >> np.uint64(31))
    return h


def sample_seeds(run_seed: int, epoch: npt.ArrayLike, index: npt.ArrayLike) -> np.ndarray:
    """The seeds of samples, (B,) int64 and not negative, from their epochs and indices (B,)."""
    return (mix(SAMPLE, run_seed, epoch, index) >> np.uint64(1)).astype(np.int64)


def sample_seed(run_seed: int, epoch: int, index: int) -> int:
    """The seed of one sample: sample_seeds for a single index."""
    return int(sample_seeds(run_seed, epoch, index)[0])


def permutation(n: int, *key: int) -> np.ndarray:
    """A permutation of range(n), (n,) int64: the order of the hashes of (key, 0), (key, 1), ..."""
    return np.argsort(mix(*key, np.arange(n)), kind="stable")
