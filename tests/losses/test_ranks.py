"""W ranks with different data are one process with the joined batch: value, gradient, and DDP's."""

from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastssl.kernels import column_moments
from fastssl.losses import BarlowTwinsLoss, MAELoss, MixedBarlowTwinsLoss, NTXentLoss
from fastssl.masking import random_masking
from tests.ranks import run_ranks

B, INPUT, OUTPUT = 5, 7, 6


def batch(rank):
    """Two views of B inputs, and B images with a mask; different on every rank."""
    generator = torch.Generator().manual_seed(10 + rank)
    x = torch.randn(2, B, INPUT, generator=generator) + 0.3 * rank
    images = torch.randn(B, 1, 4, 4, generator=generator)
    return x, images, random_masking(torch.arange(B) + B * rank, 4, 1).masked


def network(width=OUTPUT):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INPUT, 9), nn.Tanh(), nn.Linear(9, width))


def two_views(loss):
    def call(model, x, images, masked):
        z = model(x.flatten(0, 1)).unflatten(0, (2, -1))  # DDP wants one forward
        return loss(z[0], z[1])

    return call


ON_PLANS = [("gram", OUTPUT), ("covariance", 80), ("sharded", OUTPUT), ("sharded", 81)]


def barlow_by(plan):
    loss = BarlowTwinsLoss(0.1)
    loss.plan = plan
    return loss


def mixed(model, x, images, masked):
    """Each image mixed with the next of its B: as on one rank, so in the joined batch."""
    perm = (torch.arange(x.shape[1]) + 1) % B + torch.arange(x.shape[1]) // B * B
    x = torch.cat([x, 0.3 * x[:1] + 0.7 * x[1:, perm]])
    z = model(x.flatten(0, 1)).unflatten(0, (3, -1))
    return MixedBarlowTwinsLoss(0.1)(*z, perm, 0.3)


def mae(model, x, images, masked):
    return MAELoss(2)(model(x[0]).unflatten(1, (3, 4)), images, masked)


CASES = {  # name: (loss of a model and a batch, the model's width)
    "ntxent": (two_views(NTXentLoss(0.2)), OUTPUT),
    "barlow covariance": (two_views(BarlowTwinsLoss(0.1)), OUTPUT),
    "barlow gram": (two_views(BarlowTwinsLoss(0.1)), 80),
    **{f"barlow by {p} {w}": (two_views(barlow_by(p)), w) for p, w in ON_PLANS},
    "mixed barlow": (mixed, 80),
    "mae": (mae, 12),
    "ntxent local": (two_views(NTXentLoss(0.2, gather_distributed=False)), OUTPUT),
    "barlow local": (two_views(BarlowTwinsLoss(0.1, gather_distributed=False)), OUTPUT),
}

IN_DDP = ["ntxent", "barlow gram", "mixed barlow", "mae", "barlow local"]  # it averages gradients


def step(model, loss, data):
    value = loss(model, *data)
    value.backward()
    return {"value": value.detach(), "grads": [p.grad.clone() for p in model.parameters()]}


def refusal(loss, z_a, z_b):
    try:
        loss(z_a, z_b)
    except ValueError as error:
        return str(error)
    return "not refused"


def refusals(rank):
    """What a rank hears when rank 1's views are not the others': nobody may be left waiting."""
    z, other = torch.ones(B, OUTPUT), rank == 1
    cases = {
        "uneven": [z[: B - other]] * 2,
        "empty": [z[: B * (not other)]] * 2,
        "flat": [z.flatten() if other else z] * 2,
        "second": [z, z[: B - other]],
        "mixed": [z.double() if other else z] * 2,  # fault 35
    }
    losses = {"ntxent": NTXentLoss(), "barlow": BarlowTwinsLoss()}
    return {f"{n} {c}": refusal(losses[n], *zs) for n in losses for c, zs in cases.items()}


