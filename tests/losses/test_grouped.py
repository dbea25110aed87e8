import math

import pytest
import torch

from fastssl.losses import GroupedNTXentLoss, NTXentLoss
from fastssl.losses.grouped import grouped_ntxent_reference
from tests.covering import pairwise
from tests.losses.views import assert_as_good, views
from tests.oracle import DEVICE, UPSTREAM, grads


def groups_of(B, count):
    """Groups of any size and sign; the last image is alone in its own."""
    generator = torch.Generator().manual_seed(B)
    groups = torch.randint(count, (B,), generator=generator) * 10**12 - 3
    groups[-1] = 5
    return groups.to(DEVICE)


@pytest.mark.parametrize(
    **pairwise(
        {
            "B, D, count": [(7, 3, 2), (65, 16, 7)],
            "negatives": ["same", "different"],
            "temperature": [0.5, 0.05],
            "reduce": UPSTREAM,
        }
    )
)
def test_the_formula(B, D, count, negatives, temperature, reduce):
    groups = groups_of(B, count)
    loss = GroupedNTXentLoss(temperature, negatives)
    assert_as_good(
        lambda a, b: loss(a, b, groups),
        lambda a, b: grouped_ntxent_reference(a, b, groups, temperature, negatives),
        views(B, D),
        reduce,
        score=1 / temperature,
    )


@pytest.mark.parametrize("negatives, groups", [("same", "zeros"), ("different", "arange")])
def test_simclr_is_a_special_case(negatives, groups):
    inputs = [z.double() for z in views(30, 8)]
    ids = getattr(torch, groups)(30, dtype=torch.int64, device=DEVICE)
    ours = grads(lambda a, b: GroupedNTXentLoss(0.2, negatives)(a, b, ids), inputs)
    torch.testing.assert_close(ours, grads(NTXentLoss(0.2), inputs))


@pytest.mark.parametrize("negatives, groups", [("same", "arange"), ("different", "zeros")])
@pytest.mark.parametrize("B", [1, 6])
def test_rows_without_negatives_cost_nothing(B, negatives, groups):
    ids = getattr(torch, groups)(B, dtype=torch.int64, device=DEVICE)
    value, *found = grads(lambda a, b: GroupedNTXentLoss(0.2, negatives)(a, b, ids), views(B, 4))
    assert value == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in found)


def test_one_row_without_negatives_among_others():
    a, b = views(9, 4)
    groups = torch.zeros(9, dtype=torch.int64, device=DEVICE)
    groups[3] = 1
    value, *found = grads(lambda a, b: GroupedNTXentLoss()(a, b, groups), [a, b])
    assert value > 0 and all(g.isfinite().all() for g in found)
    assert all(not g[3].any() and g[4].any() for g in found)


def test_known_value():
    same = torch.ones(12, 4, device=DEVICE)
    groups = torch.arange(12, device=DEVICE) % 3
    assert GroupedNTXentLoss()(same, same, groups).item() == pytest.approx(math.log(7), rel=1e-6)
    different = GroupedNTXentLoss(negatives="different")
    assert different(same, same, groups).item() == pytest.approx(math.log(17), rel=1e-6)


@pytest.mark.parametrize(
    "groups", [torch.zeros(4), torch.zeros(3, dtype=torch.int64), torch.zeros(4, dtype=torch.bool)]
)
def test_refuses_groups(groups):
    with pytest.raises(ValueError, match=r"groups must be \(4,\) integers on cpu, got"):
        GroupedNTXentLoss()(torch.ones(4, 3), torch.ones(4, 3), groups)


def test_refuses_negatives():
    with pytest.raises(ValueError, match="negatives must be 'same' or 'different', got 'all'"):
        GroupedNTXentLoss(negatives="all")
