"""Contrast between streams, and what a run over several encoders keeps of each."""

from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import fastssl
from fastssl.config import ConfigError, differences, from_mapping, load, resolve
from fastssl.data.datasets import SOURCES, register_source
from fastssl.methods import build_method
from fastssl.methods.configs import CMCConfig
from fastssl.run.build import build
from fastssl.run.train import pretrain
from tests.methods.test_methods import learns
from tests.runs import VIT, final
from tests.test_plugins import call
from tests.train.test_streams_run import PairsSource

RECIPE = """
name: both
device: cpu
epochs: 2
batch_size: 8
method: {name: cmc, hidden_dim: 16, projection_dim: 8}
model:
  image: {name: test_resnet}
  depth: {name: vit_tiny_patch16_224, kwargs: {patch_size: 4, embed_dim: 48, depth: 1}}
data:
  source: {name: pairs}
  image_size: 32
  workers: 0
  streams: {image: {}, depth: {shares: image, image_size: 16}}
log: {tensorboard: false, every: 1}
evaluate: {neighbors: 3}
"""


@pytest.fixture(autouse=True)
def pairs():
    before = dict(SOURCES.entries)
    register_source(PairsSource)
    yield
    SOURCES.entries = before


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "both.yaml").write_text(RECIPE)
    return tmp_path / "both.yaml", f"output={tmp_path}"


def flat(side):
    return nn.Sequential(nn.Flatten(), nn.Linear(side, 6))


def test_the_loss_is_the_mean_of_all_pairs_both_ways():
    encoders = {name: flat(side) for name, side in (("a", 12), ("b", 27), ("c", 5))}
    for network in encoders.values():
        network.num_features = 6
    ours = build_method(encoders, CMCConfig(hidden_dim=16, projection_dim=8, temperature=0.5))
    sides = {"a": (3, 2, 2), "b": (3, 3, 3), "c": (5,)}
    views = {name: [torch.randn(10, *shape)] for name, shape in sides.items()}
    z = [F.normalize(ours.heads[n](encoders[n](views[n][0])), dim=1) for n in encoders]
    each, terms = torch.arange(10), []
    for a, b in combinations(z, 2):
        scores = a @ b.T / 0.5
        terms += [F.cross_entropy(scores, each), F.cross_entropy(scores.T, each)]
    torch.testing.assert_close(ours({"views": views})["loss"], torch.stack(terms).mean())
    assert list(ours.networks()) == ["a", "b", "c"] and ours.encoder is encoders["a"]
    learns(ours, {"views": views})


def test_each_streams_encoder_is_kept_resumed_and_exported(recipe, tmp_path):
    path, output = recipe
    code, out = call("pretrain", path, "--dry-run", output)
    assert code == 0 and '"depth":\n    name: "vit_tiny_patch16_224"  # Any timm' in out, out
    cfg = resolve(str(path), [output])
    pretrain(cfg)
    assert load(cfg.directory).model == cfg.model and list(cfg.model) == ["image", "depth"]
    before, checkpoints = final(cfg), cfg.directory / "checkpoints"
    first, last = sorted(checkpoints.glob("step-*"))
    for file in (last, checkpoints / "latest"):
        file.rename(tmp_path / file.name)
    pretrain(cfg.model_copy(update={"resume": "auto"}))
    assert final(cfg) == before
    whole = load_file(last / "encoder-depth.safetensors")
    code, out = call("export", cfg.directory, "--encoder", "depth", "--format", "safetensors")
    assert code == 0, out
    out = load_file(cfg.directory / "encoder-depth.safetensors")
    assert whole.keys() == out.keys() and all(torch.equal(out[k], whole[k]) for k in whole)
    code, out = call("export", cfg.directory, "--out", tmp_path / "timm")
    assert code == 0, out
    code, out = call("eval", cfg.directory, "--encoder", "depth")
    assert code == 0 and "knn" in out, out
    for name, width in (("depth", 48), ("image", 96)):
        file = tmp_path / f"{name}.npz"
        code, out = call("embed", cfg.directory, "pairs", "--encoder", name, "--out", file)
        assert code == 0, out
        assert np.load(file)["features"].shape == (26, width)
    code, out = call("eval", cfg.directory, "--encoder", "deepth")
    assert code != 0 and "no encoder of the name 'deepth'; there are: image, depth" in out


