import pytest
import torch
from torch import nn

from fastssl.losses.groco import GroCoLoss, groco_reference, last_place_mass, sorting_matrix
from tests.covering import pairwise
from tests.losses.views import views
from tests.oracle import DEVICE, UPSTREAM, assert_no_worse, grads
from tests.ranks import run_ranks

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    **pairwise(
        {
            "B, D, n": [(2, 3, 1), (3, 4, 2), (13, 6, 5)],
            "steepness": [1, 5],
            "dtype": DTYPES,
            "reduce": UPSTREAM,
        }
    )
)
def test_the_authors_formula(B, D, n, steepness, dtype, reduce):
    assert_no_worse(
        GroCoLoss(n, steepness),
        lambda a, b: groco_reference(a, b, n, steepness),
        views(B, D, dtype),
        reduce,
    )


@pytest.mark.parametrize("n", range(1, 8))
def test_the_mass_is_the_matrixs_last_column(n):
    torch.manual_seed(n)
    x = torch.randn(5, n, dtype=torch.float64, device=DEVICE)
    want = sorting_matrix(x, 3.0)[:, :, -1]
    torch.testing.assert_close(last_place_mass(x, 3.0), want)
    torch.testing.assert_close(want.sum(1), torch.ones_like(want[:, 0]))


def test_a_steep_network_sorts():
    torch.manual_seed(0)
    x = torch.stack([torch.randperm(9) for _ in range(20)]).double().to(DEVICE)
    mass = last_place_mass(x, 1e9)
    torch.testing.assert_close(mass, (x == 8).double(), rtol=0, atol=1e-6)


def test_right_order_costs_nothing_and_wrong_order_much():
    images = torch.eye(12, device=DEVICE)
    right = GroCoLoss(5, 1e6)(images, images)
    assert 0 <= right < 1e-4
    alike = torch.ones(12, 12, device=DEVICE) + 0.1 * images  # negatives beside, positives opposite
    wrong = GroCoLoss(5, 1e6)(alike, -alike)
    assert wrong > 2 and wrong.isfinite()
    worst = grads(GroCoLoss(5, 1e12), [alike, -alike])  # masses of 0 and 1
    assert 2 < worst[0] < 88 and all(x.isfinite().all() for x in worst)
    order = [GroCoLoss(5)(images, images + c).item() for c in (0.0, 0.2, 1.0)]
    assert order == sorted(order) and order[0] < order[-1]


def test_ties_have_finite_gradients():
    same = torch.ones(12, 4, device=DEVICE)
    for steepness in (1.0, 1e4):
        found = grads(GroCoLoss(10, steepness), [same, same.clone()])
        assert all(x.isfinite().all() for x in found)
    x = torch.zeros(2, 3, requires_grad=True, device=DEVICE)
    last_place_mass(x, 1.0)[:, 2].sum().backward()
    assert x.grad is not None and (x.grad[:, 2] > 0).all() and x.grad.isfinite().all()


def test_fewer_images_than_negatives():
    inputs = [z.double() for z in views(4, 6)]
    ours, want = (grads(GroCoLoss(n), inputs) for n in (10, 3))
    torch.testing.assert_close(ours, want, rtol=0, atol=0)
    assert not torch.equal(want[0], GroCoLoss(2)(*inputs))


def test_other_images_alone_are_negatives_and_keys_stay():
    z0, z1 = (z.double() for z in views(3, 4))
    d0, d1 = grads(GroCoLoss(2), [z0, z1])[1:]
    assert torch.equal(d1, grads(lambda z: GroCoLoss(2)(z0, z), [z1])[1])
    assert d0.abs().sum() > 0 and not torch.allclose(d0, d1)


@pytest.mark.parametrize("which", range(2))
def test_zero_vectors_are_finite_and_a_nan_shows(which):
    given = views(6, 4)
    given[which][2] = 0
    assert all(x.isfinite().all() for x in grads(GroCoLoss(3), given))
    given[which][2, 1] = torch.nan
    assert GroCoLoss(3)(*given).isnan()


@pytest.mark.parametrize("shapes", [((3, 4), (3, 5)), ((3,), (3,)), ((0, 4), (0, 4))])
def test_refuses_shapes(shapes):
    with pytest.raises(ValueError, match=r"z0 and z1 must both be \(B, D\)"):
        GroCoLoss()(*map(torch.ones, shapes))
    with pytest.raises(ValueError, match="must have at least 2 images, got 1"):
        GroCoLoss()(torch.ones(1, 4), torch.ones(1, 4))


def step(data):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).to(data)
    z0, z1 = model(data.flatten(0, 1)).unflatten(0, (2, -1))
    value = GroCoLoss(4, 2.0)(z0, z1)
    value.backward()
    return value.detach(), [p.grad for p in model.parameters()]


def data_of(rank):
    """(views, B, inputs), different on every rank."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(2, 3, 5, generator=generator) + 0.3 * rank


def each_rank(rank, world):
    value, gradients = step(data_of(rank))
    heard = []
    for which in range(2):
        given = [torch.ones(3 + (i == which and rank == 1), 4) for i in range(2)]
        try:
            heard.append(str(GroCoLoss()(*given)))
        except ValueError as error:
            heard.append(str(error))
    one = torch.full((1, 2), float(rank))  # a rank's only image meets those of the others
    return value, gradients, heard, GroCoLoss()(one, one)


@pytest.mark.parametrize("W", [2])
def test_mean_over_ranks_is_the_joined_batch(W):
    seen = run_ranks(each_rank, W)
    value, gradients = step(torch.cat([data_of(rank) for rank in range(W)], dim=1).double())
    mean = torch.stack([one[0] for one in seen]).mean()
    torch.testing.assert_close(mean.double(), value, rtol=2e-6, atol=2e-6)
    for i, want in enumerate(gradients):
        got = torch.stack([one[1][i] for one in seen]).mean(0).double()
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
    for _, _, heard, alone in seen:
        assert all("must have the same shape on every rank" in words for words in heard)
        assert alone.isfinite()
