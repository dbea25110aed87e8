import pytest
import torch

from fastssl.masking import random_masking
from tests.oracle import DEVICE


def seeds(n, start=0):
    return torch.arange(start, start + n, device=DEVICE)


@pytest.mark.parametrize("B, L, keep", [(1, 1, 1), (5, 9, 9), (4, 196, 49), (3, 7, 1)])
def test_places_and_their_inverse(B, L, keep):
    mask = random_masking(seeds(B), L, keep)
    shapes = [(B, keep), (B, L - keep), (B, L)]
    assert [tuple(x.shape) for x in mask] == shapes and {x.dtype for x in mask} == {torch.int64}
    order = torch.cat([mask.visible, mask.masked], 1)
    places = torch.arange(L, device=DEVICE).expand(B, L)
    assert torch.equal(order.sort(1).values, places)
    assert torch.equal(order.gather(1, mask.restore), places)
    for part in (mask.visible, mask.masked):
        assert (part.diff(dim=1) > 0).all()


def test_a_sample_keeps_its_mask_in_any_company():
    whole = random_masking(seeds(10), 30, 8)
    parts = [random_masking(s, 30, 8) for s in (seeds(3), seeds(7, start=3))]
    for a, b in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(a, torch.cat(b))


def test_known_masks():
    """Fixed for ever: a run resumed on another machine or version must hide the same places."""
    far = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63)], device=DEVICE)
    assert random_masking(far, 16, 4).visible.tolist() == [
        [12, 13, 14, 15],
        [5, 10, 11, 15],
        [0, 1, 8, 13],
        [0, 1, 5, 10],
        [6, 7, 11, 15],
    ]


def splitmix(word):
    """SplitMix64's finalizer in Python's own integers."""
    word &= 2**64 - 1
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return word ^ (word >> 31)


def test_hashes_are_those_of_splitmix64():
    for seed in (0, 1, 12345, -7):
        key = splitmix(seed)
        hashes = [splitmix(key + (place + 1) * 0x9E3779B97F4A7C15) for place in range(40)]
        signed = [h - 2**64 if h >> 63 else h for h in hashes]
        smallest = sorted(sorted(range(40), key=signed.__getitem__)[:11])
        got = random_masking(torch.tensor([seed], device=DEVICE), 40, 11)
        assert got.visible[0].tolist() == smallest


def shown(start, n=20_000, L=12, keep=3, step=1):
    """1.0 where a place is visible, for n neighboring seeds."""
    numbers = start + step * torch.arange(n, device=DEVICE)
    visible = random_masking(numbers, L, keep).visible
    return torch.zeros(n, L, device=DEVICE).scatter_(1, visible, 1.0)


@pytest.mark.parametrize(
    "step", [1, 2**32, 0x9E3779B97F4A7C15 - 2**64], ids=["1", "2**32", "gamma"]
)
def test_places_are_equally_likely_and_neighbors_independent(step):
    x = shown(0, step=step)
    p = 3 / 12
    deviation = (p * (1 - p) / len(x)) ** 0.5
    assert ((x.mean(0) - p).abs() < 4.5 * deviation).all()
    # Two places of one sample are drawn without replacement: 3/12 * 2/11.
    pairs = x.T @ x / len(x)
    pairs.fill_diagonal_(3 / 12 * 2 / 11)
    assert ((pairs - 3 / 12 * 2 / 11).abs() < 5 * (0.0455 / len(x)) ** 0.5).all()
    # Places of two neighboring samples know nothing of each other.
    across = x[:-1].T @ x[1:] / (len(x) - 1)
    assert ((across - p * p).abs() < 5 * (p * p * (1 - p * p) / len(x)) ** 0.5).all()


S = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    "args, words",
    [
        ((S.float(), 4, 2), r"seeds must be \(B,\) int64, got \(2,\) torch.float32"),
        ((S[None], 4, 2), r"got \(1, 2\)"),
        ((S, 4, 0), "keep must lie between 1 and length = 4, got 0"),
        ((S, 4, 5), "keep must lie between 1 and length = 4, got 5"),
    ],
)
def test_refuses(args, words):
    with pytest.raises(ValueError, match=words):
        random_masking(*args)
