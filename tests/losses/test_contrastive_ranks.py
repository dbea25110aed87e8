"""Contrastive losses on W ranks with different data are one process with the joined batch.

A loss is taken twice in a row and the two are added, so that what it keeps (a queue, temperatures)
is carried over.
"""

from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastssl.losses import (
    DCLLoss,
    DCLWLoss,
    DenseInfoNCELoss,
    GroupedNTXentLoss,
    HCLLoss,
    ISogCLRLoss,
    MatryoshkaLoss,
    MoCoLoss,
    MoCoV3Loss,
    NTXentLoss,
    SupConLoss,
)
from tests.ranks import run_ranks

B, INPUT, OUTPUT, STEPS, SIZE = 6, 7, 6, 2, 50


def batch(rank, world):
    """Two views of B inputs for each step, and their ids; different on every rank.

    labels: 5 of them in the joined batch, each on many ranks, and one that a single image has.
    index: an image met on one rank is met on another in the next step.
    """
    generator = torch.Generator().manual_seed(20 + rank)
    x = torch.randn(STEPS, 2, B, INPUT, generator=generator) + 0.3 * rank
    labels = torch.randint(5, (STEPS, B), generator=generator) * 10**12
    if rank == world - 1:
        labels[:, 0] = -4
    image = torch.arange(B) + B * ((rank + torch.arange(STEPS)[:, None]) % world)
    return x, labels, (7 * image) % SIZE


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INPUT, 9), nn.Tanh(), nn.Linear(9, OUTPUT))


def pair(loss, z, labels, index):
    return loss(*z)


def both_ways(loss, z, labels, index):
    return loss(*z) + loss(z[1], z[0])


def labeled(loss, z, labels, index):
    return loss(*z, labels)


def indexed(loss, z, labels, index):
    return loss(*z, index)


def stacked(loss, z, labels, index):
    return loss(z.transpose(0, 1), labels)


def unlabeled(loss, z, labels, index):
    return loss(z.transpose(0, 1))


def singles(loss, z, labels, index):
    """One view of each image: some have no positive."""
    return loss(z[0].unsqueeze(1), labels)


def flat(loss, z, labels, index):
    return loss(z[0], labels)


def positions(loss, z, labels, index):
    """Images of three positions; how many of a rank's have a match differs from rank to rank."""
    match = (index % 5 - 1).unflatten(0, (-1, 3))
    return loss(*z.unflatten(1, (-1, 3)), match)


def distance(a, b):
    return (a - 0.3 * b)[:, 0].square()


STRATEGIES = {
    "ntxent": (lambda **o: NTXentLoss(0.2, **o), pair),
    "dcl": (lambda **o: DCLLoss(0.2, **o), pair),
    "dcl weighted": (lambda **o: DCLLoss(0.2, distance, **o), pair),
    "dclw": (lambda **o: DCLWLoss(0.2, 0.3, **o), pair),
    "supcon": (lambda **o: SupConLoss(0.2, **o), stacked),
    "supcon unlabeled": (lambda **o: SupConLoss(0.2, **o), unlabeled),
    "supcon singles": (lambda **o: SupConLoss(0.2, **o), singles),
    "supcon flat": (lambda **o: SupConLoss(0.2, **o), flat),
    "ntxent labeled": (lambda **o: NTXentLoss(0.2, **o), flat),
    "moco v3": (lambda **o: MoCoV3Loss(0.2, **o), both_ways),
    "hcl": (lambda **o: HCLLoss(0.5, 0.1, 1.5, **o), pair),
    "grouped same": (lambda **o: GroupedNTXentLoss(0.2, **o), labeled),
    "grouped different": (lambda **o: GroupedNTXentLoss(0.2, "different", **o), labeled),
    "matryoshka": (lambda **o: MatryoshkaLoss(NTXentLoss(0.2, **o), (4, OUTPUT)), pair),
    "isogclr": (lambda **o: ISogCLRLoss(SIZE, 0.2, rho=0.3, eta=0.05, **o), indexed),
    "dense batch": (lambda **o: DenseInfoNCELoss(0.2, "batch", **o), positions),
}
ONE_WAY = {  # those in which no rank's rows meet another's
    "ntxent bank": (lambda **o: NTXentLoss(0.2, (40, OUTPUT), **o), pair),
    "moco": (lambda **o: MoCoLoss(OUTPUT, 0.2, 40, **o), both_ways),
    "dense image": (lambda **o: DenseInfoNCELoss(0.2, **o), positions),
}
CASES = {**{f"{n} {s}": (*STRATEGIES[n], s) for n in STRATEGIES for s in ("gather", "ring")}}
CASES |= {name: (*ONE_WAY[name], None) for name in ONE_WAY}
_WHOLE = {"rho": 0.3, "eta": 0.05, "sharded": False}
CASES["isogclr whole"] = (lambda **o: ISogCLRLoss(SIZE, 0.2, **_WHOLE, **o), indexed, "gather")
# DDP averages gradients, as the test of the mean does: one loss of each way through the ranks.
IN_DDP = [
    "ntxent labeled gather",
    "ntxent gather",
    "ntxent ring",
    "supcon gather",
    "isogclr ring",
    "moco",
]
LOCAL = ["ntxent", "ntxent labeled", "dcl", "dclw", "supcon", "moco v3", "hcl", "grouped same"]


def new_loss(name, **options):
    make, _, strategy = CASES[name]
    return make(**options, **{"strategy": strategy} if strategy else {})


