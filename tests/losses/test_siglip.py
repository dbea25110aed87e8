import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.loss import SigLipLoss
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastssl.distributed import LOCAL
from fastssl.losses import siglip
from fastssl.losses.siglip import SigLIPLoss
from tests.oracle import DEVICE, assert_no_worse, grads
from tests.ranks import run_ranks

B, INPUT, D = 5, 7, 6


def pairs(dtype=torch.float32, b=23, d=9):
    torch.manual_seed(b)
    z = torch.randn(b, d, device=DEVICE)
    both = (F.normalize(z + torch.randn_like(z)).to(dtype) for _ in range(2))
    numbers = (torch.tensor(v, dtype=dtype, device=DEVICE) for v in (10.0, -10.0))
    return [*both, *numbers]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_worse_than_open_clip(dtype):
    assert_no_worse(SigLIPLoss(), SigLipLoss(), pairs(dtype))


def test_has_open_clips_value_and_gradients_in_float64():
    inputs = pairs(torch.float64)
    for loss in (SigLIPLoss(), SigLIPLoss(strategy="ring")):
        for found, want in zip(grads(loss, inputs), grads(SigLipLoss(), inputs), strict=True):
            torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-14)


def test_takes_what_open_clip_takes():
    options = {"cache_labels": True, "rank": 0, "world_size": 1, "dist_impl": "gather"}
    x, t, scale, bias = pairs()
    theirs = SigLipLoss(**options)(x, t, scale, bias, output_dict=True)
    ours = SigLIPLoss(**options)(x, t, scale, bias, output_dict=True)
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(ours["contrastive_loss"], theirs["contrastive_loss"])
    named = {"image_features": x, "text_features": t, "logit_scale": scale, "logit_bias": bias}
    assert torch.equal(SigLIPLoss()(**named), ours["contrastive_loss"])


def test_numbers_may_be_numbers_or_of_one_element():
    x, t, scale, bias = pairs()
    want = SigLIPLoss()(x, t, scale, bias)
    assert torch.equal(SigLIPLoss()(x, t, 10.0, -10.0), want)
    one = scale[None].clone().requires_grad_()
    found = SigLIPLoss()(x, t, one, bias)
    found.backward()
    assert torch.equal(found, want) and one.grad is not None and one.grad.shape == (1,)
    assert torch.equal(SigLIPLoss()(x, t, 10.0), SigLIPLoss()(x, t, 10.0, 0.0))


def test_known_values():
    x = torch.zeros(8, 3, device=DEVICE)
    assert SigLIPLoss()(x, x, 0.0, 0.0).item() == pytest.approx(8 * math.log(2))
    one, other = torch.ones(2, 1, device=DEVICE), torch.tensor([[1.0], [-1.0]], device=DEVICE)
    # The first row's pair has s = 2, the second's -2; so have their negatives, -2 and 2.
    want = (math.log1p(math.exp(-2)) + math.log1p(math.exp(2))) * 2 / 2
    assert SigLIPLoss()(one, other, 2.0, 0.0).item() == pytest.approx(want)


def test_a_nan_shows():
    x, t, scale, bias = pairs()
    t[3, 2] = torch.nan
    assert SigLIPLoss()(x, t, scale, bias).isnan()


@pytest.mark.parametrize(
    "shapes, words",
    [
        (((4, 3), (5, 3)), r"must both be \(B, D\), none of them empty, got \(4, 3\) and \(5, 3\)"),
        (((4, 3), (4, 2)), r"got \(4, 3\) and \(4, 2\)"),
        (((0, 3), (0, 3)), r"got \(0, 3\)"),
        (((4,), (4,)), r"got \(4,\)"),
    ],
)
def test_refuses_shapes(shapes, words):
    with pytest.raises(ValueError, match=words):
        SigLIPLoss()(*(torch.zeros(s) for s in shapes), 1.0, 0.0)


def test_refuses_other_arguments():
    x = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="strategy must be one of gather, ring, got 'star'"):
        SigLIPLoss(strategy="star")
    with pytest.raises(ValueError, match=r"scale must be a number .* got \(4,\)"):
        SigLIPLoss()(x, x, torch.ones(4), 0.0)
    with pytest.raises(ValueError, match="must be floating-point, got torch.int64"):
        SigLIPLoss()(x.long(), x.long(), 1.0, 0.0)


def test_all_of_a_label_match():
    x, t = (z.double() for z in pairs()[:2])
    labels = torch.arange(23, device=x.device) // 3
    inputs = [x, t, torch.tensor(4.0).double(), torch.tensor(-2.0).double()]
    ours, formula = (
        grads(lambda *z: f(*z, labels=labels), inputs)  # noqa: B023
        for f in (SigLIPLoss(), siglip.siglip_reference)
    )
    torch.testing.assert_close(ours, formula)
    with pytest.raises(ValueError, match=r"labels must be \(23,\) integers"):
        SigLIPLoss()(x, t, 1.0, labels=labels[:2])


# Across ranks: W with different data are one process with the joined batch.


