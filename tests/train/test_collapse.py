"""A run says when its numbers tell of collapse, once, and what cures it."""

import math
import re
import shutil

import pytest

from fastssl.methods import MoCoV3
from fastssl.report import read_metrics
from fastssl.run.collapse import Collapse, symptoms
from fastssl.run.log import Silent
from fastssl.run.train import pretrain
from tests.runs import tiny


class Heard(Silent):
    def __init__(self):
        self.texts = []

    def say(self, text):
        self.texts.append(text)


def collapses(cfg):
    rows = read_metrics(cfg.directory / "metrics.jsonl")
    return [(row["step"], row["detail"]) for row in rows if row.get("what") == "collapse"]


def test_a_run_that_collapses_says_so_once_and_one_that_does_not_is_silent(tmp_path, monkeypatch):
    """Its encoder gives every image the same features from step 4 on; one batch is rehearsed."""
    fine = tiny("mocov3", tmp_path, name="fine", epochs=3, evaluate__every=1)
    pretrain(fine)
    assert collapses(fine) == []
    rows = read_metrics(fine.directory / "metrics.jsonl")
    assert all(row["embedding_std"] > 0.1 for row in rows if row["kind"] == "train")

    encode, features, seen = MoCoV3.encode, MoCoV3.features, []

    def constant(self, batch):
        seen.append(batch)
        return [x * (len(seen) < 5) + 1 for x in encode(self, batch)]

    monkeypatch.setattr(MoCoV3, "encode", constant)
    monkeypatch.setattr(MoCoV3, "features", lambda self, x: 0 * features(self, x) + 1)
    heard, cfg = Heard(), tiny("mocov3", tmp_path, epochs=3, evaluate__every=2)
    pretrain(cfg, heard)
    told = collapses(cfg)
    assert [step for step, _ in told] == [8, 10]
    assert "embedding_std=" in told[0][1] and "optim.lr" in told[0][1]
    assert "RankMe=1" in told[1][1]
    assert [text for text in heard.texts if "collapse" in text] == [text for _, text in told]
    page = (cfg.directory / "report.html").read_text()
    assert "From step 8: the embeddings hardly differ" in page
    shutil.rmtree(cfg.directory / "checkpoints/step-00000015")
    pretrain(cfg.model_copy(update={"resume": "auto"}))
    assert collapses(cfg) == told


FLAT, LOG_K = {"center_kl": 0.0}, math.log(1000)


@pytest.mark.parametrize(
    "row, said",
    [
        ({"teacher_entropy": LOG_K - 0.01, **FLAT}, "a flat distribution .*lower teacher temp"),
        ({"teacher_entropy": 0.01, "center_kl": LOG_K - 0.02}, "one and the same .*Sinkhorn"),
        ({"teacher_entropy": 3.0, "center_kl": LOG_K - 3.01}, "the same distribution .*momentum"),
        ({"teacher_entropy": 3.0, "center_kl": 1.0}, None),
        ({"loss": LOG_K * 1.009}, "stays at chance .*last layer frozen"),
        ({"loss": LOG_K * 0.98}, None),
        ({"embedding_rank": 1.01, "embedding_std": 0.3}, "one direction"),
        ({"embedding_rank": 1.01, "embedding_std": 0.01}, "embeddings hardly differ"),
        ({"target_std": 0.019}, "targets hardly differ .*visible parts"),
        ({"target_std": 0.021, "rankme": 1.0}, None),
        ({"embedding_std": None}, None),
    ],
)
@pytest.mark.parametrize("prefix", ["", "patch_"])
def test_each_symptom_has_its_sentence(row, said, prefix):
    row = {f"{prefix}{k}": v for k, v in ({"chance": LOG_K} | row).items()}
    found = [text for _, text in symptoms({"kind": "train", "loss": 99.0, **row})]
    assert len(found) == (said is not None)
    assert said is None or re.search(said, found[0])


def test_a_symptom_must_last_and_is_told_once():
    bad, good = {"target_std": 0.0}, {"target_std": 0.3}
    watcher = Collapse()
    told = [watcher.read(bad if step % 70 else good, step, 700) for step in range(10, 400, 10)]
    assert not any(told)  # never over 70 steps
    watcher = Collapse()
    told = [watcher.read(bad, step, 700) for step in range(10, 400, 10)]
    assert [i for i, texts in enumerate(told) if texts] == [7]
    watcher = Collapse()
    told = [watcher.read(bad, step, 10) for step in range(1, 11)]
    assert [i for i, texts in enumerate(told) if texts] == [4]  # five rows at least
    watcher = Collapse()
    told = [watcher.read(bad, step, 10**7) for step in range(1000, 50_000, 1000)]
    assert [i for i, texts in enumerate(told) if texts] == [20]
