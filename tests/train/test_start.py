"""A run that starts from the whole of another: encoder, heads, teacher."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from fastssl import cli
from fastssl.config import ConfigError
from fastssl.methods import MoCoV3
from fastssl.run.build import build
from fastssl.run.train import pretrain
from tests.runs import tiny


def export(cfg, *words):
    words = ["export", str(cfg.directory), *map(str, words)]
    result = CliRunner().invoke(cli.app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output.replace("\n", "")


def batch(side=16):
    torch.manual_seed(1)
    each = torch.arange(12)
    views = [torch.randn(12, 1, side, side) for _ in range(2)]
    return {"views": views, "index": each, "seeds": each, "label": each}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of MoCo v3 at stage 2, exported, and its method as the last step has left it."""
    made = []
    with pytest.MonkeyPatch.context() as patch:
        init = MoCoV3.__init__
        patch.setattr(MoCoV3, "__init__", lambda m, *a: (init(m, *a), made.append(m))[0])
        output = tmp_path_factory.mktemp("trained")
        cfg = tiny("mocov3", output, epochs=1, method__momentum=0.9, engine__zero_stage=2)
        pretrain(cfg)
    out = export(cfg, "--with-heads", "--out", output / "timm")
    file = output / "timm/method.safetensors"
    assert f"weights={file}" in out
    return cfg, made[-1], file


def test_the_next_run_goes_on_where_the_last_ended(trained, tmp_path):
    old, method, file = trained
    cfg = tiny("mocov3", tmp_path, weights=str(file), epochs=1, seed=9, method__momentum=0.9)
    notes = []
    new = build(cfg, 1, notes)
    assert notes[0].endswith("tensors of mocov3 loaded, heads and teacher too")
    torch.testing.assert_close(new.state_dict(), method.state_dict(), rtol=0, atol=0)
    with torch.no_grad():
        ours, theirs = (m.eval()(batch())["loss"] for m in (new, method))
        fresh = build(tiny("mocov3", tmp_path, seed=9), 1, []).eval()(batch())["loss"]
    assert ours == theirs and ours != fresh
    pretrain(cfg)
    longer = cfg.model_copy(update={"resume": "auto", "weights": str(file)})
    assert pretrain(longer)["train"]["steps"] == 5


def test_the_file_tells_whose_tensors_are_whose(trained, tmp_path):
    cfg, _, file = trained
    with safe_open(file, "pt") as opened:
        facts = opened.metadata()
    networks = {"encoder": "student.0.", "teacher": "teacher.model.0."}
    assert json.loads(facts["networks"]) == networks and facts["method"] == "mocov3"
    export(cfg, "--with-heads", "--format", "safetensors", "--out", tmp_path / "e.safetensors")
    whole, encoder = (load_file(tmp_path / f"e.{x}safetensors") for x in ("method.", ""))
    assert all(whole[f"student.0.{k}"].equal(v) for k, v in encoder.items())
    assert whole["predictor.0.weight"].dtype == torch.float32
    other = build(tiny("mocov3", tmp_path, weights=str(file), data__image_size=32), 1, [])
    for network in other.networks().values():  # positions are resampled in both
        assert network.pos_embed.shape[1] == 65


@pytest.mark.parametrize(
    "change, said",
    [
        ({"method__hidden_dim": 48}, "student.1.0.weight is 32x32 in it and 48x32 here"),
        ({"method__layers": 3}, "is not in it"),
        ({"name": "simclr"}, "is of the method mocov3, and method.name=simclr"),
        ({"file": "model.safetensors"}, "is of an encoder alone"),
        ({"file": "gone"}, "weights=.*gone: there is no such file"),
        ({"file": ""}, "is a directory: give the file that"),
    ],
)
def test_what_does_not_fit_is_refused(change, said, trained, tmp_path):
    *_, file = trained
    changes = {"weights": str(file.parent / change["file"]) if "file" in change else str(file)}
    changes |= {key: value for key, value in change.items() if key != "file"}
    with pytest.raises(ConfigError, match=said):
        build(tiny(change.get("name", "mocov3"), tmp_path, **changes), 1, [])


def test_two_encoders_to_start_from_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="weights=x has the encoder, and model.weights=timm"):
        tiny("mocov3", tmp_path, weights="x", model__weights="timm")
