"""Models built without memory have the bits of those that were built whole."""

import contextlib
import copy
import io
import json
import math
import os
from pathlib import Path

import psutil
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import _hub
from torch import nn

from fastssl.engine import launch
from fastssl.engine import materialize as materializing
from fastssl.engine.config import EngineConfig, EngineError
from fastssl.engine.engine import Engine
from fastssl.engine.materialize import materialize
from fastssl.engine.optim import OptimConfig
from fastssl.methods import build_method
from fastssl.models import (
    EMA,
    build_backbone,
    freeze,
    frozen_as,
    load_weights,
    read_weights,
    timm_weights,
)
from fastssl.models.deferred import Deferred, NotDeferrable, _Operation, tensors_on_meta
from fastssl.run import build as building
from fastssl.run.train import pretrain
from tests.ranks import run_ranks
from tests.runs import VIT, final, tiny


class Everything(nn.Module):
    """What constructors do, as far as it can be done later."""

    def __init__(self, weights: Path) -> None:
        super().__init__()
        name, kinds = "vit_tiny_patch16_224", {"num_classes": 0, "in_chans": 1, **VIT}
        self.encoder = timm.create_model(name, img_size=16, **kinds)
        load_weights(self.encoder, read_weights(weights), "w")  # resized, from color
        self.frozen = timm.create_model(name, img_size=48, **kinds)
        load_weights(self.frozen, read_weights(weights), "w")
        freeze(self.frozen)
        self.norm = nn.BatchNorm1d(4)
        self.scale = nn.Parameter(torch.tensor([math.log(10)]))  # data from Python
        self.table = nn.Parameter(torch.zeros(3, 5))
        nn.init.trunc_normal_(self.table, std=0.7)  # draws again what lies outside
        self.turned = nn.Linear(6, 6)
        nn.init.orthogonal_(self.turned.weight)
        with torch.no_grad():  # parts, and what reads other tensors
            self.table[:, 1] = 7
            self.table[1:].mul_(self.scale).add_(self.turned.weight[:2, :5])
            self.table[2:].zero_()
            known = torch.arange(5.0, device="cpu")
            self.table[0].copy_(known)
            known.zero_()
        self.table.data.copy_(self.table.flip(0))
        self.rows = nn.Parameter(torch.randn(2, 3))
        self.rows.data.copy_(self.rows.data[:1].expand(2, 3))
        self.register_buffer("queue", nn.functional.normalize(torch.randn(9, 3), dim=1))
        self.register_buffer("known", torch.arange(4, device="cpu") * 3)
        self.tied = self.turned
        self.turned.bias.data = torch.linspace(0, 1, 6)
        self.teacher = EMA(self.encoder)
        self.twice = copy.deepcopy(self.turned)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The index of a classifier's weights, in two files."""
    torch.manual_seed(6)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10, **VIT)
    path, where = tmp_path_factory.mktemp("weights"), {}
    state = {f"module.{name}": x for name, x in model.state_dict().items()}
    for n, name in enumerate(("one.safetensors", "two.safetensors")):
        part = {key: state[key] for key in [*state][n::2]}
        save_file(part, path / name)
        where |= dict.fromkeys(part, name)
    (path / "w.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return path / "w.safetensors.index.json"


def built(make):
    torch.manual_seed(5)
    deferred = Deferred()
    with deferred:
        model = make()
    deferred.check(model)
    return model, deferred


def tensors_of(model):
    return dict([*model.named_parameters(), *model.named_buffers()])


def test_each_tensor_made_alone_is_what_the_constructor_would_have_made(weights):
    torch.manual_seed(5)
    whole = tensors_of(Everything(weights))
    model, deferred = built(lambda: Everything(weights))
    before = torch.get_rng_state()
    names = {name for name, _ in tensors_on_meta(model)}
    assert names == whole.keys() - {"known"}
    for name, tensor in reversed(tensors_of(model).items()):  # in any order
        made = deferred.value(tensor) if tensor.device.type == "meta" else tensor
        assert made.dtype == whole[name].dtype and made.stride() == whole[name].stride()
        assert made.equal(whole[name]), name
    assert torch.get_rng_state().equal(before)


def test_to_check_a_model_is_to_draw_the_smallest_of_each_kind(monkeypatch):
    drawn = []
    apart = lambda operation: drawn.append(operation.places()[0].size)  # noqa: E731
    monkeypatch.setattr(_Operation, "run_apart", apart)
    built(lambda: [nn.Linear(9, 50), nn.Linear(2, 7), nn.Embedding(3, 2)][0])
    assert drawn == [(7,), (3, 2)]


def test_weights_are_read_as_they_are_asked_for(weights, tmp_path, monkeypatch):
    files = [weights.with_name(name) for name in ("one.safetensors", "two.safetensors")]
    state = {key.removeprefix("module."): x for path in files for key, x in load_file(path).items()}
    save_file(state, tmp_path / "w.safetensors")
    torch.save({"model": state}, tmp_path / "w.pth")
    torch.save({"model": state}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.manual_seed(7)
    hub = timm.create_model("test_vit").state_dict()
    save_file(hub, tmp_path / "hub.safetensors")
    monkeypatch.setattr(_hub, "hf_hub_download", lambda **which: tmp_path / "hub.safetensors")
    deferred = Deferred()
    with deferred:
        found = [read_weights(tmp_path / name) for name in ("w.pth", "w.safetensors")]
        known = timm_weights("test_vit")
        with pytest.raises(ValueError, match="old.pth is a pickle that cannot be mapped"):
            read_weights(tmp_path / "old.pth")
        assert isinstance(deferred.refused, NotDeferrable)
        with pytest.raises(NotDeferrable, match="BytesIO .* cannot be mapped"):
            torch.load(io.BytesIO((tmp_path / "w.pth").read_bytes()))
    for own, wanted in zip([*found, known], [state, state, hub], strict=True):
        torch.testing.assert_close({k: deferred.value(x) for k, x in own.items()}, wanted, **EXACT)
    (tmp_path / "w.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        deferred.value(found[1]["cls_token"])


EXACT = {"rtol": 0, "atol": 0}


class Seeds(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            nn.init.normal_(self.weight)


class GoesOn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with contextlib.suppress(RuntimeError):
            self.weight = Seeds().weight


class SeedsBack(nn.Linear):
    def __init__(self) -> None:
        torch.manual_seed(5)
        super().__init__(2, 2)
        torch.manual_seed(5)
        nn.init.normal_(self.weight)


class OwnGenerator(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)
        self.weight.data.normal_(generator=torch.default_generator)


class Reads(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)
        if self.weight.sum() > 0:
            self.bias.data.zero_()


class FromAnother(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)
        self.weight.data.copy_(torch.bernoulli(self.weight.abs()))


class Hidden(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)
        self.kept = [torch.ones(2)]


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.all = nn.Parameter(torch.zeros(4))
        self.part = nn.Parameter(self.all.data[:2])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (Seeds, "seeds torch's generator"),
        (GoesOn, "seeds torch's generator"),
        (SeedsBack, "seeds torch's generator"),
        (OwnGenerator, "a generator of its own"),
        (Reads, "called on meta"),
        (FromAnother, "a distribution of tensors"),
        (Hidden, "no parameter and no buffer"),
        (Shared, "part and all share their memory"),
        (lambda: ELSEWHERE, "weight was made elsewhere"),
    ],
)
def test_what_cannot_be_made_later_is_refused(make, said):
    with pytest.raises(NotDeferrable, match=said):
        built(make)


ELSEWHERE = nn.Linear(2, 2, device="meta")


@pytest.mark.parametrize(
    ("method", "stage", "precision", "frozen"),
    [("mocov3", 3, "bf16", False), ("mocov3", 3, "bf16", True), ("simclr", 0, "fp32", False)],
)
def test_a_run_is_the_same_however_its_model_was_built(
    method, stage, precision, frozen, weights, tmp_path, monkeypatch
):
    ends: list[list[dict]] = []
    for large in (math.inf, 0):
        monkeypatch.setattr(building, "LARGE", large)
        engine = {"zero_stage": stage, "precision": precision}
        cfg = tiny(method, tmp_path, name=f"of-{large}", engine=engine, epochs=1)
        if stage == 3:
            start = {"weights": str(weights), "frozen": frozen}
            cfg = cfg.model_copy(update={"model": cfg.model.model_copy(update=start)})
        pretrain(cfg)
        (trainer,) = cfg.directory.glob("checkpoints/*/trainer.json")
        ends.append([*final(cfg), json.loads(trainer.read_text())["networks"]])
        assert all(bool(known) == frozen for known in ends[-1][-1].values())
    assert ends[0] == ends[1]


def seeds(model):
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        next(model.parameters()).normal_()


def seeds_and_is_not_taken(model):
    try:  # as backbones do with what timm raises
        seeds(model)
    except RuntimeError as error:
        raise ValueError("the model does not take 16-pixel images") from error


def reads(method):
    next(method.parameters()).detach().numpy()


@pytest.mark.parametrize(
    "name, does, why",
    [
        ("build_backbone", seeds, "a constructor seeds"),
        ("build_backbone", seeds_and_is_not_taken, "a constructor seeds"),
        ("build_method", reads, "can't convert meta device type tensor to numpy"),
    ],
)
def test_a_constructor_that_cannot_wait_builds_the_whole_model(
    name, does, why, tmp_path, monkeypatch
):
    build = getattr(building, name)

    def built(*args, **kwargs):
        does(made := build(*args, **kwargs))
        return made

    monkeypatch.setattr(building, "LARGE", 0)
    monkeypatch.setattr(building, name, built)
    notes: list[str] = []
    method, deferred = building.begin(tiny("simclr", tmp_path), 1, notes)
    assert deferred is None and not [*tensors_on_meta(method)]
    (said,) = notes
    assert said.startswith(f"the model is built whole in each process: {why}")


def on_a_rank(rank: int, world: int, weights: Path) -> list:
    """What a rank holds of each parameter, the parameters whole, and the frozen network's name."""
    os.environ["LOCAL_RANK"] = str(rank)
    torch.manual_seed(5 + rank)  # the first rank's values are everybody's
    deferred = Deferred()
    with deferred:
        model = Everything(weights)
    ids = [id(p) for p in model.parameters()]
    zero = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    trims: list[int] = []
    materializing._LITTLE, materializing.trim = 1, lambda: trims.append(1)
    later = len([*tensors_on_meta(model)])
    with launch.session("cpu") as device:
        materialize(model, deferred, device, torch.bfloat16, zero)
        assert len(trims) == later + 1
        assert [id(p) for p in model.parameters()] == ids
        held = {name: (p.numel(), p.ds_tensor.numel()) for name, p in model.named_parameters()}
        with launch.deepspeed().zero.GatheredParameters([*model.parameters()]):
            whole = {name: p.detach().clone() for name, p in model.named_parameters()}
            return [held, whole, frozen_as(model.frozen)]


def test_stage_3_cuts_each_parameter_as_it_is_made(weights):
    torch.manual_seed(5)
    model = Everything(weights)
    whole = {name: p.detach().bfloat16() for name, p in model.named_parameters()}
    for held, gathered, known in run_ranks(on_a_rank, 2, weights):
        assert known == frozen_as(model.frozen) != ""
        torch.testing.assert_close(gathered, whole, rtol=0, atol=0)
        assert held == {name: (0, -(-p.numel() // 2)) for name, p in whole.items()}


def test_what_is_free_between_tensors_is_given_back():
    """Once a block of 30 MB has been freed malloc keeps those that are smaller."""
    rss = psutil.Process().memory_info
    torch.ones(30 << 20, dtype=torch.uint8)
    made = [torch.ones(4 << 20, dtype=torch.uint8) for _ in range(80)]
    del made[::2]
    before = rss().rss
    materializing.trim()
    assert before - rss().rss > 100 << 20


def test_a_parameter_that_stage_3_cannot_cut_is_named():
    torch.manual_seed(0)
    method = build_method(
        build_backbone("vit_tiny_patch16_224", shape=(1, 8, 8), kwargs=VIT),
        tiny("simclr", Path()).method,
    )
    method.scale = nn.Parameter(torch.tensor(1.0))
    cfg, optim = EngineConfig(zero_stage=3), OptimConfig(name="sgd")
    with launch.session("cpu") as device, pytest.raises(EngineError, match="cannot cut scale, a"):
        Engine(method, optim, cfg, device=device, batch_size=8)
