"""Stochastic depth over samples: what is kept is scaled, what is not is left, and a teacher's."""

import copy

import pytest
import torch

from fastssl.models import build_backbone, drop_samples, still
from tests.runs import VIT


def vit(name="vit_tiny_patch16_224", **kwargs):
    torch.manual_seed(0)
    return build_backbone(name, shape=(1, 16, 16), kwargs={**VIT, **kwargs})


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_kept_samples_are_scaled_and_others_left(name):
    scale = {"init_values": 0.5} if "dinov3" not in name else {}
    plain = vit(name, **scale)
    ours = copy.deepcopy(plain).train()
    drop_samples(ours, 0.6)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(5, plain.num_prefix_tokens + 6, 32)
    rope = torch.randn(5, 1, 6, 32) if "dinov3" in name else None  # of each sample's own patches
    more = {} if rope is None else {"rope": rope}
    block, whole = ours.blocks[0], plain.blocks[0].eval()
    torch.manual_seed(7)
    first, second = (torch.randperm(5)[:2] for _ in range(2))
    torch.manual_seed(7)
    y = block(x, **more)
    want = x.clone()
    for b in first:
        mine = {} if rope is None else {"rope": rope[b : b + 1]}
        row = want[b : b + 1]
        attended = whole.attn(whole.norm1(row), **mine)
        want[b] += 2.5 * scaled(whole, 1, attended)[0]
    after = want.clone()
    for b in second:
        want[b] += 2.5 * scaled(whole, 2, whole.mlp(whole.norm2(after[b : b + 1])))[0]
    torch.testing.assert_close(y, want)
    block.eval()
    torch.testing.assert_close(block(x, **more), whole(x, **more))


def scaled(block, branch, y):
    if hasattr(block, f"ls{branch}"):
        return getattr(block, f"ls{branch}")(y)
    gamma = getattr(block, f"gamma_{branch}")
    return y if gamma is None else gamma * y


def test_one_sample_at_least_is_kept():
    ours = vit().train()
    drop_samples(ours, 0.9)
    assert not torch.equal(ours.blocks[0](x := torch.randn(3, 5, 32)), x)


def test_two_ways_to_drop_are_refused():
    with pytest.raises(ValueError, match="drop_path=0.2: leave out model.kwargs.drop_path_rate"):
        drop_samples(vit(drop_path_rate=0.1), 0.2)
    with pytest.raises(
        ValueError, match="drop_path=0.2 is for blocks of a plain ViT, got .*ResPost"
    ):
        drop_samples(respost(), 0.2)


def respost():
    from timm.models.vision_transformer import ResPostBlock

    model = vit()
    model.blocks[1] = ResPostBlock(32, 2)
    return model


def test_what_is_still_drops_nothing_while_it_trains():
    noisy = vit(drop_path_rate=0.9, proj_drop_rate=0.5, attn_drop_rate=0.5).train()
    x = torch.randn(4, 1, 16, 16)
    assert not torch.equal(noisy(x), noisy(x))
    still(noisy)
    assert noisy.training and torch.equal(noisy(x), noisy(x))