def run(loss, take, model, data):
    """The steps' losses in a row, and what the loss keeps."""
    x, labels, index = data
    z = model(x.flatten(0, 2)).unflatten(0, x.shape[:3])  # DDP wants one forward
    value = torch.stack([take(loss, z[s], labels[s], index[s]) for s in range(STEPS)]).sum()
    value.backward()
    state = loss.gather_state() if isinstance(loss, ISogCLRLoss) else loss.state_dict()
    grads = [p.grad.clone() for p in model.parameters()]
    return {"value": value.detach(), "grads": grads, "state": state}


def refusals(name, rank, world):
    """What a rank hears when rank 1's views are not the others': nobody may be left waiting."""
    x, labels, index = (given[0] for given in batch(rank, world))
    rows, heard = 3 if rank == 1 else B, []
    mixed = x.double() if rank == 1 else x  # fault 35
    for given in [(x[:, :rows], labels[:rows], index[:rows]), (mixed, labels, index)]:
        try:
            CASES[name][1](new_loss(name), *given)
            heard.append("not refused")
        except (ValueError, RuntimeError) as error:
            heard.append(str(error))
    return heard


def each_rank(rank, world):
    """Every case in one start of the ranks: plain, under DDP, in groups of two, and alone."""
    data, seen = batch(rank, world), {}
    for name in CASES:
        take = CASES[name][1]
        seen[name] = run(new_loss(name), take, network(), data)
        if name in IN_DDP:
            ddp = DistributedDataParallel(network())
            seen["ddp " + name] = run(new_loss(name), take, ddp, data)["grads"]
        if not name.startswith("dense"):
            seen["refusals " + name] = refusals(name, rank, world)
    groups = [dist.new_group([r, r + 1]) for r in range(0, world, 2)]  # every rank makes them all
    for name in CASES if world > 2 else ():
        loss = new_loss(name, process_group=groups[rank // 2])
        seen["group " + name] = run(loss, CASES[name][1], network(), data)["value"]
    for name in LOCAL:
        make, take = STRATEGIES[name]
        seen["local " + name] = run(make(gather_distributed=False), take, network(), data)["value"]
    full = seen["isogclr gather"]["state"]
    loss = new_loss("isogclr gather")
    loss.load_state(full)
    seen["given back"] = torch.equal(loss.gather_state(), full), len(loss.samples.values)
    return seen


@pytest.fixture(scope="module", params=[4], ids=lambda w: f"W={w}")
def ranks(request):
    return run_ranks(each_rank, request.param)


def joined(world, of):
    """The batches of some ranks as one, in float64."""
    x, labels, index = zip(*(batch(r, world) for r in of), strict=True)
    return torch.cat(x, dim=2).double(), torch.cat(labels, dim=1), torch.cat(index, dim=1)


@cache
def one_process(make, take, world, of=None):
    data = joined(world, range(world) if of is None else of)
    return run(make(), take, network().double(), data)


def close(got, want):
    """To float32's rounding of the largest element: small ones are differences of large ones."""
    largest = want.abs().max().item()
    torch.testing.assert_close(got.double(), want, rtol=0, atol=3e-6 * max(largest, 1))


@pytest.mark.parametrize("name", CASES)
def test_mean_over_ranks_is_the_joined_batch(ranks, name):
    want = one_process(*CASES[name][:2], len(ranks))
    close(torch.stack([seen[name]["value"] for seen in ranks]).mean(), want["value"])
    by_parameter = zip(*(seen[name]["grads"] for seen in ranks), strict=True)
    for got, truth in zip(by_parameter, want["grads"], strict=True):
        close(torch.stack(got).mean(0), truth)


@pytest.mark.parametrize("name", IN_DDP)
def test_ddp_gives_every_rank_the_joined_gradient(ranks, name):
    want = one_process(*CASES[name][:2], len(ranks))
    for seen in ranks:
        for got, truth in zip(seen["ddp " + name], want["grads"], strict=True):
            close(got, truth)


@pytest.mark.parametrize("name", ["ntxent bank", "moco"])
def test_every_rank_keeps_the_queue_of_one_process(ranks, name):
    want = one_process(*CASES[name][:2], len(ranks))["state"]
    for seen in ranks:
        assert seen[name]["state"].keys() == want.keys()
        for key, truth in want.items():
            close(seen[name]["state"][key], truth.double())


@pytest.mark.parametrize("name", ["isogclr gather", "isogclr ring", "isogclr whole"])
def test_temperatures_are_those_of_one_process(ranks, name):
    want = one_process(*CASES[name][:2], len(ranks))["state"]
    assert len(want[:, 0].unique()) > B * len(ranks) // 2
    for seen in ranks:
        torch.testing.assert_close(seen[name]["state"], want, rtol=1e-5, atol=1e-5)


def test_each_rank_keeps_its_share_of_the_temperatures(ranks):
    for seen in ranks:
        same, rows = seen["given back"]
        assert same and rows == -(-SIZE // len(ranks)) + 1


def test_views_that_differ_are_refused_on_every_rank(ranks):
    for name in [n for n in CASES if not n.startswith("dense")]:
        for seen in ranks:
            shape, dtype = seen["refusals " + name]
            assert "must have the same shape on every rank" in shape, name
            assert "must have the same dtype on every rank" in dtype, name


def test_each_group_contrasts_within_itself(ranks):
    for name in CASES if len(ranks) > 2 else ():
        for r in range(0, len(ranks), 2):
            want = one_process(*CASES[name][:2], len(ranks), of=(r, r + 1))["value"]
            close((ranks[r]["group " + name] + ranks[r + 1]["group " + name]) / 2, want)


@pytest.mark.parametrize("name", LOCAL)
def test_gather_distributed_false_is_each_rank_alone(ranks, name):
    make, take = STRATEGIES[name]
    for r, seen in enumerate(ranks):
        close(seen["local " + name], one_process(make, take, len(ranks), of=(r,))["value"])
