"""Runs and their data: what may change when a run is taken up again, and what is refused."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.config import ConfigError, load, resolve
from fastssl.data.datasets import ArrayImages, fingerprint, open_source
from fastssl.data.errors import DataError
from fastssl.data.loader import PretrainLoader
from fastssl.data.sources.base import Split
from fastssl.evaluate.embed import raw_input
from fastssl.run import evaluation
from fastssl.run.build import check_steps
from fastssl.run.directory import prepared


def put(root, *numbers):
    for k in numbers:
        path = root / "ab"[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 5), (k, 0, 0)).save(path)
    return root


def start(root, output, *overrides):
    source = [f"data.source.{word}" for word in ("name=folder", f"path={root}")]
    cfg = resolve("simclr-digits", [f"output={output}", "name=x", *source, *overrides])
    with prepared(cfg, fingerprint(open_source(cfg.data.source, cfg.seed))):
        return load(cfg.directory)


def test_a_run_with_other_data_is_refused_unless_asked_for(tmp_path):
    """Fault 33: it went on without a word."""
    data = put(tmp_path / "data", *range(10))
    start(data, tmp_path)
    start(data, tmp_path, "resume=auto")
    put(data, *range(10, 14))
    with pytest.raises(ConfigError, match="8 training items and 2 held out, now 12 .* and 2 held"):
        start(data, tmp_path, "resume=auto")
    saved = start(data, tmp_path, "resume=auto", "data.changed=allow")
    assert saved.data.changed == "refuse"  # what was asked for once is not for ever
    (data / "a/0.png").rename(data / "a/zero.png")
    with pytest.raises(ConfigError, match="have changed since it began .other names or labels"):
        start(data, tmp_path, "resume=auto")


def test_the_same_data_may_lie_elsewhere(tmp_path):
    """Fault 16: a node's own disk is another path on each node."""
    data = put(tmp_path / "data", *range(10))
    start(data, tmp_path)
    shutil.move(data, tmp_path / "scratch")
    saved = start(tmp_path / "scratch", tmp_path, "resume=auto")
    assert saved.data.source.path == tmp_path / "scratch"
    other = put(tmp_path / "other", *range(11))
    with pytest.raises(ConfigError, match="is another run: data.source.path"):
        start(other, tmp_path, "resume=auto")


def test_other_labels_classes_or_names_are_other_data():
    """Fault 33: of shards, whose names may stay the same."""

    def printed(labels=(0, 1, 1), classes="ab", names="abc"):
        pixels = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
        part = ArrayImages(pixels, torch.tensor(labels), classes, [*names])
        return fingerprint(Split(part, part))["names"]

    told = [printed(), printed((0, 1, 0)), printed(classes="ac"), printed(names="abd")]
    assert len({*told}) == 4 and told[0] == printed()


@pytest.mark.parametrize(
    "name, count, own, least",
    [
        ("simclr", 20, ["engine.large_batch=plain"], 0),
        ("simclr", 19, ["engine.large_batch=plain"], 4),
        ("simclr", 19, ["engine.micro_batchnorm=true"], 4),
        ("simclr", 19, [], 0),
        ("simclr", 17, ["engine.accumulation=1"], 2),
        ("mae", 19, ["engine.large_batch=plain"], 0),
        ("mae", 17, [], 2),
    ],
)
def test_a_short_batch_that_does_not_divide_is_refused(name, count, own, least):
    given = ["data.last=pad", "batch_size=8", "engine.accumulation=2", *own]
    cfg = resolve(f"{name}-digits", given)
    source = open_source(cfg.data.source, 0).train.select(np.arange(count))
    loader = PretrainLoader(source, cfg.views(), batch_size=8, seed=0, last="pad")
    if not least:
        return check_steps(cfg, loader)
    with pytest.raises(ConfigError, match=f"samples, fewer than {least} for each of 1 ranks"):
        check_steps(cfg, loader)


def test_mostly_bad_data_are_told_by_an_evaluation(tmp_path, monkeypatch):
    """Fault 43: it said that the encoder could not be evaluated."""
    data = put(tmp_path / "data", *range(40))
    cfg = resolve("simclr-digits", ["data.source.name=folder", f"data.source.path={data}"])
    split = open_source(cfg.data.source, 0)
    for part in split:
        for i in range(2, len(part)):
            (data / part.name(i)).write_bytes(b"no image")

    def refuse(*args, **options):
        raise ValueError("too few")

    monkeypatch.setattr(evaluation, "evaluate_features", refuse)
    with pytest.raises(DataError, match="most of the data is unreadable, 36 of 40 items"):
        evaluation.evaluate_on(cfg, split, cfg.views(), raw_input)
