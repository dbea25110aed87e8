"""Published backbones, written as their authors write them, are read back whole: equal features."""

import re
from argparse import Namespace

import pytest
import timm
import torch

from fastssl.models import build_backbone, load_weights, read_weights

SMALL = {"embed_dim": 48, "depth": 4, "num_heads": 2}


def made(name, side, **changes):
    torch.manual_seed(3)
    model = timm.create_model(name, num_classes=0, img_size=side, **{**SMALL, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def head(name="head"):
    return {f"{name}.mlp.0.weight": torch.ones(3, 48), f"{name}.last_layer.weight_g": torch.ones(3)}


def under(prefix, state):
    return {f"{prefix}{key}": value for key, value in state.items()}


def chunked(state):
    """Two blocks a chunk, numbered through."""
    number = re.compile(r"^blocks\.(\d+)\.")
    found = {
        number.sub(lambda n: f"blocks.{int(n[1]) // 2}.{n[1]}.", k): v for k, v in state.items()
    }
    return found


def dinov2(model):
    """A teacher of a training by FSDP."""
    state = chunked(model.state_dict()) | {"mask_token": torch.zeros(1, 48)}
    return {"teacher": under("backbone.", state) | head("dino_head") | head("ibot_head")}


def dinov2_registers(model):
    """What is published: positions of the class token too, SwiGLU by its names."""
    state = model.state_dict()
    first = torch.randn(1, 1, 48)
    state["pos_embed"] = torch.cat([first, state["pos_embed"]], 1)
    state["cls_token"] = state["cls_token"] - first
    state["register_tokens"] = state.pop("reg_token")
    renamed = {
        k.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): v for k, v in state.items()
    }
    return renamed | {"mask_token": torch.zeros(1, 48)}


def dinov3(model):
    state = {}
    for key, value in model.state_dict().items():
        key = key.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
        state[key.replace("reg_token", "storage_tokens")] = value
    for q in [key for key in state if key.endswith("q_bias")]:
        v, stem = q.replace("q_bias", "v_bias"), q.removesuffix("q_bias")
        parts = [state.pop(q), torch.full((48,), 7.0), state.pop(v)]
        state |= {f"{stem}qkv.bias": torch.cat(parts), f"{stem}qkv.bias_mask": torch.ones(144)}
    return state | {"rope_embed.periods": torch.ones(6), "mask_token": torch.zeros(1, 48)}


def mae(model):
    decoder = {
        "decoder_embed.weight": torch.ones(2),
        "decoder_blocks.0.norm1.weight": torch.ones(2),
    }
    state = model.state_dict() | decoder | {"mask_token": torch.zeros(1, 1, 2)}
    return {"model": state, "epoch": 3, "args": Namespace(lr=1e-3)}


def dino(model):
    student = {k: torch.zeros_like(v) for k, v in model.state_dict().items()}
    parts = {"student": student, "teacher": model.state_dict()}
    states = {k: under("module.", under("backbone.", v) | head()) for k, v in parts.items()}
    return states | {"epoch": 3, "args": Namespace(lr=1e-3)}


def state_of_training(model):
    student = under("student.backbone.", {k: 0 * v for k, v in model.state_dict().items()})
    return {"model": under("teacher.backbone.", model.state_dict()) | student}


def ijepa(model):
    parts = {"encoder": {k: 0 * v for k, v in model.state_dict().items()}}
    parts["target_encoder"] = model.state_dict()
    return {name: under("module.", state) for name, state in parts.items()} | {"epoch": 1}


SWIGLU = "vit_giant_patch14_reg4_dinov2"


@pytest.mark.parametrize(
    "name, side, published, left",
    [
        ("vit_small_patch14_dinov2", 56, dinov2, 5),
        (SWIGLU, 56, dinov2_registers, 1),
        ("vit_small_patch16_dinov3_qkvb", 64, dinov3, 1),
        ("vit_small_patch16_224", 64, mae, 3),
        ("vit_small_patch16_224", 64, dino, 2),
        ("vit_small_patch16_224", 64, state_of_training, 54),
        ("vit_small_patch16_224", 64, ijepa, 0),
    ],
)
def test_every_tensor_is_read_back(name, side, published, left, tmp_path):
    theirs = made(name, side)
    torch.save(published(theirs), tmp_path / "w.pth")
    ours = build_backbone(name, shape=(3, side, side), kwargs=SMALL).eval()
    said = load_weights(ours, read_weights(tmp_path / "w.pth"), "w.pth")
    count = len(theirs.state_dict())
    assert f"{count} of {count} tensors loaded" in said
    assert (f"{left} of pretraining alone are left out" in said) == bool(left), said
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(*(m.forward_features(images) for m in (ours, theirs)))


def test_positions_of_another_grid_and_biases_that_have_no_place(tmp_path):
    theirs = made("vit_small_patch14_dinov2", 56)
    other = build_backbone("vit_small_patch14_dinov2", shape=(3, 28, 28), kwargs=SMALL)
    torch.save(dinov2(theirs), tmp_path / "w.pth")
    said = load_weights(other, read_weights(tmp_path / "w.pth"), "w")
    assert "resized: pos_embed 1x17x48 to 1x5x48" in said
    weights = dinov3(made("vit_small_patch16_dinov3_qkvb", 64))
    plain = build_backbone("vit_small_patch16_dinov3", shape=(3, 64, 64), kwargs=SMALL)
    with pytest.raises(ValueError, match="blocks.0.attn.qkv.bias is not 0.*ends in _qkvb"):
        load_weights(plain, weights, "w")
    none = {k: 0 * v if k.endswith("qkv.bias") else v for k, v in weights.items()}
    assert "tensors loaded" in load_weights(plain, none, "w")
    unmasked = {k: v for k, v in weights.items() if not k.endswith("bias_mask")}
    with_biases = build_backbone("vit_small_patch16_dinov3_qkvb", shape=(3, 64, 64), kwargs=SMALL)
    with pytest.raises(ValueError, match="has biases of keys"):
        load_weights(with_biases, unmasked, "w")
