"""A run over two streams: the method reads both, trains, resumes; the first is measured."""

from typing import Literal

import pytest
import torch

from fastssl.config import ConfigError, from_mapping
from fastssl.data.datasets import SOURCES, register_source
from fastssl.data.errors import DataError
from fastssl.data.sources.base import SourceOptions
from fastssl.losses import NTXentLoss
from fastssl.methods import METHODS, Method, register_method
from fastssl.methods.configs import MethodConfig
from fastssl.run.train import pretrain
from tests.data.test_streams import Pairs
from tests.test_plugins import call


class PairsSource(SourceOptions):
    name: Literal["pairs"] = "pairs"

    def open(self):
        return (Pairs(),)


class MeetConfig(MethodConfig):
    name: Literal["meet"] = "meet"


class Meet(Method):
    """SimCLR between an image and the depth at the same place."""

    preset, views, couples_batch, streams = "mae", 1, True, ("image", "depth")
    needs_view_params = True

    def __init__(self, encoder, cfg):
        super().__init__()
        self.encoders = torch.nn.ModuleDict(encoder)
        self.encoder, self.contrast = self.encoders["image"], NTXentLoss()

    def encode(self, batch):
        places = [own[0][:, :5] for own in batch["params"].values()]
        assert torch.equal(*places)
        return [self.encoders[name](self.cast(own[0])) for name, own in batch["views"].items()]

    def loss(self, encoded, batch):
        return {"loss": self.contrast(*encoded)}


@pytest.fixture
def added():
    before = dict(SOURCES.entries), dict(METHODS.entries)
    register_source(PairsSource)
    register_method(MeetConfig)(Meet)
    yield
    SOURCES.entries, METHODS.entries = before


def mapping(folder, **data):
    streams = {"image": {}, "depth": {"shares": "image", "image_size": 16}}
    streams["depth"]["overrides"] = {"mean": [0.5], "std": [0.25]}
    return {
        "name": "both",
        "output": str(folder),
        "device": "cpu",
        "epochs": 2,
        "batch_size": 8,
        "method": {"name": "meet"},
        "model": {"name": "resnet10t", "kwargs": {"stem_width": 8, "channels": [8, 16, 16, 16]}},
        "data": {
            "source": {"name": "pairs"},
            "image_size": 24,
            "workers": 0,
            "streams": streams,
            **data,
        },
        "log": {"tensorboard": False, "every": 1},
        "evaluate": {"neighbors": 3},
        "checkpoint": {"every": 1, "keep": 9},
    }


@pytest.mark.pictures
def test_two_streams_train_resume_and_are_measured(tmp_path, added):
    cfg = from_mapping(mapping(tmp_path))
    results = pretrain(cfg)
    run = tmp_path / "both"
    assert len(results["rows"]) == 3 and results["items"] == "images"
    assert (run / "views.png").is_file() and (run / "views-depth.png").is_file()
    longer = from_mapping({**mapping(tmp_path), "epochs": 3, "resume": "auto", "optim": {}})
    with pytest.raises(ConfigError, match="epochs: 2 -> 3"):
        pretrain(longer)
    whole = [line for line in (run / "metrics.jsonl").read_text().splitlines() if "loss" in line]
    *_, last = sorted((run / "checkpoints").glob("step-*"))
    for path in sorted(last.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    last.rmdir()
    again = pretrain(from_mapping({**mapping(tmp_path), "resume": "auto"}))
    assert again["train"]["loss"] == results["train"]["loss"] and len(whole) > 3
    code, out = call("eval", run)
    assert code == 0 and "knn" in out, out
    code, out = call("embed", run, "pairs", "--out", tmp_path / "f.npz")
    assert code == 0, out
    code, out = call("export", run, "--format", "safetensors", "--out", tmp_path / "e.safetensors")
    assert code == 0, out


def test_streams_that_do_not_fit_the_method_or_the_source(tmp_path, added):
    def refused(match, kind=ConfigError, method="meet", **data):
        with pytest.raises(kind, match=match):
            pretrain(from_mapping({**mapping(tmp_path, **data), "method": {"name": method}}))

    two = {"image": {}, "depth": {"overrides": {"mean": [0.5], "std": [0.25]}}}
    refused(
        "simclr reads one stream of an item, and data.streams are image, depth", method="simclr"
    )
    refused("meet reads the streams image, depth, and data.streams are none", streams={})
    refused(
        "meet reads the streams image, depth, and data.streams are image$", streams={"image": {}}
    )
    refused(
        "meet reads image first, and data.streams are depth, im",
        streams=dict(reversed(two.items())),
    )
    refused("names 'rgb', and the source has image, depth", DataError, "mae", streams={"rgb": {}})
    refused("have streams .image, depth.: name those", DataError, "mae", streams={})
    refused(
        "unknown key data.streams.image.share=.*did you mean shares",
        streams={"image": {"share": 1}},
    )
    refused("shares with 'rgb', which is none", streams={**two, "image": {"shares": "rgb"}})
    refused("batch_ops are for one stream", streams=two, batch_ops=[{"name": "style"}])
    refused(
        "data.streams.depth.overrides has a size",
        streams={**two, "depth": {"overrides": {"size": 8}}},
    )
    refused(
        "reads 1 .*streams.depth.augment=simclr makes 2",
        streams={**two, "depth": {"augment": "simclr"}},
    )
    assert not list(tmp_path.iterdir())
