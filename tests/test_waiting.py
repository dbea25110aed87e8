"""How long a run waited for its data: in its log, its results, and its last words."""

import json
import time

import pytest

from fastssl.config import dump
from fastssl.data.loader import PretrainLoader
from fastssl.report import read_metrics
from fastssl.run.train import pretrain
from tests.runs import tiny, without_pictures
from tests.test_cli import call


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    without_pictures(monkeypatch.setattr)


@pytest.fixture
def slow_data(monkeypatch):
    stream = PretrainLoader.stream

    def slowly(self, *args, **options):
        for batch in stream(self, *args, **options):
            time.sleep(2.0)
            yield batch

    monkeypatch.setattr(PretrainLoader, "stream", slowly)


def shares(cfg):
    rows = read_metrics(cfg.directory / "metrics.jsonl")
    return [row["data_wait"] for row in rows if row["kind"] == "train"]


def test_slow_data_are_waited_for_as_the_last_words_say(slow_data, tmp_path):
    cfg = tiny("mae", tmp_path, epochs=1, batch_size=128)
    (tmp_path / "mine.yaml").write_text(dump(cfg))
    assert "% of the time waiting for data" in call("pretrain", tmp_path / "mine.yaml")
    results = json.loads((cfg.directory / "results.json").read_text())
    assert len(shares(cfg)) == 1 and 0.5 < shares(cfg)[0] <= 1
    assert results["train"]["data_wait"] == pytest.approx(shares(cfg)[0])


def test_data_at_hand_are_not_waited_for(tmp_path, monkeypatch):
    cfg = tiny("mae", tmp_path, epochs=1)
    stream = PretrainLoader.stream
    monkeypatch.setattr(
        PretrainLoader, "stream", lambda self, *args, **how: iter(list(stream(self, *args, **how)))
    )
    assert pretrain(cfg)["train"]["data_wait"] < 0.2
