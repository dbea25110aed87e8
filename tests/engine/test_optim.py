"""Names, options, parameter groups and schedules of the optimizers."""

import sys
import types

import pytest
import timm
import timm.optim
import torch
from pydantic import ValidationError
from torch import nn

from fastssl.engine.groups import GroupConfig, own_rules, parameter_groups
from fastssl.engine.layerwise import LAMB, LARS
from fastssl.engine.optim import (
    ELEMENTWISE,
    OptimConfig,
    _any_not_finite,
    build_optimizer,
    check_optimizer,
)
from fastssl.schedules.config import ConstantSchedule, CosineSchedule, InfiniteSchedule


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.vit = timm.create_model(
            "vit_tiny_patch16_224", img_size=16, depth=1, embed_dim=12, num_heads=2, reg_tokens=2
        )
        self.head = nn.Sequential(nn.Linear(12, 6), nn.BatchNorm1d(6), nn.Linear(6, 3, bias=False))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 12))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 4, 12))
        self.gain = nn.Parameter(torch.ones(2, 2))
        self.fixed = nn.Parameter(torch.ones(2, 2), requires_grad=False)

    def no_weight_decay(self):
        return {"ga*"}


def grouped_names(model: nn.Module, weight_decay: float) -> list[set[str]]:
    names = {id(p): n for n, p in model.named_parameters()}
    return [{names[id(p)] for p in g["params"]} for g in parameter_groups(model, weight_decay)]


def test_decay_is_for_matrices_only():
    model = Backbone()
    decayed, plain = grouped_names(model, 0.1)
    tokens = {"vit.cls_token", "vit.reg_token", "vit.pos_embed", "mask_token", "gain"}
    tokens |= {"decoder_pos_embed"}
    assert tokens | {"vit.norm.weight", "head.0.bias", "head.1.weight"} <= plain
    assert "vit.patch_embed.proj.weight" in decayed and "head.2.weight" in decayed
    shapes = dict(model.named_parameters())
    assert {n for n in plain if shapes[n].ndim > 1} == tokens
    assert decayed | plain == {n for n, p in model.named_parameters() if p.requires_grad}
    settings = [(g["weight_decay"], g["adapt"]) for g in parameter_groups(model, 0.1)]
    assert settings == [(0.1, True), (0.0, False)]


def test_groups_agree_with_timms_on_a_vit():
    vit = Backbone().vit
    theirs = timm.optim.param_groups_weight_decay(
        vit, 0.1, no_weight_decay_list=("*_token", "pos*")
    )
    for ours in parameter_groups(vit, 0.1):
        match = next(g for g in theirs if g["weight_decay"] == ours["weight_decay"])
        assert {id(p) for p in ours["params"]} == {id(p) for p in match["params"]}


def test_layers_decay_as_timms_do_and_the_head_does_not():
    model = nn.Module()
    model.encoder, model.head = Backbone().vit, nn.Linear(3, 3)
    theirs = timm.optim.param_groups_layer_decay(
        model.encoder, 0.1, layer_decay=0.5, no_weight_decay_list=("*_token", "pos_embed")
    )
    wanted = {id(p): (g["lr_scale"], g["weight_decay"]) for g in theirs for p in g["params"]}
    wanted |= {id(model.head.weight): (1.0, 0.1), id(model.head.bias): (1.0, 0.0)}
    ours = parameter_groups(model, 0.1, 0.5)
    assert {id(p): (g["lr_scale"], g["weight_decay"]) for g in ours for p in g["params"]} == wanted
    assert len({g["lr_scale"] for g in ours}) > 2
    one, other = Backbone().vit, Backbone().vit.requires_grad_(False)
    model.networks = lambda: {"image": model.encoder, "depth": one, "frozen": other}
    model.one, model.other = one, other
    scales = [
        {id(p): g["lr_scale"] for p in g["params"]} for g in parameter_groups(model, 0.1, 0.5)
    ]
    scale = {key: value for part in scales for key, value in part.items()}
    for mine, first in zip(one.parameters(), model.encoder.parameters(), strict=True):
        assert scale[id(mine)] == scale[id(first)]
    del model.networks
    model.encoder = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"optim.layer_decay=0.5 wants .* which Linear is not"):
        parameter_groups(model, 0.1, 0.5)


