"""Weights that an encoder starts from: all of them used, or a sentence that says what was not."""

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed

from fastssl.models import build_backbone, load_weights, read_weights, timm_weights
from fastssl.run.build import build
from fastssl.run.train import pretrain
from tests.runs import VIT, tiny

NAME = "vit_tiny_patch16_224"


def backbone(side=16, channels=1, **changes):
    return build_backbone(NAME, shape=(channels, side, side), kwargs={**VIT, **changes})


@pytest.fixture
def file(tmp_path):
    """Weights of a classifier of 32-pixel images in color."""
    torch.manual_seed(5)
    model = timm.create_model(NAME, img_size=32, num_classes=10, **VIT)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def test_positions_and_channels_are_fitted_and_all_is_told(file):
    model, given = backbone(), read_weights(file)
    said = load_weights(model, given, "w.safetensors")
    now = model.state_dict()
    assert said.startswith(f"model.weights=w.safetensors: {len(now)} of {len(now)} tensors loaded")
    assert "pos_embed 1x65x32 to 1x17x32" in said and "patch_embed.proj.weight 32x3x4x4 to" in said
    torch.testing.assert_close(now["blocks.1.mlp.fc1.weight"], given["blocks.1.mlp.fc1.weight"])
    wanted = resample_abs_pos_embed(given["pos_embed"], [4, 4], num_prefix_tokens=1)
    torch.testing.assert_close(now["pos_embed"], wanted)
    gray = given["patch_embed.proj.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(now["patch_embed.proj.weight"], gray)


@pytest.mark.parametrize(
    "changes, refusal",
    [
        (
            {"depth": 3},
            r"12 of the model's tensors are not in them \(blocks.2.norm1.weight, .* and 8 ",
        ),
        ({"depth": 1}, r"12 of theirs are not the model's \(blocks.1"),
        ({"mlp_ratio": 2}, "6 have another shape .*blocks.0.mlp.fc1.weight 128x32 for 64x32"),
    ],
)
def test_less_than_everything_is_an_error_unless_partial(changes, refusal, file):
    model = backbone(**changes)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"model.weights=w: {refusal}.*or model.partial=true"):
        load_weights(model, read_weights(file), "w")
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    said = load_weights(model, read_weights(file), "w", partial=True)
    assert "tensors loaded" in said and refusal[:12] in said.replace("\\", "")
    assert not torch.equal(
        model.state_dict()["blocks.0.attn.qkv.weight"], before["blocks.0.attn.qkv.weight"]
    )


def test_what_fits_nowhere_or_is_no_file_is_refused(file, tmp_path):
    model = build_backbone("test_resnet", shape=(1, 32, 32), kwargs={})
    with pytest.raises(
        ValueError, match="of the model's tensors are not in them .*give those of this"
    ):
        load_weights(model, read_weights(file), "w", partial=True)
    with pytest.raises(ValueError, match="gone.safetensors: there is no such file"):
        read_weights(tmp_path / "gone.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="bad.safetensors holds no weights"):
        read_weights(tmp_path / "bad.safetensors")


def test_a_hub_that_does_not_answer_says_where_to_put_the_file(monkeypatch):
    def refuse(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(
        ValueError, match=r"cannot be fetched \(no network\): put the model.safetens"
    ):
        timm_weights("resnet18")
    with pytest.raises(ValueError, match="timm has no pretrained weights of vit_signal"):
        timm_weights("vit_signal")


def test_a_run_starts_from_another_and_goes_on_without_it(tmp_path):
    first = tiny("simclr", tmp_path, name="first", epochs=1)
    pretrain(first)
    saved = load_file(next(first.directory.glob("checkpoints/step-*/encoder.safetensors")))
    second = tiny("mae", tmp_path, name="second", epochs=1, model__weights=str(first.directory))
    notes: list[str] = []
    torch.testing.assert_close(build(second, 1, notes).encoder.state_dict(), saved, rtol=0, atol=0)
    assert len(notes) == 1 and "tensors loaded" in notes[0]
    pretrain(second)
    first.directory.rename(tmp_path / "elsewhere")
    longer = {"resume": "auto", "model__weights": str(first.directory)}
    pretrain(tiny("mae", tmp_path, name="second", epochs=1, **longer))
