"""MaskedViT against timm's own attention mask, values and gradients in float64."""

from math import prod

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl import kernels
from fastssl.masking import random_masking
from fastssl.models import (
    MAEDecoder,
    MaskedViT,
    backbone_arguments,
    build_backbone,
    feature_dim,
    is_vit,
)
from tests.covering import examples
from tests.oracle import largest_tensor

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 3}
IMAGE = ("vit_tiny_patch16_224", (3, 12, 12), {"patch_size": (4, 2)})
ROPE = ("vit_small_patch16_rope_224", (3, 12, 12), {"patch_size": (4, 2)})
MIXED = ("vit_small_patch16_rope_mixed_ape_224", *ROPE[1:])
CLIP = ("vit_video", (2, 4, 6, 8), {"patch_size": (2, 3, 2)})
SIGNAL = ("vit_signal", (3, 40), {"patch_size": 4})
KINDS = {
    "class token": (*IMAGE, {}),
    "registers, no class position": (*IMAGE, {"reg_tokens": 2, "no_embed_class": True}),
    "no prefix": (*IMAGE, {"class_token": False}),
    "norm before, layer scale": (*IMAGE, {"pre_norm": True, "init_values": 0.1}),
    "norm of the patches": (*IMAGE, {"embed_norm_layer": torch.nn.LayerNorm}),
    "checkpointed": (*IMAGE, {}),
    "no positions but rotary": (*ROPE, {}),
    "rotary and learned": ("vit_small_patch16_rope_ape_224", *ROPE[1:], {}),
    "rotary by block and head": ("vit_small_patch16_rope_mixed_224", *ROPE[1:], {}),
    "rotary by block, learned": (*MIXED, {}),
    "rotary, registers": ("vit_base_patch16_rope_reg1_gap_256", *ROPE[1:], {}),
    "rotary, checkpointed": (*MIXED, {}),
    "dinov3": ("vit_small_patch16_dinov3", *ROPE[1:], {"dynamic_img_size": False}),
    "eva02": ("eva02_tiny_patch14_224", *ROPE[1:], {}),
    "sapiens2": (
        *("vit_base_patch16_sapiens2", *ROPE[1:]),
        {"dynamic_img_size": False, "num_kv_heads": (3, 1)},
    ),
    "clip, fixed positions": (*CLIP, {}),
    "clip, learned, registers": (*CLIP, {"positions": "learned", "reg_tokens": 1}),
    "signal": (*SIGNAL, {}),
    "signal, no class token": (*SIGNAL, {"positions": "learned", "class_token": False}),
}


def vit(name=IMAGE[0], shape=IMAGE[1], patch=IMAGE[2], kwargs=None):
    torch.manual_seed(0)
    model = timm.create_model(
        name,
        img_size=shape[1:],
        in_chans=shape[0],
        num_classes=0,
        global_pool="",
        **{**SMALL, **patch, **(kwargs or {})},
    )
    for parameter in model.parameters():  # zeros and ones would hide a mistake
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.double().eval()


def mask_then_drop(model, images, ids):
    """The definition: timm embeds all, nobody attends to hidden patches, they are dropped."""
    P, L = model.num_prefix_tokens, images[0, 0].numel() // prod(model.patch_embed.patch_size)
    seen = torch.zeros(len(images), P + L, dtype=torch.bool)
    seen[:, :P] = True
    seen.scatter_(1, P + ids, True)
    x = model.forward_features(images, attn_mask=seen[:, None, None].expand(-1, 1, P + L, -1))
    kept = x[:, P:].gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))
    return torch.cat([x[:, :P], kept], 1)


def gradients(model, forward, images, ids, upstream):
    model.zero_grad()
    out = forward(images, ids)
    out.backward(upstream[:, : out.shape[1]])
    return out, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


OF_ANY_SIZE = ["class token", "registers, no class position", *(k for k in KINDS if "rot" in k)]


