"""Triton's log-sum-exps of symmetric scores by half the tiles, where the scores are bounded."""

import math

import pytest
import torch

from fastssl.kernels import exclude_self, same_group
from fastssl.kernels.pairwise import lse_triton, symmetric_triton
from fastssl.kernels.pairwise.lse import pairwise_lse_reference
from fastssl.kernels.pairwise.lse_torch import Pairs
from fastssl.kernels.pairwise.masks import as_masks
from fastssl.kernels.pairwise.scores_triton import BOUND, log_sum
from tests.oracle import DEVICE

pytestmark = pytest.mark.usefixtures("small_blocks")
LOG2_E = 1 / math.log(2)
MASKS = {"all": lambda n: None, "self": lambda n: exclude_self}
MASKS["ids"] = lambda n: exclude_self(torch.arange(n, device=DEVICE) // 3)
MASKS["group"] = lambda n: same_group(torch.arange(n, device=DEVICE) // 20)


def unit(n, dtype=torch.bfloat16, d=5):
    torch.manual_seed(n)
    return torch.nn.functional.normalize(torch.randn(n, d, device=DEVICE)).to(dtype)


def pairs_of(x, scale, mask=None):
    masks = as_masks(mask)
    size = torch.full((), float(scale), device=DEVICE)
    return Pairs(x, x, size, None, *masks.ids(), masks.key, True)


def poisoned(most):
    return torch.full((2, 1), torch.nan, device=DEVICE)


@pytest.mark.parametrize("scale", [20.0, -7.0, 0.0])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 7, 16, 29, 40, 61, 96, 111])  # 1 to 7 blocks, full and not
def test_half_the_tiles_make_every_row(n, dtype, mask, scale):
    x, kept = unit(n, dtype), MASKS[mask](n)
    found = symmetric_triton.statistics(pairs_of(x, scale, kept), poisoned)
    expected = pairwise_lse_reference(x.double(), x.double(), scale, kept)
    torch.testing.assert_close(log_sum(found), expected.float(), rtol=2e-6, atol=2e-5)
    m, total = found
    assert (m[total > 0] <= expected[total > 0] * LOG2_E + 1.001).all() and (total < 1).all()


@pytest.mark.parametrize("within", [True, False])
def test_what_is_not_bounded_is_left_to_the_other_launch(within):
    """And nothing is computed twice."""
    x = unit(70)
    length = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).amax()
    scale = BOUND.value / LOG2_E / length**2 * (0.999 if within else 1.001)
    asked = []

    def general(most):
        asked.append(most)
        return lse_triton.forward(pairs_of(x, scale), most=most)

    found = symmetric_triton.statistics(pairs_of(x, scale), general)
    assert (asked[0] <= BOUND.value) == within
    other = general(asked[0])  # of new memory, which is nan
    assert other.isnan().all() == within
    sums = symmetric_triton.half(pairs_of(x, scale), asked[0])
    assert sums.isnan().all() != within
    expected = pairwise_lse_reference(x.double(), x.double(), scale)
    torch.testing.assert_close(log_sum(found), expected.float(), rtol=2e-6, atol=2e-5)


def test_a_nan_is_not_bounded():
    x = unit(40)
    x[17, 2] = torch.nan
    found = symmetric_triton.statistics(pairs_of(x, 5.0), lambda most: torch.full((2, 40), 7.0))
    assert (found == 7).all()


def test_few_pairs_wide_rows_and_other_dtypes_go_by_all_tiles(monkeypatch):
    x = unit(40)
    assert symmetric_triton.fits(pairs_of(x, 1.0))
    two = pairs_of(x, 1.0)._replace(k=x.clone(), same=False)
    others = [two, pairs_of(x.float(), 1.0), pairs_of(unit(40, d=17), 1.0)]
    others += [pairs_of(unit(40, d=257), 1.0)]
    assert not any(map(symmetric_triton.fits, others))
    monkeypatch.setattr(symmetric_triton, "HALF_FROM", 40**2 + 1)
    assert not symmetric_triton.fits(pairs_of(x, 1.0))
