"""Patch embeddings of signals and clips in timm's VisionTransformer, and fixed positions."""

import math

import pytest
import timm
import torch

from fastssl.models import (
    PatchEmbed1d,
    PatchEmbed3d,
    build_backbone,
    feature_dim,
    sincos_positions,
)

SMALL = {"embed_dim": 24, "depth": 1, "num_heads": 3}
OWN = {
    "vit_video": ((2, 4, 6, 8), {"patch_size": (2, 3, 4), **SMALL}, (2, 2, 2)),
    "vit_signal": ((3, 40), {"patch_size": 8, **SMALL}, (5,)),
}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_timm_models_over_other_signals(name, positions):
    shape, kwargs, grid = OWN[name]
    model = build_backbone(name, shape=shape, kwargs={**kwargs, "positions": positions})
    assert model.patch_embed.grid_size == grid and feature_dim(model) == 24
    out = model(torch.randn(3, *shape))
    assert out.shape == (3, 24)
    out.sum().backward()
    assert model.patch_embed.proj.weight.grad.abs().sum() > 0
    assert model.pos_embed.requires_grad == (positions == "learned")


@pytest.mark.parametrize("name", OWN)
def test_fixed_positions_leave_the_class_token_alone(name):
    shape, kwargs, grid = OWN[name]
    for prefix in ({}, {"reg_tokens": 2}, {"no_embed_class": True}, {"class_token": False}):
        model = build_backbone(name, shape=shape, kwargs={**kwargs, **prefix})
        P = model.pos_embed.shape[1] - math.prod(grid)
        assert P == (0 if "no_embed_class" in prefix else model.num_prefix_tokens)
        assert (model.pos_embed[0, :P] == 0).all()
        assert torch.equal(model.pos_embed[0, P:], sincos_positions(grid, 24))


def test_tubelets_see_their_own_frames_and_pixels_only():
    embed = PatchEmbed3d((4, 4, 6), (2, 2, 3), in_chans=1, embed_dim=5)
    clip = torch.randn(1, 1, 4, 4, 6)
    changed = clip.clone()
    changed[0, 0, 2, 3, 4] += 1  # tubelet (1, 1, 1): place 1 * 4 + 1 * 2 + 1
    different = (embed(clip) != embed(changed)).any(-1)[0]
    assert different.nonzero().flatten().tolist() == [7]


def test_a_clip_of_square_frames_in_two_numbers():
    model = timm.create_model("vit_video", img_size=(4, 8), patch_size=4, tubelet=4, **SMALL)
    assert model.patch_embed.img_size == (4, 8, 8) and model.patch_embed.patch_size == (4, 4, 4)


def test_one_image_is_a_clip_of_one_frame():
    """A 3-D embedding of one frame computes what timm's 2-D one does."""
    flat = timm.layers.PatchEmbed(8, 4, in_chans=3, embed_dim=5)
    deep = PatchEmbed3d((1, 8, 8), (1, 4, 4), in_chans=3, embed_dim=5)
    with torch.no_grad():
        deep.proj.weight.copy_(flat.proj.weight[:, :, None])
        deep.proj.bias.copy_(flat.proj.bias)
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(deep(images[:, :, None]), flat(images))


@pytest.mark.parametrize("grid, dim", [((5,), 8), ((3, 4), 16), ((2, 3, 4), 20), ((1, 1), 4)])
def test_sincos_positions_by_hand(grid, dim):
    got = sincos_positions(grid, dim)
    n = dim // (2 * len(grid))
    assert got.shape == (math.prod(grid), dim) and got.dtype == torch.float32
    for place, where in enumerate(
        torch.cartesian_prod(*map(torch.arange, grid)).reshape(-1, len(grid))
    ):
        for axis, x in enumerate(where.tolist()):
            for i in range(n):
                angle = x * 10000 ** (-i / n)
                at = 2 * n * axis + i
                assert got[place, at].item() == pytest.approx(math.sin(angle), abs=1e-6)
                assert got[place, at + n].item() == pytest.approx(math.cos(angle), abs=1e-6)
    assert (got[:, 2 * n * len(grid) :] == 0).all()


def test_sincos_positions_tell_places_apart():
    x = sincos_positions((8, 14, 14), 384)
    gaps = torch.cdist(x, x).fill_diagonal_(torch.inf)
    assert gaps.min() > 0.5


REFUSED = {
    "a patch that does not divide": (
        lambda: PatchEmbed1d(10, 4),
        r"must divide img_size, got \(4,\) and \(10,\)",
    ),
    "two sides of a clip": (lambda: PatchEmbed3d((4, 8), 2), "img_size must be 3 sides"),
    "an empty side": (
        lambda: PatchEmbed1d(8, 0),
        "patch_size must be 1 sides of at least 1, got 0",
    ),
    "a flexible size": (lambda: PatchEmbed1d(8, 4, dynamic_img_pad=True), "one size"),
    "another size": (lambda: PatchEmbed1d(8, 4)(torch.zeros(1, 3, 12)), r"\(8,\), got \(12,\)"),
    "unknown positions": (
        lambda: timm.create_model("vit_signal", positions="none"),
        "'learned' or 'sincos', got 'none'",
    ),
    "weights there are none of": (
        lambda: timm.create_model("vit_video", pretrained=True),
        "no pretrained weights",
    ),
    "no sides": (lambda: sincos_positions((), 8), r"got \(\) and 8"),
    "too few features": (lambda: sincos_positions((2, 2, 2), 5), "got .* and 5"),
}


@pytest.mark.parametrize("call, words", REFUSED.values(), ids=REFUSED)
def test_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call()
