"""The recipes at scale: each fits the hardware that it names, and its small twin trains."""

import math
import os
import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch

from fastssl.config import RunConfig, recipes, resolve
from fastssl.data.datasets import open_source
from fastssl.engine import launch
from fastssl.engine.engine import Engine
from fastssl.run import build
from tests.ranks import run_ranks
from tests.runs import weights_of

spec = spec_from_file_location("make_scale", Path(__file__).parents[1] / "docs/make_scale.py")
assert spec and spec.loader
scale = module_from_spec(spec)
spec.loader.exec_module(scale)
RECIPES = scale.planned()

SMALL = """\
epochs=1 batch_size=16 data.image_size={side} data.workers=0
data.source.name={source} data.source.classes=4 data.source.per_class=11 data.source.size={side}
engine.zero_stage=3 engine.zero.persistence_threshold=0
model.kwargs.embed_dim=32 model.kwargs.depth=2 model.kwargs.num_heads=2"""
HEADS = "method.hidden_dim=32 method.projection_dim=16"
DECODER = "method.decoder_dim=32 method.decoder_depth=1 method.decoder_heads=2"
SCORES = "method.hidden_dim=16 method.prototypes=24 method.bottleneck_dim=8"
SCORES += " method.patch_prototypes=20 method.patch_bottleneck_dim=6"
OWN = {
    "dinov2-vit5b": "model.kwargs.num_kv_heads=1 model.kwargs.img_size=64 "
    "data.overrides.local_size=32",
    "dinov2-vitg14": "data.overrides.local_size=28",
    "dinov2-vit10b": "data.overrides.local_size=28",
    "simclr-vitb16-65536": "engine.accumulation=4 data.backend=auto",
    "mae-vit5b": "model.kwargs.num_kv_heads=1 model.kwargs.img_size=64",
    "videomae2-vitg14": "data.source.frames=16",
}
SIZES = tuple(  # keys, or the beginnings of keys, that a twin has of its own
    """batch_size epochs model.kwargs data.image_size data.workers data.source data.backend
    engine.accumulation engine.zero_stage engine.zero.persistence_threshold method.hidden_dim
    method.projection_dim method.decoder_ method.prototypes method.bottleneck_dim method.patch_
    data.overrides.local_size""".split()
)
STILL = {  # of the encoder, what two steps leave as it was
    "mocov3-vitl16": {"patch_embed.proj.weight", "patch_embed.proj.bias"},
    "videomae2-vitg14": {"pos_embed"},
}


def twin(name: str) -> RunConfig:
    """The recipe of two steps of 16 images: other sizes and data, at stage 3."""
    whole = resolve(name, ["data.source.path=/data"])
    clips = whole.data.source.name == "frames"
    side = (
        56 if whole.data.image_size % 14 == 0 and "patch16" not in whole.model_of("").name else 64
    )
    words = SMALL.format(side=side, source="clips" if clips else "fractals")
    heads = DECODER if "mae" in name else SCORES if "dinov2" in name else HEADS
    own = [*heads.split(), *OWN.get(name, "").split()]
    return resolve(name, [*words.split(), *own])


def apart(one: RunConfig, other: RunConfig) -> list[str]:
    """The keys, dotted, whose values differ."""

    def flat(tree: object, path: str) -> dict[str, object]:
        if not isinstance(tree, dict):
            return {path: tree}
        parts = [flat(value, f"{path}.{key}".lstrip(".")) for key, value in tree.items()]
        return {key: value for part in parts for key, value in part.items()}

    a, b = (flat(cfg.model_dump(mode="json"), "") for cfg in (one, other))
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))


def train(rank: int, world: int) -> dict[str, Any]:
    """Two steps of every twin, built without memory as the recipes are.

    By recipe: what is said of the building, the losses, and tensors of the encoder that stay.
    """
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    build.LARGE = 0
    with launch.session("cpu") as device:
        return {name: steps(twin(name), device) for name in RECIPES}


def steps(cfg: RunConfig, device: torch.device) -> tuple[list[str], list[float], set[str]]:
    split = open_source(cfg.data.source, cfg.seed)
    cfg, notes = build.fitted(cfg, split.train), []
    method, deferred = build.begin(cfg, split.train.channels, notes)
    loader = build.build_loader(cfg, split.train, device)
    how: dict[str, Any] = {"device": device, "batch_size": cfg.batch_size, "deferred": deferred}
    engine = Engine(method, cfg.optim, cfg.engine, **how)
    own = "student" if "student" in method.networks() else ""  # a teacher moves by less
    before, losses, total = weights_of(engine, own), [], loader.steps_per_epoch
    assert total == 2
    for step, batch in enumerate(loader.stream(0, total)):
        assert batch.pop("bad") == []
        lr = cfg.optim.lr * cfg.optim.schedule.factor(step, total)
        done = engine.step(batch, lr, progress=(step + 1) / total, epoch=step / total)
        losses.append(done.metrics["loss"].item() if done.applied else math.nan)
    after = weights_of(engine, own)
    return notes, losses, {key for key in after if torch.equal(after[key], before[key])}


@pytest.fixture(scope="module")
def trained():
    return run_ranks(train, 2)


@pytest.fixture(scope="module")
def plans():
    return {name: scale.plan(name) for name in RECIPES}


@pytest.mark.parametrize("name", RECIPES)
def test_its_twin_trains_at_stage_3(name, trained):
    whole = resolve(name, ["data.source.path=/data"])
    assert [key for key in apart(whole, twin(name)) if not key.startswith(SIZES)] == []
    for notes, losses, still in (rank[name] for rank in trained):
        assert notes == [] and all(map(math.isfinite, losses))
        assert still == STILL.get(name, set())


@pytest.mark.parametrize("name", RECIPES)
def test_it_fits_what_it_is_planned_for(name, plans):
    made = plans[name]
    assert made["memory"]["fits"]
    for billions in re.findall(r"([\d.]+) billion", recipes()[name].read_text().splitlines()[0]):
        both = 2 if "dinov2" in name else 1  # with its teacher
        assert made["parameters"] / both == pytest.approx(1e9 * float(billions), rel=0.05)


def test_the_page_has_these_plans(plans):
    def numbers(line: str) -> list[float]:
        return [float(n.replace(",", "")) for n in re.findall(r"\d[\d,]*\.?\d*", line)]

    page = scale.PAGE.read_text()
    table = page.partition(scale.BEGIN)[2].partition(scale.END)[0].splitlines()
    wanted = (scale.HEAD + "".join(scale.row(*each) for each in plans.items())).splitlines()
    assert len(table) == len(wanted), "python docs/make_scale.py"
    for line, new in zip(table, wanted, strict=True):
        told = f"{line!r} is {new!r} now: python docs/make_scale.py"
        assert re.sub(r"[\d,.]+", "n", line) == re.sub(r"[\d,.]+", "n", new), told
        assert numbers(line) == pytest.approx(numbers(new), rel=0.03, abs=1), told