@pytest.mark.parametrize(
    "kind, sides", [(kind, None) for kind in KINDS] + [(kind, (16, 6)) for kind in OF_ANY_SIZE]
)
def test_equals_timm_with_hidden_patches_masked(kind, sides):
    name, shape, patch, kwargs = KINDS[kind]
    model = vit(name, shape, patch, {**kwargs, "dynamic_img_size": True} if sides else kwargs)
    masked = MaskedViT(model)
    model.set_grad_checkpointing("checkpointed" in kind)
    images = torch.randn(4, shape[0], *(sides or shape[1:]), dtype=torch.float64)
    L = prod(masked.grid_of(images))
    K, P = L // 3, model.num_prefix_tokens
    hashed = random_masking(torch.arange(4), L, K).visible
    ids = hashed.flip(1)  # in the order asked for, not in the grid's
    upstream = torch.randn(4, P + L, 24, dtype=torch.float64)
    ours, our_grads = gradients(model, masked, images, ids, upstream)
    model.set_grad_checkpointing(False)
    truth, their_grads = gradients(
        model, lambda x, i: mask_then_drop(model, x, i), images, ids, upstream
    )
    assert ours.shape == (4, P + K, 24)
    torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-11)
    assert our_grads.keys() == their_grads.keys() and our_grads
    for n, grad in our_grads.items():  # timm interpolates positions in float32
        close = (1e-5, 1e-6) if sides and n == "pos_embed" else (1e-9, 1e-11)
        torch.testing.assert_close(grad, their_grads[n], rtol=close[0], atol=close[1], msg=n)


@pytest.mark.parametrize(
    "kind", ["class token", "rotary by block, learned", "clip, fixed positions"]
)
def test_without_ids_it_is_timm_itself(kind):
    name, shape, patch, kwargs = KINDS[kind]
    model = vit(name, shape, patch, kwargs)
    images = torch.randn(2, *shape, dtype=torch.float64)
    whole = MaskedViT(model)(images)
    torch.testing.assert_close(whole, model.forward_features(images), rtol=1e-11, atol=1e-11)


def test_what_it_says_of_itself():
    masked = MaskedViT(vit(*CLIP))
    assert masked.patch == (2, 3, 2) and masked.grid == (2, 2, 4)
    assert masked.num_patches == 16 and masked.width == 24 and masked.prefix == 1


def test_checkpointing_recomputes_every_block():
    for kind in (IMAGE, MIXED):
        model = vit(*kind)
        ran = []
        model.blocks[0].register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
        model.set_grad_checkpointing(True)
        masked = MaskedViT(model)
        masked(
            torch.randn(2, *kind[1], dtype=torch.float64), torch.tensor([[3], [5]])
        ).sum().backward()
        assert len(ran) == 2


@settings(max_examples=examples(30, 10))
@given(
    dims=st.sampled_from([1, 2, 3]),
    sides=st.tuples(*[st.integers(1, 4)] * 3),
    patch=st.tuples(*[st.integers(1, 4)] * 3),
    channels=st.integers(1, 3),
    keep=st.integers(1, 5),
)
def test_tokens_are_those_of_the_convolution(dims, sides, patch, channels, keep):
    grid, patch = sides[:dims], patch[:dims]
    name = {1: "vit_signal", 2: IMAGE[0], 3: "vit_video"}[dims]
    shape = (channels, *(g * p for g, p in zip(grid, patch, strict=True)))
    model = vit(name, shape, {"patch_size": patch}, {"depth": 0})
    images = torch.randn(2, *shape, dtype=torch.float64)
    L = MaskedViT(model).num_patches
    ids = random_masking(torch.arange(2), L, min(keep, L)).visible.flip(1)
    every = model.patch_embed(images)
    wanted = every.gather(1, ids[..., None].expand(-1, -1, 24))
    torch.testing.assert_close(MaskedViT(model).tokens(images, ids), wanted, rtol=1e-10, atol=1e-10)


LAYOUTS = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: torch.cat([x, x + 9], -1)[..., : x.shape[-1]],
    "expanded": lambda x: x[:1].expand(len(x), -1, -1, -1),
    "every other": lambda x: torch.stack([x, x * 3], -1)[..., 0],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_strides(layout):
    masked = MaskedViT(vit())
    images = layout(torch.randn(3, 3, 12, 12, dtype=torch.float64))
    ids = random_masking(torch.arange(3), 18, 5).visible
    torch.testing.assert_close(
        masked(images, ids), masked(images.contiguous(), ids), rtol=1e-12, atol=1e-12
    )


def test_images_that_are_normalized_as_they_are_read():
    masked = MaskedViT(vit(*CLIP).float())
    raw = torch.randint(256, (3, *CLIP[1]), dtype=torch.uint8)
    mean, std = torch.tensor([0.4, 0.5]), torch.tensor([0.2, 0.3])
    ids = random_masking(torch.arange(3), 16, 4).visible
    read = kernels.Normalized(raw, mean, std)
    float_copy = (raw / 255 - mean.view(2, 1, 1, 1)) / std.view(2, 1, 1, 1)
    torch.testing.assert_close(masked(read, ids), masked(float_copy, ids))