def test_rates_and_decay_go_with_the_progress():
    groups = [
        {"lr_scale": scale, "adapt": adapt, "weight_decay": 0.04 * adapt, "decay_by": None}
        for scale, adapt in ((1.0, True), (0.5, False))
    ]
    rising = CosineSchedule(start=0.04, end=0.4)
    for progress, decay in ((0.0, 0.04), (0.5, 0.22), (1.0, 0.4)):
        OptimConfig(weight_decay=rising).set_rates(groups, 0.1, progress)
        assert [g["lr"] for g in groups] == [0.1, 0.05]
        assert groups[0]["weight_decay"] == pytest.approx(decay) and groups[1]["weight_decay"] == 0
    OptimConfig(weight_decay=0.04).set_rates(groups, 0.1, 1.0)
    assert groups[0]["weight_decay"] == 0.04


class Tower(nn.Module):
    """A method whose encoder is not under that name, and a teacher that is not trained."""

    def __init__(self):
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        self.head = nn.Linear(3, 2)
        self.teacher = nn.Linear(3, 3).requires_grad_(False)

    @property
    def encoder(self):
        return self.tower


def test_of_each_key_the_last_rule_that_gives_it_holds():
    model = Tower()
    rules = (
        GroupConfig(match="*", weight_decay=0.3, clip=1.0),
        GroupConfig(match="encoder.0.*", lr_scale=0.5),
        GroupConfig(match="*.bias", weight_decay=0.0, freeze_epochs=2.5),
        GroupConfig(match="head.weight", lr_scale=0.25, clip=0.0),
    )
    names = {id(p): n for n, p in model.named_parameters()}
    keys = ("lr_scale", "weight_decay", "adapt", "frozen_for")
    groups = parameter_groups(model, 0.1, rules=rules)
    found = {names[id(p)]: tuple(g[k] for k in keys) for g in groups for p in g["params"]}
    assert found == {
        "tower.0.weight": (0.5, 0.3, True, 0.0),
        "tower.0.bias": (0.5, 0.0, False, 2.5),
        "tower.1.weight": (1.0, 0.3, True, 0.0),
        "tower.1.bias": (1.0, 0.0, False, 2.5),
        "head.weight": (0.25, 0.3, True, 0.0),
        "head.bias": (1.0, 0.0, False, 2.5),
    }
    assert {names[key]: own.clip for key, own in own_rules(model, rules).items()} == {
        name: 3 if name == "head.weight" else 0 for name in found
    }
    falling = GroupConfig(match="head.*", weight_decay=(0.2, 0.1))
    cfg = OptimConfig(weight_decay=0.04, groups=(*rules[1:2], falling))
    groups = parameter_groups(model, cfg.weight_decay, rules=cfg.groups)
    cfg.set_rates(groups, 0.1, 0.5)
    assert {(g["lr"], round(g["weight_decay"], 6)) for g in groups} == {
        *((0.1, 0.04), (0.1, 0.15), (0.1, 0.0), (0.05, 0.04), (0.05, 0.0))
    }


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ([{"match": "haed.*", "clip": 1}], r"groups.0.match='haed.\*' meets no .* names are head"),
        ([{"match": "tower.2.*", "clip": 1}], "closest names are tower"),
        ([{"match": "teacher.*", "clip": 1}], "meets frozen parameters alone"),
        (
            [{"match": "head.*", "lr_scale": 0.5}, {"match": "*", "lr_scale": 0.1}],
            "groups.0.match='head.*' changes nothing: later rules",
        ),
        ([{"match": "head.*"}], "nothing of its own: give one of lr_scale, weight_decay"),
    ],
)
def test_rules_without_effect_are_refused(rules, words):
    with pytest.raises(ValueError, match=words):
        parameter_groups(Tower(), 0.1, rules=tuple(GroupConfig(**rule) for rule in rules))