def test_modules_by_stream_from_python_and_a_frozen_one(tmp_path):
    image, depth = flat(3 * 256), flat(256)
    before = [{k: v.clone() for k, v in own.state_dict().items()} for own in (image, depth)]
    keys = ["epochs=1", "batch_size=8", "device=cpu", "data.workers=0", "data.image_size=16"]
    keys += ["log.tensorboard=false", "evaluate.neighbors=3", f"output={tmp_path}"]
    keys += ["data.streams.image={}", "data.streams.depth={}", "method.hidden_dim=8"]
    fixed = "model.image.frozen=true"
    fastssl.pretrain("cmc", {"image": image, "depth": depth}, "pairs", fixed, *keys, name="x")
    torch.testing.assert_close(image.state_dict(), before[0], rtol=0, atol=0)
    assert not torch.equal(depth[1].weight, before[1]["1.weight"])
    (folder,) = (tmp_path / "x/checkpoints").glob("step-*")
    assert [f.name for f in folder.glob("encoder*")] == ["encoder-depth.safetensors"]
    one = {"name": "vit_tiny_patch16_224", "kwargs": VIT}
    with pytest.raises(ConfigError, match="each of the streams image, depth has an encoder: give"):
        fastssl.pretrain("cmc", image, "pairs", *keys, name="y")
    with pytest.raises(ConfigError, match="model has image, and data.streams are image, depth: na"):
        fastssl.pretrain("cmc", {"image": image}, "pairs", *keys, name="y")
    with pytest.raises(ConfigError, match="the encoder of depth: .*does not take 16-pixel images"):
        fastssl.pretrain("cmc", {"image": one, "depth": image}, "pairs", *keys, name="y")
    assert not (tmp_path / "y").exists()


def test_models_by_stream_are_checked_like_one(recipe):
    path, output = recipe
    for override, refusal in {
        "model.depth.nmae=x": "unknown key model.depth.nmae='x' .did you mean name",
        "model.depth.name=resnet19": "'resnet19' is not a timm model; did you mean resnet18",
        "model.depth.frozen=3": "model.depth.frozen=3 is refused: input should be a valid boolean",
        "model.depth.frozen=true": "model.depth.frozen=true .* give model.depth.weights=timm",
        "model.depth=resnet18": "model.depth='resnet18' is no model: give keys, as model.d",
        "data.streams.depth=3": "data.streams.depth=3 is refused: input should be a mapping",
        "model.weights=timm": "model.weights and model.image are given: model is one, or one for",
        "model.sound.name=resnet18": "model has image, depth, sound, and data.streams are image, d",
    }.items():
        with pytest.raises(ConfigError, match=refusal):
            resolve(str(path), [override])
    mapping = resolve(str(path)).model_dump(mode="json")
    mapping["model"]["depth"]["weights"] = "nowhere"
    with pytest.raises(ConfigError, match="of depth: model.depth.weights=nowhere: there is no"):
        build(from_mapping(mapping), {"image": 3, "depth": 1}, [])
    mapping["data"]["streams"]["depth"]["shares"] = None
    turned = {**mapping, "model": dict(reversed(mapping["model"].items()))}
    turned["data"] = {**mapping["data"]}
    turned["data"]["streams"] = dict(reversed(mapping["data"]["streams"].items()))
    changed = differences(from_mapping(mapping), from_mapping(turned))
    assert changed == ["data.streams: image, depth -> depth, image"]  # another is the primary one
    other = resolve(str(path), ["model.depth.name=resnet18"]).model["depth"]
    assert other.name == "resnet18" and other.kwargs == {}
    assert resolve(str(path), ["model.name=resnet18"]).model.name == "resnet18"
    with pytest.raises(ConfigError, match="model.3='x' is no model: give keys, as model.3.name"):
        from_mapping({"model": {"image": {"name": "resnet18"}, 3: "x"}})
    with pytest.raises(ConfigError, match="model.name and model.depth are given"):
        from_mapping({"model": {"name": "resnet18", "depth": {"name": "resnet18"}}})
