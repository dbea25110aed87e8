"""The full recipes of DINO's kin have their authors' hyperparameters, number by number."""

import math

import pytest

from fastssl.config import resolve
from fastssl.data.views.image import Views
from fastssl.engine.optim import build_optimizer
from fastssl.run import build
from fastssl.schedules.config import at

IMAGES = {"im1k": 1_281_167, "im22k": 14_197_122, "lvd": 142_000_000}
COMMON = {"betas": (0.9, 0.999), "student_temp": 0.1, "layers": 3, "hidden_dim": 2048}
V2 = COMMON | {
    **{"koleo_weight": 0.1, "dino_weight": 1, "ibot_weight": 1, "min_lr": 1e-6, "clips": 3.0},
    **{"temps": (0.04, 0.07), "locals": 8, "patch_lr": 0.2, "scales": ((0.32, 1), (0.05, 0.32))},
    **{"mask_share": 0.5, "mask_range": (0.1, 0.5), "center_momentum": 0.9, "warm_temp": 30},
}
SHORT = V2 | {
    **{"data": "im1k", "steps": 100 * 1250, "unit": 1250, "batch_size": 2048, "epochs_said": 100},
    **{"prototypes": 65536, "bottleneck_dim": 256, "warmup": 10, "decay": (0.04, 0.4)},
    **{"layer_decay": 0.9, "momentum": (0.992, 1), "drop_path": 0.3, "local": 96},
    **{"lr": 4e-3 * math.sqrt(2048 / 1024)},
}
LARGE = V2 | {
    **{"data": "im22k", "steps": 500 * 1250, "unit": 1250, "batch_size": 3072, "epochs_said": 500},
    **{"prototypes": 131072, "bottleneck_dim": 384, "patch_prototypes": 131072},
    **{"patch_bottleneck_dim": 256, "assignment": "sinkhorn", "warmup": 80, "decay": (0.04, 0.2)},
    **{"layer_decay": 1.0, "momentum": (0.994, 1), "drop_path": 0.4, "local": 98},
    **{"lr": 2e-4 * math.sqrt(3072 / 1024)},
}
DINO = COMMON | {
    **{"data": "im1k", "min_lr": 1e-6, "clip_each": 3.0, "decay": (0.04, 0.4), "warmup": 10},
    **{"momentum": (0.996, 1), "center_momentum": 0.9, "bottleneck_dim": 256, "local": 96},
    **{"layer_decay": 1.0, "assignment": "center", "unit": 0},
}
AUTHORS = {
    "dinov2-vitl16-short": SHORT | {"assignment": "center", "patch_prototypes": None},
    "dinov2-vitl14": LARGE,
    "dinov2-vitg14": LARGE | {"data": "lvd"},
    "dinov3-vitl16": SHORT
    | {"assignment": "sinkhorn", "patch_prototypes": 65536, "last_layer": "plain"}
    | {"lr": 4 * 1e-3 * math.sqrt(2048 / 1024)},
    "dino-vits16": DINO
    | {"epochs_said": 100, "batch_size": 512, "lr": 5e-4 * 512 / 256, "prototypes": 65536}
    | {"temps": (0.04, 0.04), "warm_temp": 100, "locals": 8, "scales": ((0.4, 1), (0.05, 0.4))},
    "ibot-vits16": DINO
    | {"epochs_said": 800, "batch_size": 1024, "lr": 5e-4 * 1024 / 256, "prototypes": 8192}
    | {"temps": (0.04, 0.07), "warm_temp": 30, "locals": 10, "scales": ((0.25, 1), (0.05, 0.25))}
    | {"koleo_weight": 0, "mask_share": 0.5, "mask_range": (0.1, 0.5), "patch_prototypes": None},
}


@pytest.mark.parametrize("name", AUTHORS)
def test_a_full_recipe_has_its_authors_numbers(name):
    want, cfg = AUTHORS[name], resolve(name, ["data.source.path=/data"])
    method, optim = cfg.method, cfg.optim
    own = [key for key in want if key in type(method).model_fields and key != "momentum"]
    assert {key: getattr(method, key) for key in own} == {key: want[key] for key in own}
    assert (cfg.batch_size, optim.name) == (want["batch_size"], "adamw")
    assert optim.layer_decay == want["layer_decay"]
    assert optim.betas in (None, want["betas"])  # AdamW's own
    steps = want.get("steps") or want["epochs_said"] * IMAGES["im1k"] // want["batch_size"]
    ours = cfg.epochs * IMAGES[want["data"]] / want["batch_size"]
    assert ours == pytest.approx(steps, rel=0.05)

    views = cfg.views()
    assert isinstance(views, Views)
    assert [v.size for v in views.crops] == [224] * 2 + [want["local"]] * want["locals"]
    assert (views.crops[0].crop_scale, views.crops[2].crop_scale) == want["scales"]
    assert all(v.crop_scale == views.crops[0].crop_scale for v in views.crops[:2])


