"""The correlation family: W ranks with different data are one process with the joined batch."""

import copy
from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastssl.losses.mmcr import MMCRLoss
from fastssl.losses.ssl_ey import SSLEYLoss
from fastssl.losses.tico import TiCoLoss
from fastssl.losses.vicreg import VICRegLoss
from fastssl.losses.vicregl import VICRegLLoss
from tests.ranks import run_ranks

B, INPUT = 5, 7


def batch(rank):
    """Four views of B inputs, and where their places are; different on every rank."""
    generator = torch.Generator().manual_seed(10 + rank)
    x = torch.randn(4, B, INPUT, generator=generator, dtype=torch.float64) + 0.3 * rank
    return x, torch.rand(4, B, 2, 3, 2, generator=generator, dtype=torch.float64)


def network(width):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INPUT, 9), nn.Tanh(), nn.Linear(9, width)).double()


def two(loss, *shape):
    """A loss of two views, each (B, *shape)."""
    return lambda z, grids: loss(*(x.unflatten(1, shape) for x in z[:2]))


def many(loss):
    return lambda z, grids: loss(list(z[:3]))


def local(loss):
    """Each view: 4 global features and 2 x 3 places of 6."""

    def call(z, grids):
        views = [(x[:, :4], x[:, 4:].unflatten(1, (2, 3, 6))) for x in z]
        return loss(views[:2], list(grids[:2]), views[2:], list(grids[2:]))

    return call


def second(loss, keep):
    """The second batch's loss, with the state that the first has left."""

    def call(z, grids):
        mine = copy.deepcopy(loss)
        mine(z[2].detach(), z[3].detach())
        return mine(z[0], z[1], update_covariance_matrix=keep)

    return call


NARROW, WIDE = 3, 40  # features: fewer and more than the rows of 2 and of 4 ranks
ALONE = {"gather_distributed": False}
CASES = {  # name: (loss of four views' embeddings and grids, the model's width)
    "vicreg covariance": (two(VICRegLoss(), NARROW), NARROW),
    "vicreg gram": (two(VICRegLoss(), WIDE), WIDE),
    "vicreg positions covariance": (two(VICRegLoss(), 2, NARROW), 2 * NARROW),
    "vicreg positions gram": (two(VICRegLoss(), 2, WIDE), 2 * WIDE),
    "vicreg alone": (two(VICRegLoss(**ALONE), WIDE), WIDE),
    "vicregl": (local(VICRegLLoss()), WIDE),
    "vicregl alone": (local(VICRegLLoss(**ALONE)), WIDE),
    "ssl-ey covariance": (many(SSLEYLoss()), NARROW),
    "ssl-ey gram": (many(SSLEYLoss()), 2 * WIDE),
    "ssl-ey alone": (many(SSLEYLoss(**ALONE)), WIDE),
    "tico covariance": (second(TiCoLoss(), True), NARROW),
    "tico kept": (second(TiCoLoss(), True), WIDE),
    "tico gram": (second(TiCoLoss(), False), WIDE),
    "tico alone": (second(TiCoLoss(**ALONE), True), WIDE),
    "mmcr columns": (two(MMCRLoss(0.3), 2, NARROW), 2 * NARROW),
    "mmcr rows": (two(MMCRLoss(0.3), 2, WIDE), 2 * WIDE),
    "mmcr alone": (two(MMCRLoss(0.3, **ALONE), 2, WIDE), 2 * WIDE),
}

IN_DDP = ["vicreg covariance", "ssl-ey gram", "tico kept", "mmcr rows"]  # it averages gradients


def step(model, loss, data):
    x, grids = data
    z = model(x.flatten(0, 1)).unflatten(0, (4, -1))  # DDP wants one forward
    value = loss(z, grids)
    value.backward()
    return {"value": value.detach(), "grads": [p.grad.clone() for p in model.parameters()]}


def refusal(loss, *arguments):
    try:
        loss(*arguments)
    except ValueError as error:
        return str(error)
    return "not refused"


def refusals(rank):
    """What a rank hears when rank 1's views are not the others': nobody may be left waiting."""
    z, other = torch.ones(B, WIDE), rank == 1
    grid = torch.ones(B, 1, 1, 2)
    cases = {"uneven": z[: B - other], "empty": z[: B * (not other)]}
    cases["flat"] = z.flatten() if other else z
    cases["mixed"] = z.double() if other else z  # fault 35
    seen = {}
    for name, mine in cases.items():
        seen["vicreg " + name] = refusal(VICRegLoss(), z, mine)
        seen["tico " + name] = refusal(TiCoLoss(), mine, z)
        seen["mmcr " + name] = refusal(MMCRLoss(), z[:, None], mine[:, None])
        seen["ssl-ey " + name] = refusal(SSLEYLoss(), [z, z, mine])
        views = [(z, z[:, None, None]), (mine, z[:, None, None])]
        seen["vicregl " + name] = refusal(VICRegLLoss(), views, [grid, grid])
    return seen