def test_submodules_name_their_own_exceptions():
    inner = nn.Linear(3, 3, bias=False)
    inner.no_weight_decay = lambda: ["weight"]  # pyright: ignore[reportAttributeAccessIssue]
    decayed, plain = grouped_names(nn.Sequential(nn.Linear(3, 3, bias=False), inner), 0.1)
    assert (decayed, plain) == ({"0.weight"}, {"1.weight"})


def test_no_group_is_empty():
    assert grouped_names(nn.Linear(2, 2, bias=False), 0.1) == [{"weight"}]
    with pytest.raises(ValueError, match="Linear has no trainable parameter"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), 0.1)


@pytest.mark.parametrize(
    ("options", "kind", "expected"),
    [
        ({"name": "adamw"}, torch.optim.AdamW, {"betas": (0.9, 0.999)}),
        ({"name": "adamw", "betas": (0.9, 0.95)}, torch.optim.AdamW, {"betas": (0.9, 0.95)}),
        ({"name": "sgd", "momentum": 0.8}, torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
        ({"name": "momentum"}, torch.optim.SGD, {"momentum": 0.9, "nesterov": False}),
        ({"name": "lion"}, timm.optim.Lion, {"betas": (0.9, 0.99)}),
        ({"name": "muon"}, timm.optim.Muon, {}),
        ({"name": "lars", "trust_coefficient": 0.02}, LARS, {"trust_coefficient": 0.02}),
        ({"name": "lamb", "eps": 1e-5}, LAMB, {"eps": 1e-5, "betas": (0.9, 0.999)}),
    ],
)
def test_built_as_asked(options, kind, expected):
    optimizer = build_optimizer(Backbone(), OptimConfig(lr=0.25, weight_decay=0.125, **options))
    assert type(optimizer) is kind
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    assert decays == [0.125, 0.0]
    for group in optimizer.param_groups:
        assert group["lr"] == 0.25
        assert {key: group[key] for key in expected} == expected


class Apex(torch.optim.AdamW):
    """apex's FusedAdam as it is called, without the GPU."""

    def __init__(self, params, lr, betas, eps, adam_w_mode):
        super().__init__(params, lr=lr, betas=betas, eps=eps)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = adam_w_mode


class CPU(Apex):
    """DeepSpeed's CPUAdam as it is called."""

    def __init__(self, params, lr, betas, eps, adamw_mode):
        super().__init__(params, lr, betas, eps, adamw_mode)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "momentum"])
def test_every_implementation_makes_the_step_of_the_plain_one(name, monkeypatch):
    import deepspeed.ops.adam

    apex = types.SimpleNamespace(FusedAdam=Apex)
    monkeypatch.setitem(sys.modules, "apex", types.SimpleNamespace(optimizers=apex))
    monkeypatch.setitem(sys.modules, "apex.optimizers", apex)
    monkeypatch.setattr(deepspeed.ops.adam, "DeepSpeedCPUAdam", CPU)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    ways = [("auto", cpu, False, "fused"), ("torch", cpu, True, "fused")]
    if name.startswith("adam"):
        ways += [("apex", cuda, False, Apex), ("deepspeed", cuda, True, CPU)]
        ways += [("deepspeed", cpu, False, CPU)]
    plain = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}.get(name, torch.optim.SGD)
    nesterov = {} if name.startswith("adam") else {"momentum": 0.9, "nesterov": name == "sgd"}
    for whose, device, offloaded, kind in ways:
        cfg = OptimConfig(name=name, lr=0.02, weight_decay=0.1, implementation=whose)
        models = Tower(), Tower()
        models[1].load_state_dict(models[0].state_dict())
        mine = build_optimizer(models[0], cfg, device=device, offloaded=offloaded)
        assert mine.defaults.get("fused") if kind == "fused" else type(mine) is kind
        theirs = plain(parameter_groups(models[1], 0.1), lr=0.02, **nesterov)
        for step in range(3):
            for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
                p.grad = torch.full_like(p, 0.1 * step + 0.01) * (1 + p.detach())
                q.grad = p.grad.clone()
            mine.step()
            theirs.step()
        torch.testing.assert_close(models[0].state_dict(), models[1].state_dict())