def theirs(start, base, final, warmup, steps, it):
    """linspace(start, base, warmup), then half a cosine over the remaining iterations."""
    if it < warmup:
        return start + (base - start) * it / (warmup - 1)
    return final + (base - final) * (1 + math.cos(math.pi * (it - warmup) / (steps - warmup))) / 2


@pytest.mark.parametrize("name", AUTHORS)
def test_the_schedules_are_their_formulas(name):
    want, cfg = AUTHORS[name], resolve(name, ["data.source.path=/data"])
    epochs, N = want["epochs_said"], 20_000  # iterations; the formulas are of their share
    warm, lr = want["warmup"] * N // epochs, cfg.optim.lr
    assert lr == pytest.approx(want["lr"], rel=1e-4)
    for it in range(0, N, 7):
        share = it / N
        rate = lr * cfg.optim.schedule.factor(it, N)  # at the middle of the step
        wanted = theirs(0, want["lr"], want["min_lr"], warm, N, it)
        assert rate == pytest.approx(wanted, abs=1.1 * want["lr"] / warm)
        decay = theirs(*2 * want["decay"][:1], want["decay"][1], 0, N, it)
        assert at(cfg.optim.weight_decay, share) == pytest.approx(decay, rel=1e-6)
        momentum = theirs(*2 * want["momentum"][:1], want["momentum"][1], 0, N, it)
        assert at(cfg.method.momentum, share) == pytest.approx(momentum, rel=1e-6)
        first, last = want["temps"]
        temp = first + (last - first) * min(share * epochs / want["warm_temp"], 1)
        assert at(cfg.method.teacher_temp, share) == pytest.approx(temp, rel=1e-6)
    end = cfg.optim.schedule.at(1.0) * lr
    assert end == pytest.approx(want["min_lr"], rel=1e-3)


@pytest.mark.parametrize("name", AUTHORS)
def test_each_parameter_has_the_rate_and_decay_of_its_kind(name):
    """lr decay^(L + 1 - layer), a fifth in the patch embedding; biases, norms and gammas do not
    decay, and all else does."""
    want = AUTHORS[name]
    tiny = ["model.kwargs.embed_dim=32", "model.kwargs.depth=2", "model.kwargs.num_heads=2"]
    tiny += ["method.hidden_dim=8", "method.prototypes=12"]
    own = resolve(name, ["data.source.path=/data"]).method
    if getattr(own, "patch_prototypes", None):
        tiny += ["method.patch_prototypes=12"]
    cfg = resolve(name, ["data.source.path=/data", *tiny])
    method = build.build(cfg, 3)
    groups = build_optimizer(method, cfg.optim).param_groups
    of = {id(p): group for group in groups for p in group["params"]}
    patch, decays = want.get("patch_lr", 1.0), want["layer_decay"]
    for key, p in method.named_parameters():
        if not p.requires_grad:
            continue
        layer = 3  # of L + 1
        if "blocks." in key:
            layer = int(key.split("blocks.")[1].split(".")[0]) + 1
        elif any(word in key for word in ("token", "pos_embed", "patch_embed")):
            layer = 0
        power = 25 - 3 if key == "mask_token" and decays < 1 else 0  # its rule counts 24 blocks
        scale = decays ** (3 - layer + power) * (patch if "patch_embed" in key else 1.0)
        assert of[id(p)]["lr_scale"] == pytest.approx(scale, rel=1e-4), key
        still = key.endswith("bias") or "norm" in key or "gamma" in key
        assert (of[id(p)]["weight_decay"] == 0) == still, key
        frozen = of[id(p)]["frozen_for"]
        if ".last." in key:
            one = cfg.epochs / want["epochs_said"] * (0 if "freeze" in want else 1)
            assert frozen == pytest.approx(one, rel=0.05), key
        else:
            assert frozen == 0, key
    clips = {rule.clip for rule in cfg.optim.groups if rule.clip is not None}
    assert clips == ({want["clips"]} if "clips" in want else set())
    assert cfg.optim.clip_each == want.get("clip_each", 0)
