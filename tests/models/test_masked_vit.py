"""MaskedViT against timm's own embed-then-drop, values and gradients in float64."""

import pytest
import timm
import torch

from fastssl.masking import random_masking
from fastssl.models import MAEDecoder, MaskedViT, build_backbone, feature_dim, is_vit

KINDS = {
    "class token": {},
    "registers, no class position": {"reg_tokens": 2, "no_embed_class": True},
    "no prefix": {"class_token": False},
    "norm before, layer scale": {"pre_norm": True, "init_values": 0.1},
}


def vit(**kwargs):
    torch.manual_seed(0)
    shape = {"patch_size": (4, 2), "embed_dim": 24, "depth": 2, "num_heads": 3}
    model = build_backbone(
        "vit_tiny_patch16_224", shape=(3, 12, 12), kwargs={**shape, **kwargs}
    )
    for parameter in model.parameters():  # zeros and ones would hide a mistake
        torch.nn.init.normal_(parameter, std=0.1)
    return model.double()


def embed_then_drop(model, images, ids):
    """The definition: timm embeds everything, then hidden patches are dropped."""
    P = model.num_prefix_tokens
    x = model._pos_embed(model.patch_embed(images))
    kept = x[:, P:].gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))
    return model.norm(model.blocks(model.norm_pre(torch.cat([x[:, :P], kept], 1))))


@pytest.mark.parametrize("kwargs", KINDS.values(), ids=KINDS)
def test_equals_embed_then_drop(kwargs):
    model = vit(**kwargs)
    masked = MaskedViT(model)
    assert masked.num_patches == 18 and masked.patch == (4, 2)
    images = torch.randn(5, 3, 12, 12, dtype=torch.float64)
    ids = random_masking(torch.arange(5), 18, 7).visible
    upstream = torch.randn(5, model.num_prefix_tokens + 7, 24, dtype=torch.float64)
    both = []
    for forward in (masked, lambda x, i: embed_then_drop(model, x, i)):
        model.zero_grad()
        out = forward(images, ids)
        out.backward(upstream)
        both.append(
            (out, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        )
    torch.testing.assert_close(both[0][0], both[1][0], rtol=1e-12, atol=1e-12)
    assert both[0][1].keys() == both[1][1].keys()
    for name, grad in both[0][1].items():
        torch.testing.assert_close(grad, both[1][1][name], rtol=1e-10, atol=1e-12, msg=name)


def test_models_that_cannot_be_masked_are_refused():
    with pytest.raises(ValueError, match="VisionTransformer.*ResNet"):
        MaskedViT(timm.create_model("resnet10t"))
    with pytest.raises(ValueError, match="learned positions"):
        MaskedViT(vit(pos_embed="none"))


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
    "name, kwargs, width", [("resnet10t", {}, 512), ("vit_tiny_patch16_224", {}, 192)]
)
def test_backbone_features(name, kwargs, width):
    model = build_backbone(name, shape=(1, 32, 32), kwargs=kwargs)
    assert feature_dim(model) == width == model(torch.randn(2, 1, 32, 32)).shape[1]


def test_is_vit():
    assert is_vit("vit_tiny_patch16_224") and is_vit("deit_small_patch16_224")
    assert not is_vit("resnet18")


def test_unknown_backbone_names_the_closest():
    with pytest.raises(
        ValueError, match="'vit_tiny_patch16_225'.*did you mean.*vit_tiny_patch16_224"
    ):
        build_backbone("vit_tiny_patch16_225", shape=(3, 16, 16), kwargs={})
    with pytest.raises(ValueError, match="with model.kwargs=.*depht"):
        build_backbone("vit_tiny_patch16_224", shape=(3, 16, 16), kwargs={"depht": 2})


def test_a_model_of_another_image_size_is_refused():
    with pytest.raises(ValueError, match="does not take 16-pixel images"):
        build_backbone("vit_tiny_patch16_224", shape=(1, 16, 16), kwargs={"img_size": 32})
    with pytest.raises(ValueError, match="does not take 32-pixel images"):
        name = "swin_tiny_patch4_window7_224"
        build_backbone(name, shape=(3, 32, 32), kwargs={"window_size": 7, "img_size": 224})