@pytest.mark.parametrize(
    ("options", "how", "words"),
    [
        ({"implementation": "apex"}, {}, "=apex steps on CUDA alone, and this is device=cpu"),
        ({"implementation": "apex"}, {"offloaded": True}, "CUDA alone.*offloaded"),
        ({"implementation": "deepspeed", "name": "lion"}, {}, "optim.name is lion: auto or torch"),
        (
            {"implementation": "apex"},
            {"device": torch.device("cuda")},
            "apex.optimizers.FusedAdam, which is not installed",
        ),
    ],
)
def test_an_implementation_that_is_not_there_is_refused(options, how, words):
    with pytest.raises(ValueError, match=words):
        build_optimizer(Tower(), OptimConfig(**options), **how)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "adamm"}, "optim.name=adamm is no optimizer .* did you mean adam"),
        ({"name": "lamp"}, "did you mean lamb"),
        ({"name": "q"}, "see timm.optim.list_optimizers"),
        ({"name": "adahessian"}, "optim.name=adahessian needs second derivatives"),
        ({"name": "adamw", "momentum": 0.9}, "optim.momentum=0.9 means nothing to adamw"),
        ({"name": "sgd", "trust_coefficient": 1.0}, "trust_coefficient=1.0 means nothing to sgd"),
        ({"name": "lamb", "momentum": 0.9}, "which takes betas, eps"),
        ({"name": "lamb", "betas": (0.9,)}, "optim.betas of lamb are 2 numbers"),
        ({"name": "adan", "betas": (0.9, 0.99)}, "optim.betas of adan are 3 numbers"),
        ({"betas": (0.9, 1.0)}, "must lie in"),
        ({"lr": 0.0}, "greater than 0"),
        ({"rate": 1.0}, "Extra inputs are not permitted"),
        ({"schedule": {"name": "cosine", "warmup": 1.0}}, "less than 1"),
        ({"weight_decay": -1}, "it must be at least 0"),
        ({"schedule": {"name": "step"}}, "'constant', 'linear', 'cosine', 'infinite'"),
        ({"schedule": {"end": -0.1}}, "optim.schedule=cosine is -.* at 83 % of the run, and a lea"),
    ],
)
def test_wrong_configs_say_what_is_wrong(options, words):
    with pytest.raises(ValidationError, match=words):
        OptimConfig(**options)


def test_a_config_reloads_to_itself():
    schedule = InfiniteSchedule(warmup_steps=5, anneal_steps=2)
    cfg = OptimConfig(name="adan", betas=(0.9, 0.9, 0.99), schedule=schedule)
    assert OptimConfig.model_validate_json(cfg.model_dump_json()) == cfg


def test_every_field_is_described():
    for model in (GroupConfig, OptimConfig, ConstantSchedule, CosineSchedule, InfiniteSchedule):
        fields = set(model.model_fields) - {"name", "schedule"}
        assert all(model.model_fields[field].description for field in fields)


FLAT_SAFE = sorted(name for name in ELEMENTWISE if not name.startswith("fused"))


