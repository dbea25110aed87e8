"""Pretraining from Python: any data set, any module; what they do wrongly is named."""

import re
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

import fastssl
from fastssl.config import ConfigError
from fastssl.data.errors import BadItem, DataError
from fastssl.data.sources.given import DatasetItems
from fastssl.export import load_encoder
from fastssl.methods import METHODS, Method, MethodConfig
from fastssl.run.evaluation import Evaluator
from tests.runs import few_digits, saved_state, without_pictures

README = Path(__file__).parents[1] / "README.md"
KEYS = ["epochs=1", "batch_size=32", "data.image_size=16", "data.workers=0", "device=cpu"]
KEYS += ["log.tensorboard=false", "method.projection_dim=16"]


def encoder():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 256, 32), nn.ReLU(), nn.Linear(32, 16))


class Shapes:
    """Images of two classes, in color."""

    targets = [0, 1] * 60
    classes = ["dark", "light"]

    def __len__(self):
        return 120

    def __getitem__(self, i):
        draws = np.random.default_rng(i)
        pixels = draws.integers(0, 128, (20, 24, 3)) + 120 * (i % 2)
        return Image.fromarray(pixels.astype(np.uint8)), i % 2


def test_the_readmes_lines_run(tmp_path, monkeypatch):
    (block,) = re.findall(r"```python\n(import torch\n.*?)```", README.read_text(), re.DOTALL)
    assert len(block.splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block, names)  # the lines that a reader is told to type
    assert names["features"].shape == (8, 16)
    assert (tmp_path / "runs/mine/report.html").is_file()