class Towers(nn.Module):
    """Two towers, the logarithm of a scale and a bias."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.towers = nn.ModuleList(nn.Linear(INPUT, D) for _ in range(2))
        self.log_scale = nn.Parameter(torch.tensor(math.log(5.0)))
        self.bias = nn.Parameter(torch.tensor(-2.0))

    def forward(self, xs):
        x, t = (F.normalize(f(x)) for f, x in zip(self.towers, xs, strict=True))
        return x, t, self.log_scale.exp(), self.bias


def batch(rank):
    generator = torch.Generator().manual_seed(10 + rank)
    return torch.randn(2, B, INPUT, generator=generator) + 0.3 * rank


def step(model, loss, xs):
    value = loss(*model(xs))
    value.backward()
    return {"value": value.detach(), "grads": [p.grad for p in model.parameters()]}


def refusal(loss, x, t):
    try:
        loss(x, t, 1.0, 0.0)
    except ValueError as error:
        return str(error)
    return "not refused"


def counted(loss, xs):
    """The blocks of texts that the loss computes with, and the most rows of one."""
    rows, call = [], siglip.pairwise_sigmoid_grads
    siglip.pairwise_sigmoid_grads = lambda q, k, *a, **o: rows.append(len(k)) or call(q, k, *a, **o)
    try:
        loss(*Towers()(xs))
        with torch.no_grad():
            value = loss(*Towers()(xs))
    finally:
        siglip.pairwise_sigmoid_grads = call
    return rows, value


def each_rank(rank, world):
    """Everything in one start of the ranks."""
    seen, xs = {}, batch(rank)
    odd = rank == 1
    groups = [dist.new_group([r, r + 1]) for r in range(0, world, 2)]  # every rank makes them all
    z = torch.ones(B, D)
    for strategy in ("gather", "ring"):
        loss = SigLIPLoss(strategy=strategy)
        seen[strategy] = step(Towers(), loss, xs)
        seen["ddp " + strategy] = step(DistributedDataParallel(Towers()), loss, xs)
        locked = Towers()
        locked.towers[1].requires_grad_(False)
        seen["locked " + strategy] = [g for g in step(locked, loss, xs)["grads"] if g is not None]
        own = SigLIPLoss(strategy=strategy, process_group=groups[rank // 2])
        seen["group " + strategy] = step(Towers(), own, xs)
        labels = (torch.arange(B) + B * rank) % 7  # some match those of other ranks
        seen["labeled " + strategy] = step(Towers(), partial(loss, labels=labels), xs)
        seen["refusals " + strategy] = [
            refusal(loss, z[: B - odd], z[: B - odd]),
            refusal(loss, z, z[: B - odd]),
            refusal(loss, z.flatten() if odd else z, z),
        ]
        local = SigLIPLoss(strategy=strategy, process_group=LOCAL)
        seen["local " + strategy] = step(Towers(), local, xs)["value"]
        seen["half " + strategy] = loss(*(z.to(torch.bfloat16), z.to(torch.bfloat16), 2.0, -1.0))
    seen["calls"] = counted(SigLIPLoss(strategy="ring"), xs)
    return seen


@pytest.fixture(scope="module", params=[4], ids=lambda w: f"W={w}")
def ranks(request):
    return run_ranks(each_rank, request.param)


def joined(which):
    """open_clip on the joined batch in float64."""
    return step(Towers().double(), SigLipLoss(), torch.cat([batch(r) for r in which], 1).double())


def close(got, want):
    """To float32's rounding of the largest element: small ones are differences of large ones."""
    largest = want.abs().max().item()
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6 * max(largest, 1))


def same(steps, want):
    close(torch.stack([s["value"] for s in steps]).mean(), want["value"])
    for got, truth in zip(
        zip(*(s["grads"] for s in steps), strict=True), want["grads"], strict=True
    ):
        close(torch.stack(got).mean(0), truth)


STRATEGIES = pytest.mark.parametrize("strategy", ["gather", "ring"])


@STRATEGIES
def test_mean_over_ranks_is_the_joined_batch(ranks, strategy):
    want = joined(range(len(ranks)))
    same([seen[strategy] for seen in ranks], want)
    for seen in ranks:  # DDP has averaged already
        for got, truth in zip(seen["ddp " + strategy]["grads"], want["grads"], strict=True):
            close(got, truth)


@STRATEGIES
def test_labels_match_over_ranks(ranks, strategy):
    xs = torch.cat([batch(r) for r in range(len(ranks))], 1).double()
    labels = torch.arange(B * len(ranks)) % 7
    want = step(Towers().double(), partial(siglip.siglip_reference, labels=labels), xs)
    same([seen["labeled " + strategy] for seen in ranks], want)


@STRATEGIES
def test_texts_may_be_without_gradient(ranks, strategy):
    want = [g for i, g in enumerate(joined(range(len(ranks)))["grads"]) if i not in (4, 5)]
    for got, truth in zip(
        zip(*(s["locked " + strategy] for s in ranks), strict=True), want, strict=True
    ):
        close(torch.stack(got).mean(0), truth)


@STRATEGIES
def test_each_group_is_a_batch_of_its_own(ranks, strategy):
    for r in range(0, len(ranks), 2):
        same([seen["group " + strategy] for seen in ranks[r : r + 2]], joined([r, r + 1]))
    for r, seen in enumerate(ranks):
        close(seen["local " + strategy], joined([r])["value"])


@STRATEGIES
def test_uneven_batches_are_refused_on_every_rank(ranks, strategy):
    for seen in ranks:
        words = "must have the same shape on every rank"
        assert all(words in said for said in seen["refusals " + strategy])


@STRATEGIES
def test_sixteen_bits_are_summed_in_float32(ranks, strategy):
    s, n = 2.0 * D - 1.0, B * len(ranks)
    want = math.log1p(math.exp(-s)) + (n - 1) * math.log1p(math.exp(s))
    for seen in ranks:
        assert seen["half " + strategy].dtype == torch.float32
        assert seen["half " + strategy].item() == pytest.approx(want, rel=1e-6)


def test_the_ring_computes_each_pair_of_blocks_once(ranks):
    for seen in ranks:
        rows, value = seen["calls"]
        assert rows == [B] * len(ranks) * 2  # with gradients and without
        assert torch.equal(value, seen["ring"]["value"])