def step_apart(name: str) -> float:
    """How far one matrix ends from the same numbers in two flat slices, stepped as ZeRO does."""
    torch.manual_seed(0)
    whole = nn.Parameter(torch.randn(6, 8, dtype=torch.float64))
    flat = whole.detach().flatten()
    slices = [nn.Parameter(flat[:21].clone()), nn.Parameter(flat[21:].clone())]
    options = {"lr": 0.01, "weight_decay": 0.1}
    one = timm.optim.create_optimizer_v2([{"params": [whole]}], name, **options)
    two = timm.optim.create_optimizer_v2([{"params": [s]} for s in slices], name, **options)
    groups = two.param_groups
    for step in range(4):
        whole.grad = torch.randn(6, 8, dtype=torch.float64) * (1 + 3 * step)
        slices[0].grad, slices[1].grad = whole.grad.flatten().split([21, 27])
        one.step()
        for group in groups:
            two.param_groups = [group]
            two.step()
    return (whole.detach().flatten() - torch.cat(slices).detach()).abs().max().item()


@pytest.mark.parametrize("name", FLAT_SAFE)
def test_elementwise_optimizers_do_not_mind_slices(name):
    assert step_apart(name) < 1e-12
    for stage in range(4):
        check_optimizer(name, stage)


@pytest.mark.parametrize("name", ["muon", "adafactor", "cadamw", "novograd", "nlars"])
def test_others_would_silently_differ_and_are_refused(name):
    assert step_apart(name) > 1e-9
    check_optimizer(name, 0)
    with pytest.raises(
        ValueError, match=f"optim.name={name} needs whole tensors, and ZeRO stage 2"
    ):
        check_optimizer(name, 2)


def test_ours_work_at_every_stage_and_unknown_names_at_none():
    for name in ("lars", "lamb"):
        check_optimizer(name, 3)
    with pytest.raises(ValueError, match="did you mean adamw"):
        check_optimizer("adamww", 0)


def test_safe_names_exist():
    assert set(timm.optim.list_optimizers()) >= ELEMENTWISE


def test_cosine_never_wastes_a_step():
    factors = [CosineSchedule(warmup=0.2, end=0.1).factor(step, 10) for step in range(10)]
    assert factors[:2] == pytest.approx([0.25, 0.75])
    assert factors[2] == max(factors) and factors[-1] > 0.1
    assert factors[2:] == sorted(factors[2:], reverse=True)


def test_constant_after_its_warmup():
    factors = [ConstantSchedule(warmup=0.5).factor(step, 4) for step in range(4)]
    assert factors == pytest.approx([0.25, 0.75, 1.0, 1.0])
    assert ConstantSchedule().factor(0, 4) == 1.0


def test_infinite_knows_the_end_only_to_anneal():
    phases = {"warmup_steps": 4, "cooldown_steps": 4, "constant": 0.5}
    plain = InfiniteSchedule(**phases)
    assert plain.factor(6, 10) == plain.factor(6, 1000)
    assert plain.factor(0, 10) == pytest.approx(0.125) and plain.factor(10**6, 10) == 0.5
    annealed = InfiniteSchedule(**phases, anneal_steps=10, end=0.005)
    assert annealed.factor(89, 100) == 0.5
    assert annealed.factor(94, 100) == pytest.approx(0.5 * 0.01**0.45)
    assert annealed.factor(99, 100) == pytest.approx(0.5 * 0.01**0.95)
    with pytest.raises(ValueError, match="anneal_steps=10 leaves nothing .* run of 10 steps"):
        annealed.factor(3, 10)


@pytest.mark.parametrize("value, bad", [("inf", 1), ("-inf", 1), ("nan", 1), ("3e38", 0)])
def test_one_value_that_is_not_finite_is_found(value, bad):
    params = [torch.nn.Parameter(torch.zeros(3, 5, dtype=torch.bfloat16)) for _ in range(3)]
    for parameter in params[:2]:
        parameter.grad = torch.full((3, 5), 3e38, dtype=torch.bfloat16)
    assert not _any_not_finite(params) and not _any_not_finite(params[2:])
    params[1].grad[2, 1] = float(value)  # type: ignore[index]
    assert _any_not_finite(params) is bool(bad)
