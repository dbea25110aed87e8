import pytest
import torch
from lightly.loss import NTXentLoss as LightlyNTXent
from lightly.models.modules import NNMemoryBankModule
from torch import nn

from fastssl.losses.nnclr import NNCLRLoss, nnclr_reference
from fastssl.losses.ntxent import ntxent_reference
from tests.covering import pairwise
from tests.losses.views import unit
from tests.oracle import DEVICE, UPSTREAM, assert_no_worse, grads
from tests.ranks import run_ranks

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def projections(B, D, dtype=torch.float32, seed=0):
    """z0, z1, p0, p1 of B images, as alike as after some training."""
    generator = torch.Generator().manual_seed(B + seed)
    z = torch.randn(B, D, generator=generator)
    noise = torch.randn(4, B, D, generator=generator)
    return [(z + 0.5 * one).to(DEVICE, dtype) for one in noise]


@pytest.mark.parametrize(
    **pairwise(
        {
            "B, D, size": [(1, 3, 1), (33, 16, 70)],
            "temperature": [0.5, 0.1],
            "dtype": DTYPES,
            "reduce": UPSTREAM,
        }
    )
)
def test_formula(B, D, size, temperature, dtype, reduce):
    z0, z1, p0, p1 = projections(B, D, dtype)
    loss = NNCLRLoss(size, D, temperature).to(DEVICE).eval()
    keys = loss.queue.keys
    assert_no_worse(
        lambda p0, p1: loss(z0, z1, p0, p1),
        lambda p0, p1: nnclr_reference(z0.to(p0.dtype), z1.to(p0.dtype), p0, p1, keys, temperature),
        (p0, p1),
        reduce,
        slack=2 if dtype == torch.float32 else 8,  # eager does not round the rows of 16 bits
    )


def test_value_and_gradient_are_those_of_lightlys_parts():
    """Over several steps, the queue moving."""
    ours = NNCLRLoss(12, 8, temperature=0.2).to(DEVICE)
    bank, criterion = NNMemoryBankModule((12, 8)).to(DEVICE), LightlyNTXent(0.2)
    bank.bank.copy_(ours.queue.bank)

    def lightly(z0, z1, p0, p1):
        n0, n1 = bank(z0, update=False), bank(z1, update=True)
        return (criterion(n0, p1) + criterion(n1, p0)) / 2

    for step in range(5):
        z0, z1, p0, p1 = projections(4, 8, seed=step % 2)
        got = grads(lambda *p: ours(z0, z1, *p), (p0, p1))  # noqa: B023  called here
        torch.testing.assert_close(got, grads(lambda *p: lightly(z0, z1, *p), (p0, p1)))  # noqa: B023


def test_only_predictions_get_a_gradient():
    z0, z1, p0, p1 = (x.requires_grad_() for x in projections(5, 4))
    NNCLRLoss(8)(z0.cpu(), z1.cpu(), p0.cpu(), p1.cpu()).backward()
    assert z0.grad is None and z1.grad is None
    assert p0.grad is not None and p1.grad is not None


def test_a_queue_that_holds_the_views_is_simclr():
    z0, z1, p0, p1 = projections(9, 6)
    loss = NNCLRLoss(18, 6, 0.2).to(DEVICE).eval()
    loss.queue.push(torch.cat([z0, z1]))
    want = (ntxent_reference(z0, p1, 0.2) + ntxent_reference(z1, p0, 0.2)) / 2
    torch.testing.assert_close(loss(z0, z1, p0, p1), want)


def test_the_queue_takes_the_second_view_in_training():
    z = projections(3, 4)
    loss = NNCLRLoss(8).to(DEVICE)
    loss(*z)
    torch.testing.assert_close(loss.queue.keys[:3], unit(z[1]))
    before = loss.queue.keys
    loss(*z, update=False)
    loss.eval()(*z)
    assert torch.equal(loss.queue.keys, before)


@pytest.mark.parametrize("which", range(4))
def test_a_nan_shows(which):
    given = projections(5, 4)
    given[which][2, 1] = torch.nan
    assert NNCLRLoss(8).to(DEVICE)(*given).isnan()


def test_zero_vectors_are_finite():
    given = projections(5, 4)
    for x in given:
        x[1] = 0
    found = grads(lambda *p: NNCLRLoss(8).to(DEVICE)(*given[:2], *p), given[2:])
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("temperature", [0, -0.1, torch.nan, torch.inf])
def test_refuses_temperatures(temperature):
    with pytest.raises(ValueError, match="temperature must be > 0"):
        NNCLRLoss(4, 3, temperature)


@pytest.mark.parametrize("which", range(4))
def test_refuses_shapes_and_dtypes(which):
    given = [torch.ones(3, 4) for _ in range(4)]
    for wrong, words in (
        (torch.ones(3, 5), "z0 and z1 and p0 and p1 must all be"),
        (torch.ones(3, 4, dtype=torch.float16), "must share dtype and device"),
    ):
        with pytest.raises(ValueError, match=words):
            NNCLRLoss(4)(*given[:which], wrong, *given[which + 1 :])


def test_refuses_another_width_than_the_queues():
    with pytest.raises(ValueError, match=r"must be \(B, 5\) with B > 0, got \(3, 4\)"):
        NNCLRLoss(4, 5)(*[torch.ones(3, 4)] * 4)


def step(data, loss):
    """Two steps, the queue moving; the second one's value and gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).to(data)
    predictor = nn.Linear(4, 4).to(data)
    for views in data.unbind():
        model.zero_grad(), predictor.zero_grad()
        z0, z1 = model(views.flatten(0, 1)).unflatten(0, (2, -1))
        value = loss(z0, z1, predictor(z0), predictor(z1))
        value.backward()
    parameters = [*model.parameters(), *predictor.parameters()]
    return value.detach(), [p.grad for p in parameters]


def data_of(rank, B=3):
    """(steps, views, B, inputs), different on every rank."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(2, 2, B, 5, generator=generator) + 0.3 * rank


def each_rank(rank, world):
    value, gradients = step(data_of(rank), NNCLRLoss(10, temperature=0.3))
    heard = []
    for which in range(4):
        given = [torch.ones(3 + (i == which and rank == 1), 4) for i in range(4)]
        try:
            heard.append(str(NNCLRLoss(4)(*given)))
        except ValueError as error:
            heard.append(str(error))
    return value, gradients, heard


@pytest.mark.parametrize("W", [2])
def test_mean_over_ranks_is_the_joined_batch(W):
    seen = run_ranks(each_rank, W)
    joined = torch.cat([data_of(rank) for rank in range(W)], dim=2)
    value, gradients = step(joined.double(), NNCLRLoss(10, temperature=0.3))
    mean = torch.stack([one[0] for one in seen]).mean()
    torch.testing.assert_close(mean.double(), value, rtol=2e-6, atol=2e-6)
    for i, want in enumerate(gradients):
        got = torch.stack([one[1][i] for one in seen]).mean(0).double()
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
    for _, _, heard in seen:
        assert all("must have the same shape on every rank" in words for words in heard)