@pytest.mark.parametrize("shape", [(2, 3, 12, 13), (2, 1, 12, 12), (2, 3, 16, 12), (2, 3, 12)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"images must be \(B, 3, 12, 12\), got"):
        MaskedViT(vit())(
            torch.zeros(shape, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.long)
        )


@pytest.mark.parametrize("shape", [(2, 3, 12, 13), (2, 1, 12, 12), (2, 3, 0, 2), (2, 3, 12)])
def test_sides_that_patches_do_not_fill_are_refused(shape):
    with pytest.raises(ValueError, match=r"\(B, 3, h, w\) with multiples of \(4, 2\), got"):
        MaskedViT(vit(kwargs={"dynamic_img_size": True})).tokens(torch.zeros(shape).double())


def test_a_grid_of_fixed_positions_is_refused():
    with pytest.raises(ValueError, match=r"positions are of a grid \(3, 6\), got \(6, 3\)"):
        MaskedViT(vit()).encode(torch.zeros(1, 18, 24, dtype=torch.float64), grid=(6, 3))


def test_too_few_tokens_without_ids_are_refused():
    with pytest.raises(ValueError, match="want 18 tokens without ids, got 5"):
        MaskedViT(vit()).encode(torch.zeros(1, 5, 24, dtype=torch.float64))


def test_memory_is_that_of_the_patches_kept():
    """CropMAE hides 98.5 %: nothing as large as the images, or their tokens, is ever made."""
    masked = MaskedViT(vit(shape=(3, 224, 224), patch={"patch_size": 16}).float())
    images = torch.randn(16, 3, 224, 224)
    ids = random_masking(torch.arange(16), 196, 3).visible
    largest = largest_tensor(lambda: masked(images, ids).sum().backward())
    assert largest <= max(16 * 3 * 768, 768 * 24, 16 * 4 * 96)  # patches, weight, hidden layer
    whole = largest_tensor(lambda: masked(images))
    assert whole >= images.numel()


@pytest.mark.parametrize("kind", [MIXED, CLIP], ids=["rotary", "clip"])
def test_compiles_in_one_graph(kind):
    model = vit(*kind, {"depth": 1})
    masked = MaskedViT(model)
    images = torch.randn(2, *kind[1], dtype=torch.float64)
    ids = torch.tensor([[1, 4], [0, 7]])
    compiled = torch.compile(masked, fullgraph=True, backend="eager")
    upstream = torch.randn(2, 3, 24, dtype=torch.float64)
    ours, our_grads = gradients(model, compiled, images, ids, upstream)
    eager, their_grads = gradients(model, masked, images, ids, upstream)
    torch.testing.assert_close(ours, eager)
    for name, grad in their_grads.items():
        torch.testing.assert_close(our_grads[name], grad, msg=name)


def test_models_that_cannot_be_masked_are_refused():
    with pytest.raises(ValueError, match="VisionTransformer.*ResNet"):
        MaskedViT(timm.create_model("resnet10t"))
    with pytest.raises(ValueError, match="learned positions"):
        MaskedViT(vit(kwargs={"pos_embed": "none"}))
    for kind in (IMAGE, ROPE):
        with pytest.raises(ValueError, match="patch_drop_rate must be 0"):
            MaskedViT(vit(*kind, {"patch_drop_rate": 0.5}))


@pytest.mark.parametrize(
    "name, words",
    [
        ("deit_tiny_distilled_patch16_224", "2 prefix tokens, 1 of them"),
        ("vit_tiny_r_s16_p8_224", "with HybridEmbed"),
    ],
)
def test_other_embeddings_are_refused(name, words):
    with pytest.raises(ValueError, match=f"needs a convolution as patch embedding.*{words}"):
        MaskedViT(timm.create_model(name, num_classes=0))


@pytest.mark.parametrize("change", [{"stride": 2}, {"padding": 1}, {"groups": 3}, {"dilation": 2}])
def test_other_convolutions_are_refused(change):
    model = vit(patch={"patch_size": 4})
    arguments = {"kernel_size": 4, "stride": 4, **change}
    model.patch_embed.proj = torch.nn.Conv2d(3, 24, **arguments)
    with pytest.raises(ValueError, match="convolution of stride and kernel"):
        MaskedViT(model)


def test_an_image_that_patches_do_not_fill_is_refused():
    model = timm.create_model("vit_tiny_patch16_224", img_size=18, patch_size=4, num_classes=0)
    with pytest.raises(
        ValueError, match=r"must divide the image size, got \(4, 4\) and \(18, 18\)"
    ):
        MaskedViT(model)


def test_decoder_predicts_hidden_patches_in_their_order():
    """Hidden patches at the same place, in another order, get the same prediction."""
    torch.manual_seed(0)
    decoder = MAEDecoder(8, width=12, depth=2, heads=2, patches=9, values=5)
    masking = random_masking(torch.arange(2), 9, 3)
    tokens = torch.randn(2, 1 + 3, 8)
    out = decoder(tokens, masking)
    assert out.shape == (2, 6, 5)
    turned = masking._replace(masked=masking.masked.flip(1))
    torch.testing.assert_close(decoder(tokens, turned), out.flip(1))


@pytest.mark.parametrize(
    "name, kwargs, width",
    [
        ("resnet10t", {}, 512),
        ("vit_tiny_patch16_224", {}, 192),
        (
            "vit_base_patch16_sapiens2",
            {"depth": 1, "num_kv_heads": 12, "dynamic_img_size": False},
            768,
        ),
    ],
)
def test_backbone_features(name, kwargs, width):
    model = build_backbone(name, shape=(1, 32, 32), kwargs=kwargs)
    assert feature_dim(model) == width == model(torch.randn(2, 1, 32, 32)).shape[1]


def test_is_vit():
    assert is_vit("vit_tiny_patch16_224") and is_vit("deit_small_patch16_224")
    assert is_vit("vit_video") and is_vit("vit_signal")
    assert not is_vit("resnet18")


def test_unknown_backbone_names_the_closest():
    with pytest.raises(
        ValueError, match="'vit_tiny_patch16_225'.*did you mean.*vit_tiny_patch16_224"
    ):
        build_backbone("vit_tiny_patch16_225", shape=(3, 16, 16), kwargs={})
    with pytest.raises(ValueError, match="with model.kwargs=.*depht"):
        build_backbone("vit_tiny_patch16_224", shape=(3, 16, 16), kwargs={"depht": 2})


VIT = ("vit_tiny_patch16_224", {"patch_size": 4, **SMALL})


@pytest.mark.parametrize("name, kwargs", [VIT, (MIXED[0], VIT[1]), ("resnet10t", {})])
def test_views_of_several_sizes_are_read_by_one_encoder(name, kwargs):
    shapes = {"shape": (3, 32, 32), "others": [(3, 32, 32), (3, 16, 16)]}
    model = build_backbone(name, kwargs=kwargs, **shapes).eval()
    arguments = backbone_arguments(name, shapes["shape"], kwargs)  # as the export says them
    for flexible in (False, True):
        flexible = {"dynamic_img_size": True} if flexible and "vit" in name else {}
        plain = timm.create_model(name, **arguments, **flexible).eval()
        plain.load_state_dict(model.state_dict())
        for side in (32, 16) if flexible else (32,):
            images = torch.randn(2, 3, side, side)
            torch.testing.assert_close(model(images), plain(images))


def test_a_model_of_one_size_is_refused():
    for name, kwargs, side, sentence in (
        (*VIT, 18, "sizes of 32 and 18, and .* not a multiple of the patches' 4.*give 16"),
        (VIT[0], {**VIT[1], "dynamic_img_size": False}, 16, "32 and 16, and .* 16-pixel images"),
        ("beit_base_patch16_224", VIT[1], 16, "take a convolutional network or a timm ViT"),
    ):
        with pytest.raises(ValueError, match=sentence):
            build_backbone(name, shape=(3, 32, 32), kwargs=kwargs, others=[(3, side, side)])


def test_a_model_of_another_image_size_is_refused():
    with pytest.raises(ValueError, match="does not take 16-pixel images"):
        build_backbone("vit_tiny_patch16_224", shape=(1, 16, 16), kwargs={"img_size": 32})
    with pytest.raises(ValueError, match="does not take 32-pixel images"):
        name = "swin_tiny_patch4_window7_224"
        build_backbone(name, shape=(3, 32, 32), kwargs={"window_size": 7, "img_size": 224})