def pairs(rank, world):
    """NTXentLoss in each of two groups of two ranks."""
    groups = [dist.new_group([r, r + 1]) for r in range(0, world, 2)]  # every rank makes them all
    return NTXentLoss(0.2, process_group=groups[rank // 2])(*batch(rank)[0])


def each_rank(rank, world):
    """Every case in one start of the ranks, plain and under DDP."""
    seen = {}
    for name, (loss, width) in CASES.items():
        seen[name] = step(network(width), loss, batch(rank))
        if name in IN_DDP:
            ddp = DistributedDataParallel(network(width))
            seen["ddp " + name] = step(ddp, loss, batch(rank))
    seen["refusals"] = refusals(rank)
    seen["pairs"] = pairs(rank, world)
    x = torch.tensor([[1.0 * rank, 3.0 * rank]])
    seen["one row"] = column_moments(x, unbiased=True).var, BarlowTwinsLoss()(x, x)
    return seen


@pytest.fixture(scope="module", params=[4], ids=lambda w: f"W={w}")
def ranks(request):
    return run_ranks(each_rank, request.param)


@cache
def one_process(name, W):
    """The loss of the joined batch; of gather_distributed=False, the mean of each rank's own."""
    loss, width = CASES[name]
    model = network(width).double()
    data = [batch(r) for r in range(W)]
    wide = [(x.double(), images.double(), masked) for x, images, masked in data]
    if name.endswith("local"):
        value = torch.stack([loss(model, *one) for one in wide]).mean()
    else:
        x, images, masked = zip(*wide, strict=True)
        value = loss(model, torch.cat(x, dim=1), torch.cat(images), torch.cat(masked))
    value.backward()
    return {"value": value.detach(), "grads": [p.grad for p in model.parameters()]}


def close(got, want, among=()):
    """To float32's rounding of the largest element: small ones are differences of large ones."""
    largest = max(x.abs().max().item() for x in (want, *among))
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6 * max(largest, 1))


@pytest.mark.parametrize("name", CASES)
def test_mean_over_ranks_is_the_joined_batch(ranks, name):
    want = one_process(name, len(ranks))
    close(torch.stack([seen[name]["value"] for seen in ranks]).mean(), want["value"])
    by_parameter = zip(*(seen[name]["grads"] for seen in ranks), strict=True)
    for got, truth in zip(by_parameter, want["grads"], strict=True):
        close(torch.stack(got).mean(0), truth, want["grads"])


@pytest.mark.parametrize("name", IN_DDP)
def test_ddp_gives_every_rank_the_joined_gradient(ranks, name):
    want = one_process(name, len(ranks))
    for seen in ranks:
        for got, truth in zip(seen["ddp " + name]["grads"], want["grads"], strict=True):
            close(got, truth, want["grads"])


@pytest.mark.parametrize("name", ["barlow covariance", "barlow gram"])
def test_barlow_has_one_value_on_every_rank(ranks, name):
    assert all(torch.equal(seen[name]["value"], ranks[0][name]["value"]) for seen in ranks)


def test_views_that_differ_are_refused_on_every_rank(ranks):
    for seen in ranks:
        assert len(seen["refusals"]) == 10
        for case, words in seen["refusals"].items():
            what = "dtype" if case.endswith("mixed") else "shape"
            assert f"must have the same {what} on every rank" in words, case


def test_each_group_contrasts_within_itself(ranks):
    for r in range(0, len(ranks), 2):
        joined = torch.cat([batch(r)[0], batch(r + 1)[0]], dim=1).double()
        close((ranks[r]["pairs"] + ranks[r + 1]["pairs"]) / 2, NTXentLoss(0.2)(*joined))


def test_one_row_on_each_rank(ranks):
    rows = torch.arange(len(ranks))[:, None] * torch.tensor([1.0, 3.0])
    for seen in ranks:
        var, loss = seen["one row"]
        torch.testing.assert_close(var, rows.var(0))  # [0.5, 4.5] of two ranks
        assert loss.isfinite()
