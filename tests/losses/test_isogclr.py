import math

import pytest
import torch

from fastssl.losses import ISogCLRLoss
from fastssl.losses.isogclr import isogclr_reference
from tests.losses.views import stacked, unit, views
from tests.oracle import DEVICE, grads, saved_elements

SIZE = 20


class Dense:
    """The authors' unimodal code in float64: matrices, and u itself instead of its logarithm."""

    gamma, beta, grad_clip = 0.8, 0.9, 3.0

    def __init__(self, tau_init=0.07, tau_range=(0.05, 1.0), rho=6.0, eta=1e-3):
        self.tau = torch.full((SIZE,), tau_init, dtype=torch.float64, device=DEVICE)
        self.u, self.m = torch.zeros_like(self.tau), torch.zeros_like(self.tau)
        self.range, self.rho, self.eta = tau_range, rho, eta

    def __call__(self, z0, z1, index):
        tau, u = self.tau[index], self.u[index]
        value, linear, u, slope = isogclr_reference(z0, z1, tau, u, self.rho, self.gamma)
        slope = slope.clamp(-self.grad_clip, self.grad_clip)
        self.m[index] = (1 - self.beta) * self.m[index] + self.beta * slope
        self.tau[index] = (self.tau[index] - self.eta * self.m[index]).clamp(*self.range)
        self.u[index] = u
        return value.detach() + linear - linear.detach()

    def state(self):
        return torch.stack([self.tau, self.u.log(), self.m], 1)


def steps(count, B=7, D=6):
    """Batches of different images, which come back."""
    generator = torch.Generator().manual_seed(3)
    for step in range(count):
        index = torch.randperm(SIZE, generator=generator)[:B]
        z0, z1 = views(B + step, D)
        yield [z0[:B], z1[:B]], index.to(DEVICE)


OPTIONS = {
    "defaults": {},
    "free": {"rho": 0.3, "eta": 0.01, "tau_init": 0.2},
    "narrow": {"rho": 0.1, "eta": 0.1, "tau_init": 0.1, "tau_range": (0.09, 0.12)},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", OPTIONS)
def test_the_authors_algorithm_over_many_steps(case, dtype):
    ours, dense = ISogCLRLoss(SIZE, **OPTIONS[case]).to(DEVICE), Dense(**OPTIONS[case])
    for inputs, index in steps(9):
        truth = grads(lambda a, b: dense(a, b, index), [z.double() for z in inputs])  # noqa: B023
        got = grads(lambda a, b: ours(a, b, index), [z.to(dtype) for z in inputs])  # noqa: B023
        for x, want in zip(got, truth, strict=True):
            assert x.dtype == dtype
            torch.testing.assert_close(x.double(), want, rtol=1e-5, atol=3e-6)
        state = ours.gather_state().double()
        torch.testing.assert_close(state, dense.state(), rtol=1e-5, atol=1e-5)
    assert len(dense.tau.unique()) > 3


def test_the_cases_reach_the_ends_of_the_range():
    loss = ISogCLRLoss(SIZE, **OPTIONS["narrow"]).to(DEVICE)
    for (a, b), index in steps(9):
        loss(a.requires_grad_(), b, index)
    tau = loss.gather_state()[:, 0]
    assert tau.min().item() == pytest.approx(0.09) and tau.max().item() == pytest.approx(0.12)


@pytest.mark.parametrize("quiet", ["eval", "no_grad"])
def test_nothing_is_updated_outside_training(quiet):
    loss, index = ISogCLRLoss(SIZE).to(DEVICE), torch.arange(5, device=DEVICE)
    inputs = views(5, 4)
    loss(*inputs, index)
    before, trained = loss.gather_state(), loss(*views(5, 4), index)
    after = loss.gather_state()
    assert not torch.equal(before, after)
    loss.load_state(before)
    loss.train(quiet != "eval")
    with torch.set_grad_enabled(quiet == "eval"):
        assert loss(*views(5, 4), index).item() == pytest.approx(trained.item())
    assert torch.equal(loss.gather_state(), before)


def test_a_fixed_temperature_and_a_first_visit_are_decoupled_contrast():
    """t lse(s / t) - s', with t for a weight: what u is on a first visit."""
    a, b = (z.double() for z in views(12, 4))
    index = torch.arange(12, device=DEVICE)
    z, other = stacked(a, b)
    lse = (z @ z.T / 0.3).masked_fill(~other, -torch.inf).logsumexp(1).mean()
    want = 0.3 * (lse - math.log(22) + 0.5) - (unit(a) * unit(b)).sum(1).mean()
    got = ISogCLRLoss(SIZE, tau_init=0.3, rho=0.5, eta=0).to(DEVICE)(a, b, index)
    torch.testing.assert_close(got, want)


def test_a_nan_does_not_stay():
    loss, index = ISogCLRLoss(SIZE).to(DEVICE), torch.arange(5, device=DEVICE)
    a, b = views(5, 4)
    loss(a, b, index)
    before = loss.gather_state()
    a[2] = torch.nan
    assert loss(a, b, index).isnan()
    assert torch.equal(loss.gather_state(), before)


def test_state_is_saved_and_given_back():
    loss, other = (ISogCLRLoss(SIZE).to(DEVICE) for _ in range(2))
    for (a, b), index in steps(3):
        loss(a, b, index)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.gather_state(), loss.gather_state())
    assert loss.gather_state().shape == (SIZE, 3)
    third = ISogCLRLoss(SIZE).to(DEVICE)
    third.load_state(loss.gather_state())
    assert torch.equal(third.gather_state(), loss.gather_state())
    saved = other.state_dict()
    loss(*views(7, 6), torch.arange(7, device=DEVICE))
    assert not torch.equal(other.gather_state(), loss.gather_state())
    assert torch.equal(saved["_extra_state"]["values"], other.gather_state().cpu().to(DEVICE))