def one_row(rank):
    """A batch of one on each rank is a joined batch of W."""
    z = torch.tensor([[1.0 * rank, 3.0 - rank]])
    return VICRegLoss()(z, z), SSLEYLoss()([z, z]), TiCoLoss()(z, z), MMCRLoss()(z[None], z[None])


def far(rank):
    """Columns near 1e6, on the steps that float32 has there."""
    generator = torch.Generator().manual_seed(rank)
    z = (16 * torch.randn(2, B, WIDE, generator=generator)).round() / 16 + rank
    return VICRegLoss()(*z), VICRegLoss()(*(z + 1e6))


def pairs(rank, world):
    """In each of two groups of two ranks."""
    groups = [dist.new_group([r, r + 1]) for r in range(0, world, 2)]  # every rank makes them all
    z = batch(rank)[0]
    return [make(process_group=groups[rank // 2])(z[0], z[1]) for make in (VICRegLoss, TiCoLoss)]


def each_rank(rank, world):
    """Every case in one start of the ranks, plain and under DDP."""
    seen = {}
    for name, (loss, width) in CASES.items():
        seen[name] = step(network(width), loss, batch(rank))
        if name in IN_DDP:
            ddp = DistributedDataParallel(network(width))
            seen["ddp " + name] = step(ddp, loss, batch(rank))
    tico = TiCoLoss()
    tico(*batch(rank)[0][:2])
    seen["state"] = tico.C
    seen["refusals"] = refusals(rank)
    seen["one row"] = one_row(rank)
    seen["far"] = far(rank)
    seen["pairs"] = pairs(rank, world)
    return seen


@pytest.fixture(scope="module", params=[4], ids=lambda w: f"W={w}")
def ranks(request):
    return run_ranks(each_rank, request.param)


def joined(W):
    x, grids = zip(*(batch(r) for r in range(W)), strict=True)
    return torch.cat(x, 1), torch.cat(grids, 1)


@cache
def one_process(name, W):
    """The loss of the joined batch; of gather_distributed=False, the mean of each rank's own."""
    loss, width = CASES[name]
    if not name.endswith("alone"):
        return step(network(width), loss, joined(W))
    parts = [step(network(width), loss, batch(r)) for r in range(W)]
    columns = zip(*(part["grads"] for part in parts), strict=True)
    return {
        "value": torch.stack([part["value"] for part in parts]).mean(),
        "grads": [torch.stack(column).mean(0) for column in columns],
    }


def close(got, want, name=""):
    """To 1e-10; singular values that are zero are the roots of a Gram matrix's rounding."""
    limit = 1e-7 if name == "mmcr rows" else 1e-10
    torch.testing.assert_close(got, want, rtol=limit, atol=limit)


@pytest.mark.parametrize("name", CASES)
def test_mean_over_ranks_is_the_joined_batch(ranks, name):
    want = one_process(name, len(ranks))
    close(torch.stack([seen[name]["value"] for seen in ranks]).mean(), want["value"], name)
    by_parameter = zip(*(seen[name]["grads"] for seen in ranks), strict=True)
    for got, truth in zip(by_parameter, want["grads"], strict=True):
        close(torch.stack(got).mean(0), truth, name)


@pytest.mark.parametrize("name", IN_DDP)
def test_ddp_gives_every_rank_the_joined_gradient(ranks, name):
    want = one_process(name, len(ranks))
    for seen in ranks:
        for got, truth in zip(seen["ddp " + name]["grads"], want["grads"], strict=True):
            close(got, truth, name)


def test_one_state_on_every_rank(ranks):
    loss = TiCoLoss()
    loss(*joined(len(ranks))[0][:2])
    close(ranks[0]["state"], loss.C)
    assert all(torch.equal(seen["state"], ranks[0]["state"]) for seen in ranks)


def test_views_that_differ_are_refused_on_every_rank(ranks):
    for seen in ranks:
        assert len(seen["refusals"]) == 20
        for case, words in seen["refusals"].items():
            what = "dtype" if case.endswith("mixed") else "shape"
            assert f"must have the same {what} on every rank" in words, case


def test_one_row_on_each_rank(ranks):
    z = torch.tensor([[1.0 * r, 3.0 - r] for r in range(len(ranks))])
    want = (
        VICRegLoss()(z, z),
        SSLEYLoss()([z, z]),
        TiCoLoss()(z, z),
        MMCRLoss()(z[:, None], z[:, None]),
    )
    for got, whole in zip(
        zip(*(seen["one row"] for seen in ranks), strict=True), want, strict=True
    ):
        torch.testing.assert_close(torch.stack(got).mean(), whole)


def test_a_far_mean_costs_no_digits(ranks):
    for seen in ranks:
        torch.testing.assert_close(*seen["far"], rtol=1e-5, atol=0)


def test_each_group_keeps_to_itself(ranks):
    for r in range(0, len(ranks), 2):
        x = torch.cat([batch(r)[0], batch(r + 1)[0]], dim=1)
        for i, make in enumerate((VICRegLoss, TiCoLoss)):
            close((ranks[r]["pairs"][i] + ranks[r + 1]["pairs"][i]) / 2, make()(x[0], x[1]))
