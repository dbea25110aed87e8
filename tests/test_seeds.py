"""The hash behind every random number: against the published generator, and as a permutation."""

import numpy as np
import pytest

from fastssl.random import mix, permutation, sample_seed, sample_seeds

MASK = (1 << 64) - 1


def splitmix64(state: int) -> int:
    """One output in Python's integers, written from the paper."""
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


@pytest.mark.parametrize("key", [(0,), (1, 2, 3), (7, -1, 2**62), (2**64 - 1, 5)])
def test_mix_is_splitmix64_chained(key):
    h = 0
    for part in key:
        h = splitmix64(h ^ (part & MASK))
    assert mix(*key).tolist() == [h]


def test_known_value():
    assert int(mix(0)[0]) == 0xE220A8397B1DCDAF  # the first output of splitmix64 from state 0


def test_sample_seed_is_the_hash_of_its_key():
    h = 0
    for part in (2, 5, 3, 7):  # the tag of samples, then seed, epoch, index
        h = splitmix64(h ^ part)
    assert sample_seed(5, 3, 7) == h >> 1


def test_vectorized_equals_scalar_and_is_not_negative():
    index = np.arange(2000)
    seeds = sample_seeds(5, 3, index)
    assert seeds.dtype == np.int64 and seeds.min() >= 0
    assert seeds.tolist() == [sample_seed(5, 3, i) for i in range(2000)]
    mixed = sample_seeds(5, np.array([3, 4]), np.array([7, 7]))
    assert mixed.tolist() == [sample_seed(5, 3, 7), sample_seed(5, 4, 7)]


def test_seeds_differ_by_each_part_of_the_key():
    keys = [(s, e, i) for s in range(10) for e in range(10) for i in range(100)]
    assert len({sample_seed(*key) for key in keys}) == len(keys)


def test_bits_are_even():
    bits = np.unpackbits(mix(9, np.arange(20_000)).view(np.uint8)).reshape(-1, 64)
    assert np.abs(bits.mean(0) - 0.5).max() < 0.02  # five standard deviations are 0.018


def test_permutation_is_one_and_depends_on_the_key():
    a, b = permutation(1000, 1, 2), permutation(1000, 1, 3)
    assert sorted(a.tolist()) == list(range(1000))
    assert (a == permutation(1000, 1, 2)).all() and (a != b).any()
    assert (a == np.arange(1000)).sum() < 10  # one fixed point is expected


def test_every_place_is_as_likely():
    first = [int(permutation(8, 1, epoch)[0]) for epoch in range(4000)]
    counts = np.bincount(first, minlength=8)
    assert ((counts - 500) ** 2 / 500).sum() < 24.3  # chi-squared, 7 degrees, p = 0.001
