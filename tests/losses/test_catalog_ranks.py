"""Over ranks: with different data they are one process with the joined batch, or each alone."""

import pytest
import torch

from fastssl.losses import (
    CO2Regularizer,
    DeepClusterV2Loss,
    DetConBLoss,
    DetConSLoss,
    DirectCLRLoss,
    EMPSSLLoss,
    FroSSLLoss,
    HypersphereLoss,
    MACLLoss,
    VIbCRegLoss,
    WMSELoss,
)
from tests.losses.test_catalog import CLUSTERS, MASKS, NARROW, WIDE, B, M, step, views
from tests.ranks import run_ranks


def second(make):
    """Of four views: the second batch's, with the bank that the first has left."""

    def call(*z):
        loss = make()
        loss(z[0].detach().requires_grad_(), z[1].detach())
        return loss(z[2], z[3])

    return call


RING = {"strategy": "ring"}


def over_ranks(i):
    """Losses of the images i: name: (the loss, the whole batch's views, the axis of images)."""
    ids = [m[i] for m in MASKS]
    two = (2, B, 6)
    return {
        "detcon b": (lambda *z: DetConBLoss(0.3)(*z, *ids), (4, B, M, 6), 0),
        "detcon s": (lambda *z: DetConSLoss(0.3)(*z, *ids), (2, B, M, 6), 0),
        "detcon ring": (lambda *z: DetConBLoss(0.3, **RING)(*z, *ids), (4, B, M, 6), 0),
        "directclr": (second(lambda: DirectCLRLoss(5, 0.3, 10)), (4, B, 6), 0),
        "emp narrow": (lambda *z: EMPSSLLoss(0.3, 5.0)(z), (3, B, NARROW), 0),
        "emp wide": (lambda *z: EMPSSLLoss(0.3, 5.0)(z), (3, B, WIDE), 0),
        "frossl narrow": (lambda *z: FroSSLLoss(0.7)(z), (3, B, NARROW), 0),
        "frossl wide": (lambda *z: FroSSLLoss(0.7)(z), (3, B, 80), 0),
        "hypersphere": (HypersphereLoss(2.0, 0.7, 1.5), two, 0),
        "hypersphere ring": (HypersphereLoss(2.0, 0.7, **RING), two, 0),
        "macl": (MACLLoss(0.3, 0.6, 0.1), two, 0),
        "macl ring": (MACLLoss(0.3, 0.6, 0.1, **RING), two, 0),
        "co2": (CO2Regularizer(0.7, 0.2), two, 0),
        "co2 bank": (second(lambda: CO2Regularizer(0.7, 0.2, 10)), (4, B, 6), 0),
        "deepcluster": (lambda z: DeepClusterV2Loss(0.3)(z, CLUSTERS[:, i]), (1, 2, 3, B, 5), 2),
        "vibcreg": (VIbCRegLoss(3.0, 5.0, 7.0), two, 0),
    }


ALONE = {"gather_distributed": False}
OWN = {  # of each rank by itself
    "emp": lambda a, b: EMPSSLLoss(0.3, 5.0, **ALONE)([a, b]),
    "frossl": lambda a, b: FroSSLLoss(0.7, **ALONE)([a, b]),
    "hypersphere": HypersphereLoss(2.0, 0.7, **ALONE),
    "macl": MACLLoss(0.3, **ALONE),
    "co2": CO2Regularizer(0.7, **ALONE),
    "vibcreg": VIbCRegLoss(**ALONE),
    "wmse": lambda a, b: WMSELoss(2, w_size=B // 2)(torch.cat([a[:, :2], b[:, :2]])),
}


def half(rank):
    return slice(B // 2 * rank, B // 2 * (rank + 1))


def on_cpu(n, *shape):
    return [z.cpu() for z in views(n, *shape, dtype=torch.float64)]


def moved(*z):
    """The running statistics that a batch leaves."""
    loss = WMSELoss(2, momentum=0.2, w_size=B // 2)
    loss(torch.cat([x[:, :2] for x in z]))
    return loss.whitening.state_dict()


def refused(loss, *arguments):
    try:
        loss(*arguments)
    except ValueError as error:
        return str(error)
    return "not refused"


def each_rank(rank, world):
    i, seen = half(rank), {}
    for name, (loss, shape, axis) in over_ranks(i).items():
        index = (*[slice(None)] * axis, i)
        seen[name] = step(loss, [z[index] for z in on_cpu(*shape)])
    mine = [z[i] for z in on_cpu(2, B, 6)]
    seen["own"] = {name: step(loss, mine) for name, loss in OWN.items()}
    seen["moved"] = dict(moved(*mine))
    z = torch.ones(B - rank, 6)
    ids, wide = torch.zeros(B - rank, 1).long(), torch.ones(1, 1, B - rank, 5)
    seen["refused"] = {
        "detcon": refused(DetConSLoss(), z[:, None], z[:, None], ids, ids),
        "masks": refused(DetConSLoss(), z[:1, None], z[:1, None], ids, ids),
        "emp": refused(EMPSSLLoss(), [z, z]),
        "frossl": refused(FroSSLLoss(), [z, z]),
        "hypersphere": refused(HypersphereLoss(), z, z),
        "macl": refused(MACLLoss(), z, z),
        "co2": refused(CO2Regularizer(), z, z),
        "deepcluster": refused(DeepClusterV2Loss(), wide, ids.T),
        "vibcreg": refused(VIbCRegLoss(), z, z),
        "wmse": refused(WMSELoss(3, w_size=6), z[:, :3]),
    }
    return seen


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(each_rank, 2)


@pytest.mark.parametrize("name", over_ranks(slice(None)))
def test_mean_over_ranks_is_the_joined_batch(ranks, name):
    loss, shape, axis = over_ranks(slice(None))[name]
    value, grads = step(loss, on_cpu(*shape))
    got = torch.stack([seen[name][0] for seen in ranks]).mean()
    torch.testing.assert_close(got, value, check_dtype=False)
    for k, want in enumerate(grads):
        mine = torch.cat([seen[name][1][k] for seen in ranks], axis) / len(ranks)
        torch.testing.assert_close(mine, want)


@pytest.mark.parametrize("name", OWN)
def test_each_rank_by_itself(ranks, name):
    for rank, seen in enumerate(ranks):
        want = step(OWN[name], [z[half(rank)] for z in on_cpu(2, B, 6)])
        torch.testing.assert_close(seen["own"][name], want)


def test_running_statistics_are_alike_on_all_ranks(ranks):
    states = [moved(*(z[half(rank)] for z in on_cpu(2, B, 6))) for rank in range(len(ranks))]
    for key in states[0]:
        want = torch.stack([state[key] for state in states]).mean(0)
        for seen in ranks:
            torch.testing.assert_close(seen["moved"][key], want)


def test_batches_that_differ_are_refused_on_every_rank(ranks):
    for seen in ranks:
        for name, words in seen["refused"].items():
            assert "must have the same shape on every rank" in words, name
