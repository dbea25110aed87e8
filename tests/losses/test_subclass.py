"""A class built on open_clip's loss, with a forward of its own, may be built on ours instead."""

import open_clip.loss
import pytest
import torch
import torch.nn.functional as F

from fastssl import losses
from fastssl.distributed import LOCAL
from tests.ranks import run_ranks

B, D = 5, 4
LOCAL_LOSS = pytest.mark.parametrize("local_loss", [False, True])


def smooth(base):
    class Smooth(base):
        def __init__(self, smoothing, **options):
            super().__init__(**options)
            self.smoothing, self.rank = smoothing, options["rank"]
            self.world_size = options["world_size"]

        def forward(self, image_features, text_features, logit_scale, logit_bias):
            sides = self.get_logits(image_features, text_features, logit_scale, logit_bias)
            truth = self.get_ground_truth(image_features.device, len(sides[0]))
            terms = [F.cross_entropy(s, truth, label_smoothing=self.smoothing) for s in sides]
            return sum(terms) + 1e-3 * self.rank * self.world_size

    return Smooth


def batch(rank):
    generator = torch.Generator().manual_seed(rank)
    return [F.normalize(torch.randn(B, D, generator=generator)) for _ in range(2)]


def step(base, rank, world, local_loss):
    options = {"local_loss": local_loss, "gather_with_grad": True, "rank": rank}
    loss = smooth(base)(0.1, world_size=world, **options)
    leaves = [x.requires_grad_() for x in (*batch(rank), torch.tensor(5.0), torch.tensor(-1.0))]
    value = loss(*leaves)
    value.backward()
    return [value.detach(), *(x.grad for x in leaves)]


def each_rank(rank, world):
    bases = {"ours": losses.ClipLoss, "open_clip": open_clip.loss.ClipLoss}
    return {(n, local): step(bases[n], rank, world, local) for n in bases for local in (0, 1)}


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(each_rank, 2)


@LOCAL_LOSS
def test_a_forward_by_get_logits_is_open_clips(ranks, local_loss):
    for seen in (*ranks, each_rank(0, 1)):
        want = seen["open_clip", local_loss]
        torch.testing.assert_close(seen["ours", local_loss], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [None, -3.0])
def test_siglips_parts_are_open_clips(bias):
    ours, theirs = (m.SigLipLoss() for m in (losses, open_clip.loss))
    logits = [m.get_logits(*batch(0), 5.0, logit_bias=bias) for m in (ours, theirs)]
    torch.testing.assert_close(*logits)
    for only in (False, True):
        truth = [m.get_ground_truth("cpu", torch.float64, B, only) for m in (ours, theirs)]
        assert torch.equal(*truth) and truth[0].dtype == torch.float64


@pytest.mark.parametrize("name, given", [("rank", 1), ("world_size", 2)])
def test_what_the_group_decides_is_not_set_to_something_else(name, given):
    loss = losses.CLIPLoss(process_group=LOCAL, **{name: given})  # as open_clip's main gives it
    assert (loss.rank, loss.world_size) == (0, 1)
    with pytest.raises(
        ValueError, match=f"{name} must be what process_group makes it, {given - 1}"
    ):
        setattr(loss, name, given)
