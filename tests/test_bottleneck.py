"""The doctor of a recipe: rates that are there, the right culprit, and advice that fits."""

import os
import time
from dataclasses import replace

import pytest

from fastssl.config import dump
from fastssl.data.datasets import open_source
from fastssl.data.sources.digits import DigitsSource
from fastssl.diagnose import bottleneck
from fastssl.diagnose.bottleneck import Measured, Verdict, advice, examine, verdict
from fastssl.engine.engine import Engine
from tests.data import photos
from tests.ranks import run_ranks
from tests.runs import tiny
from tests.test_cli import call

RANK = Measured(images=8, first=1.0, data=100.0, step=400.0, read=5e3, decode=300.0, side=375)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return photos.folder(tmp_path_factory.mktemp("photos"), 24)


def of_photos(folder, output, **changes):
    own = {"data__source": {"name": "folder", "path": folder}, "batch_size": 8, **changes}
    return tiny("simclr", output, **own)


def source_of(cfg):
    return open_source(cfg.data.source, cfg.seed).train


@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_a_folder_is_measured_by_either_back_end(backend, folder, tmp_path):
    cfg = of_photos(folder, tmp_path, data__backend=backend, data__readers=0)
    cfg, (found,) = examine(cfg, seconds=0.3)
    assert cfg.data.backend == backend and found.images == 8
    rates = (found.first, found.data, found.step, found.read, found.decode)
    assert all(rate > 0 for rate in rates)
    assert found.side in {min(shape) for shape in photos.SHAPES} and found.read > found.decode
    assert not list(tmp_path.iterdir())  # nothing is left of it


def test_what_is_made_is_not_read(tmp_path):
    _, (found,) = examine(tiny("mae", tmp_path), seconds=0.2)
    assert found.read == 0 and found.decode > 0 and found.side == 8


def test_slow_data_are_found_and_by_how_much(tmp_path, monkeypatch):
    stream = bottleneck.build_loader

    class Slow:
        def __init__(self, loader):
            self.loader = loader

        def stream(self, start, end):
            for batch in self.loader.stream(start, end):
                time.sleep(3.0)
                yield batch

    monkeypatch.setattr(bottleneck, "build_loader", lambda *a, **k: Slow(stream(*a, **k)))
    _, ranks = examine(tiny("mae", tmp_path, batch_size=32), seconds=0.3)
    found = verdict(ranks)
    assert found.waits and 5 < found.data < 11 and found.wait > 0.5


def test_a_slow_model_is_found(tmp_path, monkeypatch):
    step = Engine.step

    def slowly(self, batch, lr, **kwargs):
        time.sleep(1.0)
        assert lr == 0
        return step(self, batch, lr, **kwargs)

    monkeypatch.setattr(Engine, "step", slowly)
    cfg, ranks = examine(tiny("mae", tmp_path, batch_size=32), seconds=0.3)
    found = verdict(ranks)
    assert not found.waits and found.wait == 0 and found.step < 32
    assert advice(cfg, ranks, source_of(cfg)) == ["faster data would change nothing"]


def test_all_ranks_wait_for_the_slowest():
    ranks = [RANK, replace(RANK, data=50.0, step=500.0)]
    assert verdict(ranks) == Verdict(data=100.0, step=800.0)


@pytest.mark.parametrize(
    ("data", "step", "words"),
    [
        (100, 400, "the data are the bottleneck: the model is 4.0 times as fast, some 75 % of"),
        (400, 100, "the model is the bottleneck: the data are 4.0 times as fast"),
        (100, 105, "data and model are as fast as each other: some 5 % of each step"),
        (105, 100, "data and model are as fast as each other: some 0 % of each step"),
    ],
)
def test_the_sentence_names_the_culprit_and_the_factor(data, step, words):
    assert Verdict(data, step).sentence().startswith(words)


def test_workers_are_advised_up_to_the_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    cfg = tiny("simclr", tmp_path, data__workers=4, data__backend="torch")
    (said,) = [line for line in advice(cfg, 2 * [RANK], source_of(cfg)) if "workers" in line]
    assert said == "data.workers=8, now 4: workers, 16 cores over 2 rank(s)"
    assert not any("workers" in line for line in advice(cfg, 4 * [RANK], source_of(cfg)))
    cfg = tiny("simclr", tmp_path, data__workers=4, data__backend="dali")
    assert "threads of DALI" in "\n".join(advice(cfg, [RANK], source_of(cfg)))


def test_the_back_end_and_color_are_advised(folder, tmp_path, monkeypatch):
    cfg = of_photos(folder, tmp_path, data__backend="torch")
    assert advice(cfg, [RANK], source_of(cfg))[0].startswith("data.backend=dali")
    colored = {"data__overrides": {"jitter": 0.8}}
    cfg = tiny("simclr", tmp_path, data__backend="torch", **colored)  # arrays: torch's by rule
    said = advice(cfg, [RANK], DigitsSource().open()[0])
    assert said[0].startswith("data.overrides.color=linear")
    monkeypatch.setattr("fastssl.data.render.backend.find_spec", lambda name: None)
    cfg = of_photos(folder, tmp_path, data__backend="torch")
    assert "pip install 'fastssl-torch[dali]'" in advice(cfg, [RANK], source_of(cfg))[0]


def test_large_images_are_to_be_packed(tmp_path):
    cfg = tiny("simclr", tmp_path, data__image_size=224, model__kwargs={})
    said = "\n".join(advice(cfg, [replace(RANK, side=1500)], source_of(cfg)))
    assert "1500 pixels on their shorter side, and views 224" in said
    assert "fastssl pack RECIPE OUT --max-side 256" in said
    assert "max-side" not in "\n".join(advice(cfg, [RANK], source_of(cfg)))


def test_slow_reading_is_said(tmp_path):
    cfg = tiny("simclr", tmp_path, data__workers=2)
    said = advice(cfg, [replace(RANK, read=60.0)], source_of(cfg))
    assert any(line.startswith("reading holds it up") for line in said)


def test_where_nothing_is_left_to_change_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    cfg = tiny("mae", tmp_path, data__workers=2)
    (said,) = advice(cfg, [replace(RANK, side=16)], source_of(cfg))
    assert said.startswith("the pipeline is at its best here")


def test_no_time_is_refused(tmp_path):
    with pytest.raises(ValueError, match="seconds: want more than 0, got 0"):
        examine(tiny("mae", tmp_path), seconds=0)


def on_two(rank, world, output):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    cfg = tiny("simclr", output, batch_size=64)
    gone = {"name": "folder", "path": output / "gone"}
    with pytest.raises(ValueError, match="gone' does not exist") as refused:
        examine(tiny("simclr", output, data__source=gone) if rank else cfg, seconds=0.2)
    _, ranks = examine(cfg, seconds=0.2 + rank)
    return [str(refused.value)[:10], *((r.images, r.data > 0, r.step > 0) for r in ranks)]


def test_every_rank_is_measured_or_none(tmp_path):
    """Ranks that would make different numbers of steps agree on one, or this would hang."""
    one, two = run_ranks(on_two, 2, tmp_path, timeout=100)
    assert one[1:] == two[1:] == 2 * [(32, True, True)] and one[0] == "on rank 1:" != two[0]


def test_the_command_says_it_all(tmp_path):
    cfg = tiny("mae", tmp_path)
    (tmp_path / "mine.yaml").write_text(dump(cfg))
    out = call("doctor", tmp_path / "mine.yaml", "batch_size=64", "--seconds", "0.2")
    for word in ("images/s", "64 images a step", "views by torch", "bottleneck", "cores"):
        assert word in out
