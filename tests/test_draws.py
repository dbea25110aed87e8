import pytest
import torch

from fastssl.random import hashes, uniform


def test_uniform_is_uniform():
    u = uniform(torch.arange(2000), 50)
    assert u.dtype == torch.float32 and 0 <= u.min() and u.max() < 1
    assert u.mean().item() == pytest.approx(0.5, abs=3e-3)
    assert u.var().item() == pytest.approx(1 / 12, abs=1e-3)
    counts = torch.histc(u, 20, 0, 1)
    assert ((counts - 5000).square() / 5000).sum() < 44  # chi squared, 19 degrees: 1 in 1000
    pairs = torch.corrcoef(u.T) - torch.eye(50)
    assert pairs.abs().max() < 0.11


def test_a_sample_draws_the_same_in_any_batch():
    seeds = torch.tensor([5, -3, 2**62, 5])
    u = uniform(seeds, 4)
    assert torch.equal(u[0], u[3]) and torch.equal(u[1:2], uniform(seeds[1:2], 4))
    assert torch.equal(u[:, :2], uniform(seeds, 2))
    assert hashes(seeds, 4).unique().numel() == 12


def test_the_words_of_splitmix64():
    """Known outputs of the generator at state 0, whose first hash is of state mix(0) = 0."""
    want = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    got = [word % 2**64 for word in hashes(torch.tensor([0]), 3)[0].tolist()]
    assert got == want


@pytest.mark.parametrize("seeds", [torch.zeros(3), torch.zeros(2, 2, dtype=torch.int64)])
def test_refuses_other_seeds(seeds):
    with pytest.raises(ValueError, match=r"seeds must be \(B,\) int64, got"):
        uniform(seeds, 2)