@pytest.mark.parametrize("sharded", [True, False])
def test_the_halves_of_a_call_are_the_call(sharded):
    whole, halves = ISogCLRLoss(SIZE).to(DEVICE), ISogCLRLoss(SIZE, sharded=sharded).to(DEVICE)
    for (a, b), index in steps(3):
        index[1], before = index[0], halves.gather_state()  # an image twice: the last one stays
        want = whole(a, b, index)
        loss, state = halves.measure(a, b, index)
        assert torch.equal(loss, want) and torch.equal(halves(a, b, index, update=False), want)
        assert torch.equal(halves.gather_state(), before)
        halves.remember(index, state)
        assert torch.equal(halves.gather_state()[index[1:]], state[1:])
        assert torch.equal(halves.gather_state(), whole.gather_state())
    again = ISogCLRLoss(SIZE, sharded=sharded).to(DEVICE)
    again.load_state_dict(halves.state_dict())
    assert torch.equal(again.gather_state(), whole.gather_state())
    assert len(list(halves.buffers())) == (not sharded)


def test_refuses_a_state_of_another_size():
    with pytest.raises(ValueError, match=r"state must be \(20, 3\), got \(19, 3\)"):
        ISogCLRLoss(SIZE).load_state(torch.zeros(19, 3))
    with pytest.raises(ValueError, match="want the per-sample state of .*'size': 20.*'size': 19"):
        ISogCLRLoss(SIZE).load_state_dict(ISogCLRLoss(19).state_dict())


def test_refuses_the_share_of_another_rank():
    saved = ISogCLRLoss(SIZE).state_dict()
    saved["_extra_state"]["rank"] = 1
    with pytest.raises(ValueError, match="want the per-sample state of .*'rank': 0.*'rank': 1"):
        ISogCLRLoss(SIZE).load_state_dict(saved)


def test_refuses_other_ranks_than_it_was_made_for():
    loss = ISogCLRLoss(SIZE)
    loss.samples.world = 2
    with pytest.raises(ValueError, match="this loss was made for 2 ranks, got 1"):
        loss(torch.ones(3, 4), torch.ones(3, 4), torch.arange(3))


def test_scores_are_not_kept():
    loss = ISogCLRLoss(512).to(DEVICE)
    a, b = (z.requires_grad_() for z in views(256, 4))
    assert saved_elements(lambda: loss(a, b, torch.arange(256, device=DEVICE))) < 512 * 512 // 8


@pytest.mark.parametrize("index", [[0, 1, SIZE], [-1, 0, 1]])
def test_refuses_images_outside_the_data_set(index):
    with pytest.raises(ValueError, match=r"index must be in \[0, 20\), got"):
        ISogCLRLoss(SIZE)(*(z.cpu() for z in views(3, 4)), torch.tensor(index))


@pytest.mark.parametrize("index", [torch.zeros(3), torch.arange(4), torch.zeros(3, 1).long()])
def test_refuses_an_index_of_another_shape(index):
    with pytest.raises(ValueError, match=r"index must be \(3,\) integers on cpu, got"):
        ISogCLRLoss(SIZE)(torch.ones(3, 4), torch.ones(3, 4), index)


def test_refuses_one_image():
    with pytest.raises(ValueError, match="joined batch must have at least 2 images, got 1"):
        ISogCLRLoss(SIZE)(torch.ones(1, 3), torch.ones(1, 3), torch.tensor([0]))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"tau_init": 0.04}, "tau_init must lie in tau_range"),
        ({"tau_init": 2.0}, "tau_init must lie in tau_range"),
        ({"tau_range": (0.0, 1.0)}, "tau_init must lie in tau_range"),
    ],
)
def test_refuses_options(options, words):
    with pytest.raises(ValueError, match=words):
        ISogCLRLoss(**{"size": SIZE, **options})
