"""A frozen encoder: as it was, to the last bit, whatever is trained over it."""

import shutil

import pytest
import torch
from torch import nn

import fastssl
from fastssl.config import ConfigError
from fastssl.engine.checkpoint import CheckpointError
from fastssl.export import load_encoder
from fastssl.methods import Method
from fastssl.models import EMA, build_backbone, freeze
from fastssl.run.build import Given, build
from fastssl.run.train import pretrain
from tests.runs import few_digits, final, saved_state, tiny

RESNET = {"name": "test_resnet"}
SIDE = {"data__image_size": 32, "epochs": 1}


def test_a_module_from_python_stays_as_it_is(tmp_path):
    encoder = build_backbone("test_resnet", shape=(1, 32, 32), kwargs={})
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    keys = ["epochs=1", "batch_size=32", "data.image_size=32", "data.workers=0", "device=cpu"]
    keys += ["log.tensorboard=false", "method.projection_dim=16", f"output={tmp_path}"]
    few = few_digits(130)
    fastssl.pretrain("mocov3", encoder, few, "model.frozen=true", *keys, name="given")
    torch.testing.assert_close(encoder.state_dict(), before, rtol=0, atol=0)
    assert not list(tmp_path.glob("given/checkpoints/*/encoder*"))
    with pytest.raises(ConfigError, match="was given from Python"):
        load_encoder(tmp_path / "given")


def test_a_run_over_frozen_weights_resumes_and_exports_with_them(tmp_path):
    first = tiny("simclr", tmp_path, name="first", model=RESNET, **SIDE)
    pretrain(first)
    model = RESNET | {"weights": str(first.directory), "frozen": True}
    cfg = tiny("mocov3", tmp_path, name="second", model=model, **SIDE | {"epochs": 2})
    notes: list[str] = []
    method = build(cfg, 1, notes)
    assert "tensors loaded" in notes[0] and "frozen=true: its " in notes[1], notes
    pretrain(cfg)
    checkpoint = cfg.directory / "checkpoints/step-00000010"
    held = saved_state(checkpoint)
    trained = [name for name, p in method.named_parameters() if p.requires_grad]
    assert trained and {f"{name}|optimizer.exp_avg" for name in trained} < held.keys()
    assert not [name for name in held if "conv1" in name]  # nothing of the network's
    before = final(cfg)
    shutil.rmtree(checkpoint)
    again = cfg.model_copy(update={"resume": "auto"})
    pretrain(again)
    assert final(cfg) == before
    wanted = load_encoder(first.directory, device="cpu")[0].state_dict()
    for name in ("", "teacher"):
        mine = load_encoder(cfg.directory, name, device="cpu")[0].state_dict()
        torch.testing.assert_close(mine, wanted, rtol=0, atol=0)
    third = tiny("simclr", tmp_path, model=RESNET | {"weights": str(cfg.directory)}, **SIDE)
    started = build(third, 1, []).encoder.state_dict()
    torch.testing.assert_close(started, load_encoder(first.directory)[0].backbone.state_dict())
    pretrain(first.model_copy(update={"overwrite": True, "seed": 4}))
    with pytest.raises(CheckpointError, match="other frozen weights of encoder than model.weights"):
        pretrain(again)
    with pytest.raises(CheckpointError, match="are not those with which .*second had encoder fro"):
        load_encoder(cfg.directory)
    first.directory.rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="model.weights=.*first: there is no such file"):
        pretrain(again)


class Headless(Method):
    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder


def test_what_cannot_be_frozen_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="model.frozen=true would keep random weights: give mod"):
        tiny("simclr", tmp_path, model__frozen=True)
    with pytest.raises(ConfigError, match="model.partial=true would keep random weights"):
        tiny("simclr", tmp_path, model__frozen=True, model__weights="timm", model__partial=True)
    late = {"epochs": 2, "optim__groups": [{"match": "*", "freeze_epochs": 2}]}
    with pytest.raises(
        ConfigError, match="optim.groups freeze every parameter for all of epochs=2"
    ):
        build(tiny("simclr", tmp_path, **late), 1)
    monkeypatch.setattr("fastssl.run.build.build_method", lambda encoder, *_: Headless(encoder))
    cfg = tiny("simclr", tmp_path, model={"name": "given", "frozen": True})
    with pytest.raises(ConfigError, match="simclr has nothing left to train: what it has"):
        pretrain(cfg, given=Given(nn.Sequential(nn.Flatten(), nn.Linear(256, 8))))
    assert not cfg.directory.exists()


def test_training_mode_and_teachers_leave_a_frozen_network_alone():
    student = nn.Sequential(nn.Sequential(nn.BatchNorm1d(3), nn.Dropout()), nn.Linear(3, 3))
    freeze(student[0])
    assert not any(p.requires_grad for p in student[0].parameters())
    teacher = EMA(student)
    assert teacher.model[0] is student[0] and teacher.model[1] is not student[1]
    method = Headless(student).train()
    assert method.training and student[1].training
    assert not any(part.training for part in student[0].modules())
    student[1].weight.data.add_(1.0)
    teacher.update(student, 0.5)
    moved = (student[1].weight - teacher.model[1].weight).detach()
    torch.testing.assert_close(moved, torch.full((3, 3), 0.5))
