"""Methods on clips, signals, rows and clouds: whole runs, plans, and gradients over ranks."""

import pytest
import torch
from safetensors.torch import load_file

from fastssl.config import ConfigError
from fastssl.diagnose.hardware import GPUS
from fastssl.diagnose.plan import make_plan
from fastssl.diagnose.speed import Cluster
from fastssl.export import export
from fastssl.models import channels_of
from fastssl.run.build import build
from fastssl.run.train import open_source, pretrain
from tests.methods.test_methods import learns
from tests.runs import OTHERS, tiny

CHANNELS = {"videomae": 3, "signal_mae": 1, "tjepa": 13, "point_mae": 3, "point_cmae": 3}
PICTURES = {"views.png", "reconstructions.png"}


def made(name, tmp_path, n=6, **changes):
    """The method, and a batch of n of its own samples."""
    cfg = tiny(name, tmp_path, **changes)
    source = open_source(cfg.data.source, cfg.seed).train
    method = build(cfg, source.channels).eval()
    spec = cfg.views()
    items = [spec.apply(source.item(7 * i), i)[0] for i in range(n)]
    each = torch.arange(n)
    return method, {"views": [torch.stack(items)], "index": each, "seeds": each + 11}


@pytest.mark.parametrize("name", ["videomae", "tjepa"])  # with pictures and without
def test_a_run_shows_itself(name, tmp_path):
    cfg = tiny(name, tmp_path, epochs=1, optim__lr=3e-3)
    results = pretrain(cfg)
    rows = {row["encoder"]: row for row in results["rows"]}
    assert set(rows) == {"pretrained", "random initialization", "raw input"}
    assert rows["pretrained"] != rows["random initialization"]
    shown = {p.name for p in cfg.directory.iterdir()}
    assert {"results.json", "report.html", "curves.png", "embedding.png"} <= shown
    assert shown & PICTURES == (set() if name == "tjepa" else PICTURES)
    out = export(cfg.directory, tmp_path / "encoder.safetensors", "safetensors")
    weights = load_file(out)
    model, of = cfg.model, lambda channels: cfg.views().shapes(channels)[0]
    channels = open_source(cfg.data.source, cfg.seed).train.channels
    assert channels_of(model.name, model.kwargs, weights, of) == channels
    with pytest.raises(ConfigError, match="timm is for timm's models"):
        export(cfg.directory, tmp_path / "timm", "timm")


@pytest.mark.parametrize("name", OTHERS)
def test_a_few_steps_learn(name, tmp_path):
    method, batch = made(name, tmp_path, n=16)
    learns(method.train(), batch)


@pytest.mark.parametrize("name", OTHERS)
def test_activations_are_what_autograd_keeps(name, tmp_path):
    changes = {"batch_size": 32, "model__kwargs__depth": 1}
    cfg = tiny(name, tmp_path, **changes)
    plan = make_plan(cfg, CHANNELS[name], Cluster(GPUS["h200"], 2, 1), images=64)
    real, batch = made(name, tmp_path, n=16, **changes)
    real.train()
    own = {p.untyped_storage().data_ptr() for p in real.parameters()}
    kept, alive = {}, []

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        real(batch, "encode")
    assert plan.sizes.parameters == sum(p.numel() for p in real.parameters())
    assert plan.counts.kept == pytest.approx(sum(kept.values()), rel=0.1)


@pytest.mark.parametrize("name", OTHERS)
def test_the_mean_over_ranks_is_the_joined_batch(name, tmp_path):
    """Loss and gradients: two halves, each with its own seeds, against both at once."""
    method, batch = made(name, tmp_path, n=8)
    method.double()
    batch["views"] = [batch["views"][0].double()]

    def gradients(part):
        method.zero_grad()
        rows = {k: v[part] for k, v in batch.items() if k != "views"}
        loss = method({**rows, "views": [batch["views"][0][part]]})["loss"]
        loss.backward()
        named = method.named_parameters()
        return loss.detach(), {n: p.grad.clone() for n, p in named if p.requires_grad}

    whole, halves = gradients(slice(8)), [gradients(slice(0, 4)), gradients(slice(4, 8))]
    torch.testing.assert_close((halves[0][0] + halves[1][0]) / 2, whole[0])
    for key, grad in whole[1].items():
        torch.testing.assert_close((halves[0][1][key] + halves[1][1][key]) / 2, grad, msg=key)


@pytest.mark.parametrize("name", OTHERS)
def test_every_trained_parameter_has_a_gradient(name, tmp_path):
    method, batch = made(name, tmp_path)
    method(batch)["loss"].backward()
    wrong = [n for n, p in method.named_parameters() if (p.grad is None) == p.requires_grad]
    assert not wrong


@pytest.mark.parametrize("name", OTHERS)
def test_the_loss_depends_on_the_seeds_alone(name, tmp_path):
    """Not on a generator: the same seeds, the same loss; other seeds, another."""
    method, batch = made(name, tmp_path)
    torch.manual_seed(1)
    first = method(batch)["loss"]
    torch.manual_seed(2)
    assert torch.equal(method(batch)["loss"], first)
    assert not torch.equal(method({**batch, "seeds": batch["seeds"] + 100})["loss"], first)


@pytest.mark.parametrize("name", OTHERS)
def test_features_in_bfloat16(name, tmp_path):
    method, batch = made(name, tmp_path)
    views = batch["views"][0]
    full = method.features(views)
    half = method.to(torch.bfloat16).features(views)
    assert half.dtype == full.dtype == torch.float32 and half.shape == full.shape
    assert torch.nn.functional.cosine_similarity(half, full).min() > 0.98
    loss = method({**batch})["loss"]
    assert loss.isfinite() and loss.dtype == torch.float32
