import math

import pytest
import torch

import fastssl.losses.dense
from fastssl.losses import DenseInfoNCELoss
from fastssl.losses.dense import dense_info_nce_reference
from tests.covering import pairwise
from tests.losses.views import assert_as_good
from tests.oracle import DEVICE, UPSTREAM, grads, largest_tensor, saved_elements


def maps(B, L, M, D):
    torch.manual_seed(L)
    z = torch.randn(B, max(L, M), D, device=DEVICE)
    return [(z + 0.5 * torch.randn_like(z))[:, :n] for n in (L, M)]


def matches(B, L, M):
    """For each position one of the other view, or none: below 0 or past the end."""
    return torch.randint(-2, M + 2, (B, L), generator=torch.Generator().manual_seed(M)).to(DEVICE)


@pytest.mark.parametrize(
    **pairwise(
        {
            "B, L, M, D": [(1, 2, 1, 3), (2, 3, 2, 4), (5, 9, 7, 4)],  # 0, 1 or more others
            "negatives": ["image", "batch"],
            "temperature": [0.5, 0.07],
            "reduce": UPSTREAM,
            "few": [True, False],
        }
    )
)
def test_the_formula(B, L, M, D, negatives, temperature, reduce, few, monkeypatch):
    monkeypatch.setattr(fastssl.losses.dense, "SCORES", 2 * L * M if few else 2**22)
    match = matches(B, L, M)
    match[0, 0] = 0
    loss = DenseInfoNCELoss(temperature, negatives)
    assert_as_good(
        lambda a, b: loss(a, b, match),
        lambda a, b: dense_info_nce_reference(a, b, match, temperature, negatives),
        maps(B, L, M, D),
        reduce,
        score=1 / temperature,
    )


@pytest.mark.parametrize("negatives", ["image", "batch"])
def test_positions_match_themselves_by_default(negatives):
    z0, z1 = maps(3, 6, 6, 4)
    loss = DenseInfoNCELoss(0.2, negatives)
    itself = torch.arange(6, device=DEVICE).expand(3, 6)
    torch.testing.assert_close(loss(z0, z1), loss(z0, z1, itself))
    assert loss(z0, z1, itself.flip(1)) > loss(z0, z1)


@pytest.mark.parametrize("negatives, others", [("image", 6), ("batch", 18)])
def test_known_values(negatives, others):
    same = torch.ones(3, 6, 4, device=DEVICE)
    loss = DenseInfoNCELoss(0.2, negatives)
    assert loss(same, same).item() == pytest.approx(math.log(others), rel=1e-6)
    nowhere = torch.full((3, 6), -1, device=DEVICE)
    value, *found = grads(lambda a, b: loss(a, b, nowhere), maps(3, 6, 6, 4))
    assert value == 0 and not any(g.any() for g in found)


def test_images_are_apart():
    z0, z1 = maps(4, 6, 6, 3)
    changed = z1.clone()
    changed[3] = torch.randn(6, 3, device=DEVICE)
    match = torch.arange(6, device=DEVICE).repeat(4, 1)
    match[3] = -1
    loss = DenseInfoNCELoss()
    assert torch.equal(loss(z0, z1, match), loss(z0, changed, match))
    across = DenseInfoNCELoss(negatives="batch")
    assert not torch.equal(across(z0, z1, match), across(z0, changed, match))


def test_a_near_perfect_match_keeps_its_digits():
    z = (torch.eye(6, device=DEVICE) + 1e-3).expand(2, 6, 6)
    for negatives in ("image", "batch"):
        loss = DenseInfoNCELoss(0.05, negatives)
        z1 = z.clone()
        z1[1] *= -1
        match = torch.arange(6, device=DEVICE).repeat(2, 1)
        match[1] = -1
        truth = loss(z.double(), z1.double(), match)
        assert 0 < truth < 1e-6
        torch.testing.assert_close(loss(z, z1, match).double(), truth, rtol=1e-5, atol=0)


def test_memory_is_that_of_a_few_images(monkeypatch):
    monkeypatch.setattr(fastssl.losses.dense, "SCORES", 3 * 80 * 80)
    inputs = [z.requires_grad_() for z in maps(30, 80, 80, 4)]

    def step():
        DenseInfoNCELoss()(*inputs).backward()

    assert largest_tensor(step) <= 3 * 80 * 80
    assert saved_elements(lambda: DenseInfoNCELoss()(*inputs)) < 30 * 80 * 80 / 2


def test_refuses_negatives():
    with pytest.raises(ValueError, match="negatives must be 'image' or 'batch', got 'all'"):
        DenseInfoNCELoss(negatives="all")


@pytest.mark.parametrize(
    "z0, z1, words",
    [
        (torch.ones(2, 3), torch.ones(2, 3), r"z0 must be \(B, L, D\)"),
        (torch.ones(2, 3, 4), torch.ones(2, 0, 4), r"z1 must be \(B, M, D\), none of them empty"),
        (torch.ones(2, 3, 4), torch.ones(3, 3, 4), r"must be \(B, L, D\) and \(B, M, D\), got"),
        (torch.ones(2, 3, 4), torch.ones(2, 3, 5), r"must be \(B, L, D\) and \(B, M, D\), got"),
        (torch.ones(2, 3, 4), torch.ones(2, 3, 4).double(), "must share dtype and device, got"),
        (torch.ones(2, 3, 4).int(), torch.ones(2, 3, 4), "z0 must be floating-point"),
        (torch.ones(2, 3, 4), torch.ones(2, 5, 4), "without match L must be M, got 3 and 5"),
    ],
)
def test_refuses_maps(z0, z1, words):
    with pytest.raises(ValueError, match=words):
        DenseInfoNCELoss()(z0, z1)


@pytest.mark.parametrize(
    "match", [torch.zeros(2, 3), torch.zeros(2, 5).long(), torch.zeros(3).long()]
)
def test_refuses_matches(match):
    with pytest.raises(ValueError, match=r"match must be \(2, 3\) integers on cpu, got"):
        DenseInfoNCELoss()(torch.ones(2, 3, 4), torch.ones(2, 5, 4), match)