def test_a_module_is_trained_in_place_and_measured(tmp_path):
    model = encoder()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    output = [f"output={tmp_path}"]
    results = fastssl.pretrain("simclr", model, Shapes(), *KEYS, *output, name="mine")
    assert results["rows"][0]["knn"] > 0.9  # by the data set's own targets
    assert not torch.equal(model[1].weight, before["1.weight"])
    with pytest.raises(ConfigError, match="was given from Python.*checkpoints/"):
        load_encoder(tmp_path / "mine")
    again = [*KEYS, "resume=auto", "epochs=2", *output]
    with pytest.raises(ConfigError, match="epochs: 1 -> 2"):
        fastssl.pretrain("simclr", encoder(), Shapes(), *again, name="mine")
    fresh = encoder()
    fastssl.pretrain("simclr", fresh, Shapes(), *KEYS, "resume=auto", *output, name="mine")
    torch.testing.assert_close(fresh.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_names_and_keys_stand_for_ours(tmp_path):
    test = TensorDataset(torch.rand(40, 1, 16, 16))
    data = TensorDataset(torch.rand(90, 1, 16, 16))
    method = {"name": "mae", "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}
    model = {"name": "vit_tiny_patch16_224", "kwargs": {"patch_size": 4, "depth": 1}}
    keys = [key for key in KEYS if "projection" not in key] + [f"output={tmp_path}"]
    options = {"labels": np.arange(90) % 3, "test_labels": ["a", "b"] * 20, "test": test}
    results = fastssl.pretrain(method, model, data, *keys, name="a", **options)
    assert results["method"] == "mae" and "knn" in results["rows"][0]
    few = few_digits(130)
    results = fastssl.pretrain(method, model, few, *keys, name="b")
    assert results["source"] == few["name"]


def test_items_of_every_kind_are_read_alike():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    wanted = torch.from_numpy(pixels).permute(2, 0, 1)
    floats = wanted.float() / 255
    kinds = [Image.fromarray(pixels), pixels, wanted, floats, floats.permute(1, 2, 0).numpy()]
    for kind in (*kinds, *((kind, 3) for kind in kinds)):
        assert torch.equal(DatasetItems([kind]).item(0), wanted)
    near = DatasetItems([torch.full((1, 8, 8), 0.999)]).item(0)
    assert (near == 255).all()
    gray = DatasetItems([pixels[:, :, 0]]).item(0)
    assert torch.equal(gray, wanted[:1])
    signal = torch.randn(2, 50, dtype=torch.float64)
    assert torch.equal(DatasetItems([signal]).item(0), signal.float())


@pytest.mark.parametrize(
    "data, labels, refusal",
    [
        ([{"image": 3}], None, "item 0 of the data set is a dict: give an image"),
        ([], None, "data=list is empty"),
        (iter([1]), None, "data=list_iterator has no length"),
        ([torch.zeros(5, 8, 8)], None, r"item 0 .* of shape \(5, 8, 8\): an image is \(C, H, W\)"),
        (
            [torch.full((1, 8, 8), 2.5)],
            None,
            "item 0 .* values from 2.5 to 2.5: an image of floats",
        ),
        ([torch.zeros(1, 8, 8)] * 3, [0, 1], r"labels must be one of each of 3 items, got \(2,\)"),
    ],
)
def test_what_a_data_set_does_wrongly_is_named(data, labels, refusal):
    with pytest.raises(DataError, match=refusal):
        DatasetItems(data, labels)


def test_an_item_that_fails_is_bad_and_no_other():
    items = DatasetItems([torch.zeros(1, 8, 8), torch.zeros(3, 8, 8), None])
    with pytest.raises(BadItem, match="item 1: 3 channels, and the first item has 1"):
        items.item(1)
    with pytest.raises(BadItem, match="item 2: .*is a NoneType"):
        items.item(2)
    part = items.select(np.array([2, 0]))
    assert part.name(0) == "item 2" and len(part.item(1)) == 1


class Sensors(Shapes):
    """Each image with a depth, the same upside down, and what is no stream."""

    def __getitem__(self, i):
        image = np.asarray(super().__getitem__(i)[0])
        return {"image": image, "depth": Image.fromarray(image).rotate(180), "label": i, "at": "x"}


def test_items_that_are_dictionaries_have_streams(tmp_path):
    items = DatasetItems(Sensors())
    assert items.streams == ("image", "depth") and items.channels == {"image": 3, "depth": 3}
    item = items.select(np.array([5])).item(0)
    assert torch.equal(item["image"].flip(1, 2), item["depth"])
    mixed = DatasetItems([{"a": torch.zeros(1, 4, 4)}, {"b": torch.zeros(1, 4, 4)}, torch.ones(3)])
    for i in (1, 2):
        with pytest.raises(BadItem, match="it has other streams than the first item, a"):
            mixed.item(i)
    modules, output = {"image": encoder(), "depth": encoder()}, f"output={tmp_path}"
    results = fastssl.pretrain("cmc", modules, Sensors(), *KEYS, output, name="two")
    assert results["rows"][0]["knn"] > 0.9
    with pytest.raises(ConfigError, match="simclr reads one stream .* data.streams are image, dep"):
        fastssl.pretrain("simclr", encoder(), Sensors(), *KEYS, output, name="x")
    one = [*KEYS, "data.streams.depth={}", output]
    fastssl.pretrain("simclr", encoder(), Sensors(), *one, name="one")
    with pytest.raises(DataError, match="names 'sound', and the source has image, depth"):
        fastssl.pretrain(
            "simclr", encoder(), Sensors(), *KEYS, output, "data.streams.sound={}", name="x"
        )


def test_what_is_no_encoder_or_no_method_is_refused(tmp_path):
    data, output = Shapes(), f"output={tmp_path}"
    with pytest.raises(ConfigError, match=r"model=Conv2d gives \(1, 8, 14, 14\) for one view"):
        fastssl.pretrain("simclr", nn.Conv2d(3, 8, 3), data, *KEYS, output, name="x")
    with pytest.raises(ConfigError, match="model=Sequential does not take 16-pixel images: .*mat1"):
        wrong = nn.Sequential(nn.Flatten(), nn.Linear(5, 5))
        fastssl.pretrain("simclr", wrong, data, *KEYS, output, name="x")
    with pytest.raises(ConfigError, match="'simclir' is not one of"):
        fastssl.pretrain("simclir", encoder(), data, *KEYS, output, name="x")
    with pytest.raises(ConfigError, match="method must be a name or a mapping of keys, got int"):
        fastssl.pretrain(3, encoder(), data, name="x")
    with pytest.raises(ConfigError, match="labels and test are of a data set"):
        fastssl.pretrain("simclr", encoder(), "digits", *KEYS, output, name="x", labels=[1])
    assert not (tmp_path / "x").exists()


class Wrong(MethodConfig):
    name: Literal["wrong"] = "wrong"
    how: str = ""


class WrongMethod(Method):
    """As its configuration says."""

    preset, views, couples_batch = "simclr", 2, True

    def __init__(self, encoder, cfg):
        super().__init__()
        self.encoder, self.how = encoder, cfg.how
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("first", None)

    def encode(self, batch):
        x = self.encoder(batch["views"][0])
        return {"x": x, "mean": x.mean(0)} if self.how == "rows" else x

    def loss(self, encoded, batch):
        self.seen += 1
        if self.first is None:
            self.first = torch.tensor(len(encoded))
        if self.how == "key":
            return batch["text"]
        if self.how == "few" and len(encoded) < 32:
            raise ValueError("wants 32")
        if self.how == "first":
            assert len(encoded) < 32, "too many"
        loss = encoded.square().mean()
        other = {"none": {}, "fixed": {"loss": loss.detach()}, "log": {"loss": loss, "n": 3.0}}
        return other.get(self.how, {"loss": loss, "keep": encoded})

    def on_step(self, keep, progress):
        if self.how == "step":
            keep["keys"]


@pytest.mark.parametrize(
    "how, refusal",
    [
        ("rows", r"WrongMethod.encode\(batch\)\['mean'\] has 16 rows, and .*\['x'\] has 2: every"),
        ("key", "WrongMethod.loss fails on 2 samples: KeyError: 'text'"),
        ("none", "WrongMethod.loss must return {'loss': a 0-d tensor"),
        ("fixed", "WrongMethod.loss: its 'loss' depends on no parameter that is trained"),
        ("log", "WrongMethod.loss: 'n' must be a 0-d tensor, to be logged"),
        ("first", "WrongMethod fails in the run's first step: AssertionError: too many"),
        ("step", "WrongMethod fails in the run's first step: IndexError"),
        ("few", None),
    ],
)
def test_a_method_that_is_wrong_is_told_and_nothing_is_written(how, refusal, tmp_path, monkeypatch):
    monkeypatch.setattr(METHODS, "entries", dict(METHODS.entries))
    fastssl.register_method(Wrong)(WrongMethod)
    monkeypatch.setattr(Evaluator, "metrics", lambda self: {})
    without_pictures(monkeypatch.setattr)
    method = {"name": "wrong", "how": how}
    given = (method, encoder(), Shapes(), *KEYS[:-1], f"output={tmp_path}")
    if refusal is None:  # two samples were too few for it, and the run's batch is not
        fastssl.pretrain(*given, name="x")
        state = saved_state(next((tmp_path / "x/checkpoints").glob("step-*")))
        assert (state["seen|buffer"], state["first|buffer"]) == (3, 32)
        return
    with pytest.raises(Exception, match=refusal) as error:
        fastssl.pretrain(*given, name="x")
    assert error.value.exit_code == 2  # type: ignore[attr-defined]
    assert not (tmp_path / "x").exists()
