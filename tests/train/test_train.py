"""Whole runs in one process: they learn, they are reproducible, and bad luck is handled."""

import gc
import io
import itertools
import json
import os
import resource
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from fastssl import distributed
from fastssl.config import ConfigError, load
from fastssl.data.errors import DataError
from fastssl.data.loader import PretrainLoader
from fastssl.engine import checkpoint
from fastssl.engine.checkpoint import CheckpointError, Checkpoints
from fastssl.engine.config import EngineConfig, EngineError
from fastssl.engine.engine import Engine
from fastssl.engine.verbs import Limits, Step
from fastssl.methods import MAE
from fastssl.methods import METHODS as REGISTERED
from fastssl.report import read_metrics
from fastssl.run import directory, rehearsal, train
from fastssl.run.directory import prepared
from fastssl.run.evaluation import EvaluationError
from fastssl.run.log import LogError, RunLog, Silent
from fastssl.run.progress import RichWatch
from fastssl.run.spikes import Applied
from fastssl.run.train import NonFinite, Progress, Run, pretrain
from tests.runs import few_digits, final, losses, tiny


@pytest.mark.parametrize(
    "method",  # of each kind
    [
        *(pytest.param(name, marks=pytest.mark.pictures) for name in ("simclr", "mae")),
        *("vicreg", "clip", "data2vec"),
    ],
)
def test_a_run_learns_and_shows_itself(method, tmp_path, request):
    more = {"data__source": few_digits(360), "batch_size": 64}
    cfg = tiny(method, tmp_path, epochs=4, optim__lr=3e-3, log__tensorboard=True, **more)
    results = pretrain(cfg)
    curve = losses(cfg)
    assert len(curve) == 20 and np.mean(curve[-3:]) < 0.97 * np.mean(curve[:3])
    rows = {row["encoder"]: row for row in results["rows"]}
    assert set(rows) == {"pretrained", "random initialization", "raw input"}
    assert rows["raw input"]["knn"] > 0.7 and rows["pretrained"] != rows["random initialization"]
    shown = {p.name for p in cfg.directory.iterdir()}
    wanted = {"config.yaml", "metrics.jsonl", "results.json", "report.html", "curves.png"}
    wanted |= {"embedding.png", "views.png", "tensorboard", "checkpoints"}
    if request.node.get_closest_marker("pictures"):
        painted = hasattr(REGISTERED[method], "reconstruct")
        assert wanted <= shown and ("reconstructions.png" in shown) == painted
    assert list((cfg.directory / "tensorboard").iterdir())
    assert json.loads((cfg.directory / "results.json").read_text())["train"]["steps"] == 20


def test_the_same_configuration_gives_the_same_run(tmp_path):
    """And leaves nothing open behind: neither files nor engines."""
    one, two = (tiny("simclr", tmp_path, name=n, data__workers=w) for n, w in (("a", 0), ("b", 2)))
    pretrain(one)
    gc.collect()
    opened = len(os.listdir("/proc/self/fd"))
    pretrain(two)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= opened
    assert final(one) == final(two)


def test_another_seed_gives_another_run(finished, tmp_path):
    other = tiny("mae", tmp_path, seed=4, epochs=1)
    pretrain(other)
    assert losses(other) != losses(finished[0])[:5]


def test_a_run_is_not_overwritten_unasked(run):
    with pytest.raises(ConfigError, match="resume=auto continues.*overwrite=true replaces"):
        pretrain(run.model_copy(update={"resume": "never"}))
    other = run.model_copy(update={"epochs": 3, "seed": 4})
    with pytest.raises(ConfigError, match="epochs: 2 -> 3; seed: 3 -> 4"):
        pretrain(other)


def test_another_schedule_is_taken_up_by_leave_alone(run):
    with pytest.raises(ConfigError, match="epochs: 2 -> 3.*: resume=extend goes on.*from where"):
        pretrain(run.model_copy(update={"epochs": 3}))
    with pytest.raises(ConfigError, match="seed: 3 -> 4"):
        pretrain(run.model_copy(update={"resume": "extend", "seed": 4}))
    with pytest.raises(ConfigError, match="epochs=1 is 5 steps, and the run is at step 10"):
        pretrain(run.model_copy(update={"resume": "extend", "epochs": 1}))
    assert load(run.directory).epochs == 2
    longer = run.model_copy(update={"resume": "extend", "epochs": 4})
    pretrain(longer)
    rows = read_metrics(run.directory / "metrics.jsonl")
    (said,) = [row for row in rows if row.get("what") == "extended"]
    rate = 1e-3 * run.optim.schedule.factor(10, 20)
    assert said["step"] == 10 and said["detail"].startswith("epochs: 2 -> 4: from step 10 on")
    last = 1e-3 * run.optim.schedule.factor(9, 10)
    assert (
        f"20 steps, so that the learning rate goes from {last:.3g} to {rate:.3g}"
        in (said["detail"])
    )
    (at,) = [row["lr"] for row in rows if row["kind"] == "train" and row["step"] == 11]
    assert at == pytest.approx(rate) and load(run.directory).epochs == 4
    pretrain(longer)  # is no change any more
    events = read_metrics(run.directory / "metrics.jsonl")
    assert [row["what"] for row in events if row["kind"] == "event"][-1] == "resumed"


def test_a_checkpoint_can_come_by_the_clock(tmp_path, monkeypatch):
    """13 s a step by a clock of the test's own; the first rank's decides."""
    clock, step = [0.0], Engine.step

    def slow(self, *args, **options):
        clock[0] += 13
        return step(self, *args, **options)

    monkeypatch.setattr(Engine, "step", slow)
    times = {"monotonic": lambda: clock[0], "perf_counter": lambda: clock[0]}
    monkeypatch.setattr(train, "time", SimpleNamespace(**times))
    cfg = tiny("mae", tmp_path, checkpoint__every=0, checkpoint__every_minutes=1)
    pretrain(cfg)
    kept = sorted(path.name for path in (cfg.directory / "checkpoints").glob("step-*"))
    assert kept == ["step-00000006", "step-00000010"]
    run = SimpleNamespace(cfg=cfg, saved_at=0.0)
    assert Run.time_to_save(run)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert not Run.time_to_save(run)


def test_a_finished_run_resumed_only_reports(finished, run):
    assert pretrain(run)["rows"] == finished[1]["rows"]


@pytest.mark.parametrize("name", ["simclr", "barlow_twins", "mae", "mocov3"])
def test_padding_is_in_no_loss_and_no_count(name, tmp_path, monkeypatch):
    """What fills a short batch up is made NaN; of two ranks: test_ranks."""
    stream, seen = PretrainLoader.stream, []

    def spoiled(self, *args, **options):
        for batch in stream(self, *args, **options):
            seen.append(int(batch["padding"].sum()))
            for view in batch["views"]:
                view[batch["padding"]] = float("nan")
            yield batch

    monkeypatch.setattr(PretrainLoader, "stream", spoiled)
    cfg = tiny(name, tmp_path, batch_size=28, data__last="pad", engine__accumulation=4)
    pretrain(cfg)
    assert seen == [0, 0, 0, 0, 10] * 2 and np.isfinite(losses(cfg)).all()
    saved = max((cfg.directory / "checkpoints").glob("*/trainer.json")).read_text()
    assert json.loads(saved)["images"] == 2 * 130
    if name == "mae":  # micro-batches of 5, 5, 4 and 4 count by their samples
        whole = cfg.model_copy(update={"name": "whole", "engine": EngineConfig()})
        pretrain(whole)
        np.testing.assert_allclose(losses(cfg), losses(whole), rtol=1e-5)


def poison(monkeypatch, *steps):
    """Make the loss of some steps infinite, as a bad batch would."""
    loss, seen = MAE.loss, []

    def bad(self, encoded, batch):
        if len(batch["index"]) > rehearsal.ROWS:
            seen.append(1)
        out = loss(self, encoded, batch)
        return {"loss": out["loss"] * (float("inf") if len(seen) in steps else 1.0)}

    monkeypatch.setattr(MAE, "loss", bad)


def test_a_nonfinite_loss_stops_the_run(tmp_path, monkeypatch):
    """At every stage and precision: test_engine."""
    poison(monkeypatch, 7)
    cfg = tiny("mae", tmp_path, engine__zero_stage=2, engine__precision="bf16")
    with pytest.raises(NonFinite, match=r"step 7; images \[\d+, .*step-00000005"):
        pretrain(cfg)


@pytest.mark.parametrize("stage, precision", [(0, "fp32"), (3, "bf16")])
def test_a_nonfinite_step_can_be_skipped(stage, precision, tmp_path, monkeypatch):
    poison(monkeypatch, 4)
    moved: list[float] = []
    monkeypatch.setattr(MAE, "on_step", lambda self, keep, progress: moved.append(progress))
    cfg = tiny(
        "mae",
        tmp_path,
        engine__zero_stage=stage,
        engine__precision=precision,
        engine__on_nonfinite="skip",
    )
    results = pretrain(cfg)
    lines = (cfg.directory / "metrics.jsonl").read_text().splitlines()
    strict = [json.loads(line, parse_constant=pytest.fail) for line in lines]  # fault 37
    assert [r["loss"] for r in strict if r["kind"] == "train" and r["step"] == 4] == [None]
    events = [r for r in read_metrics(cfg.directory / "metrics.jsonl") if r["kind"] == "event"]
    assert [e["step"] for e in events if e["what"] == "nonfinite"] == [4]
    assert np.isfinite(results["train"]["loss"]) and results["train"]["steps"] == 10
    assert results["train"]["skipped_steps"] == 1 and len(moved) == 9 and 0.4 not in moved


def spike(monkeypatch, step, scale, begun=0):
    """Make the loss of one step so many times as large, and its gradient a hundred times."""
    loss, seen = MAE.loss, [1] * begun

    def large(self, encoded, batch):
        if len(batch["index"]) > rehearsal.ROWS:
            seen.append(1)
        out = loss(self, encoded, batch)["loss"]
        return {"loss": scale * out + 99 * (out - out.detach()) if len(seen) == step else out}

    monkeypatch.setattr(MAE, "loss", large)


@pytest.mark.parametrize("key, scale", [("spike", 100.0), ("spike_norm", 1.0)])
def test_a_spike_leaves_no_trace_and_a_resumed_run_knows_what_came_before(
    key, scale, tmp_path, monkeypatch
):
    """The run is that whose step was not finite, and was skipped."""
    keys = {f"engine__{key}": 20.0, "engine__spike_window": 4}
    other = tiny("mae", tmp_path, name="other", engine__on_nonfinite="skip")
    cfg = tiny("mae", tmp_path, **keys)
    with monkeypatch.context() as patch:
        poison(patch, 7)
        pretrain(other)
    with monkeypatch.context() as patch:
        spike(patch, 7, scale)
        results = pretrain(cfg)
    assert results["train"]["skipped_steps"] == 1
    rows = [[row for row in final(c) if row["step"] != 7] for c in (cfg, other)]
    assert rows[0] == rows[1]
    events = read_metrics(cfg.directory / "metrics.jsonl")
    (event,) = [row for row in events if row.get("what") == "spike"]
    assert event["step"] == 7 and f"(engine.{key})" in event["detail"]
    whole = final(cfg)
    shutil.rmtree(cfg.directory / "checkpoints/step-00000010")
    with monkeypatch.context() as patch:
        spike(patch, 7, scale, begun=5)
        pretrain(cfg.model_copy(update={"resume": "auto"}))
    assert final(cfg) == whole


def test_a_run_goes_back_from_a_spike_and_leaves_out_what_led_to_it(tmp_path, monkeypatch):
    """It is the run whose steps 5 to 7 were skipped, also when it is killed and taken up; the one
    checkpoint that is kept would be that of step 5."""
    keys = {"engine__spike": 20.0, "engine__spike_window": 4, "engine__spike_back": 2}
    other = tiny("mae", tmp_path, name="other", engine__on_nonfinite="skip")
    cfg = tiny("mae", tmp_path, **keys, checkpoint__keep=1, checkpoint__best="loss")
    with monkeypatch.context() as patch:
        poison(patch, 5, 6, 7)
        pretrain(other)
    with monkeypatch.context() as patch:
        spike(patch, 7, 100.0)
        results = pretrain(cfg)
    assert results["train"]["skipped_steps"] == 3
    rows = [[row for row in final(c) if row["step"] not in (5, 6, 7)] for c in (cfg, other)]
    assert rows[0] == rows[1] and len(rows[0]) == 1 + 7 + 1
    (event,) = [r for r in read_metrics(cfg.directory / "metrics.jsonl") if r["kind"] == "event"]
    assert (event["what"], event["step"], len(event["images"])) == ("returned", 0, 24)
    assert event["detail"].startswith("the loss") and "at step 7 is above" in event["detail"]
    assert event["detail"].endswith("gone back to step 0, steps 5 to 7 are left out")
    saved = json.loads((cfg.directory / "checkpoints/step-00000010/trainer.json").read_text())
    assert saved["left_out"] == [[5, 7]]
    whole = final(cfg)
    shutil.rmtree(cfg.directory / "checkpoints/step-00000010")  # in the midst of the three is one
    assert (cfg.directory / "checkpoints/best").read_text() == "step-00000010"
    pretrain(cfg.model_copy(update={"resume": "auto"}))
    assert final(cfg) == whole


@pytest.mark.parametrize("best, stays", [(5, True), (10, False)])
def test_a_best_one_that_is_undone_is_no_best(best, stays, run):
    kept = Checkpoints(run.directory, run.checkpoint)
    (kept.folder / "best").write_text(f"step-{best:08d}")
    kept.forget(5)
    assert kept.names() == [(kept.folder / "latest").read_text()] == ["step-00000005"]
    assert (kept.folder / "best").exists() == stays
    log = RunLog(run.directory, Silent(), writing=True)
    stub: Any = SimpleNamespace(checkpoints=kept, log=log)
    Run.take_up(stub, Progress(step=5, best=0.3), [])
    assert stub.progress.best == (0.3 if stays else None) and stub.saved_step == 5


def test_where_there_is_no_way_back_a_spike_is_left_out_alone(run, monkeypatch):
    """Of a run that was begun without spike_back: its one checkpoint is that of step 5."""
    shutil.rmtree(run.directory / "checkpoints/step-00000010")
    keys = {"spike": 20.0, "spike_window": 4, "spike_back": 5, "max_skipped": 2}
    cfg = run.model_copy(update={"engine": run.engine.model_copy(update=keys), "resume": "auto"})
    spike(monkeypatch, 10, 100.0, begun=5)
    pretrain(cfg)
    rows = read_metrics(cfg.directory / "metrics.jsonl")
    assert [r["step"] for r in rows if r.get("what") in ("spike", "returned")] == [10]


def test_limits_stand_on_a_whole_window_and_one_outlier_hardly_moves_them():
    cfg, seen = EngineConfig(spike=2.0, spike_norm=3.0, spike_window=5), Applied()
    for loss in (9.0, 1.0, 3.0, 900.0, 2.0, 4.0):
        assert seen.limits(cfg) == Limits(np.inf, np.inf) or len(seen.losses) == 5
        seen.add(Step({}, True, True, False, loss=loss, norm=loss), cfg)
    assert seen.losses == [1.0, 3.0, 900.0, 2.0, 4.0]
    assert seen.limits(cfg) == pytest.approx((3 + 2 * 1.4826 * 1, 9.0))
    seen.add(Step({}, True, True, False), cfg)  # nothing was watched: those before are long past
    assert seen == Applied()
    even = Applied([2.0] * 5, [])
    assert even.limits(cfg) == Limits(2.04, np.inf)
    assert even.limits(EngineConfig()) is None


# fault 41
def test_skipping_ends_after_so_many_steps_in_a_row(tmp_path):
    class Stub:
        cfg = tiny("mae", tmp_path, engine__on_nonfinite="skip", engine__max_skipped=3)
        progress, total, watch = Progress(step=6, skipped=4), 10, Silent()
        log = RunLog(tmp_path, Silent(), writing=True)
        checkpoints = Checkpoints(tmp_path, cfg.checkpoint)

    batch = {"index": torch.arange(20)}
    for _ in range(2):
        Run.refuse(Stub, batch)
    with pytest.raises(NonFinite, match="in 3 steps in a row .engine.max_skipped.*none yet") as e:
        Run.refuse(Stub, batch)
    assert (e.value.exit_code, Stub.progress.skipped) == (3, 7)
    assert [row["images"] for row in Stub.log.rows()] == [[*range(20)]] * 3
    Stub.progress.skipped_in_row = 2
    Stub.cfg = tiny("mae", tmp_path, engine__max_skipped=3)
    with pytest.raises(NonFinite, match="^the loss is high, as in 3 steps"):
        Run.refuse(Stub, batch, "the loss is high")
    Stub.progress.left_out = [(1, 3), (4, 6)]  # the next one is that of the steps 5 to 7
    Stub.progress.skipped_in_row, Stub.progress.step = 0, 7
    Stub.cfg = tiny("mae", tmp_path, engine__max_skipped=3, engine__spike=9, engine__spike_back=2)
    with pytest.raises(NonFinite, match="^the loss is high, as in 3 stretches in a row"):
        Run.refuse(Stub, batch, "the loss is high")
    Stub.progress.skipped_in_row, Stub.total = 0, 1  # of a run that is shorter
    Stub.cfg = tiny("mae", tmp_path, engine__on_nonfinite="skip")
    with pytest.raises(NonFinite, match="1 steps in a row"):
        Run.refuse(Stub, batch)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_keeps_the_last_good_checkpoint(asynchronous, finished, tmp_path, monkeypatch):
    """A limit on file sizes stands in for the disk: writes beyond it fail with EFBIG."""
    cfg = tiny("mae", tmp_path, epochs=2, checkpoint__asynchronous=asynchronous)
    save, handler = Engine.encoder_reader, signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk(self, name):
        if self.ds.global_steps == 10:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        return save(self, name)

    monkeypatch.setattr(Engine, "encoder_reader", fill_the_disk)
    try:
        with pytest.raises(
            CheckpointError, match="could not write.*last good one is.*step-00000005"
        ):
            pretrain(cfg)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    monkeypatch.undo()
    assert [p.name for p in (cfg.directory / "checkpoints").glob("[.s]*")] == ["step-00000005"]
    pretrain(cfg.model_copy(update={"resume": "auto"}))
    assert final(cfg) == final(finished[0])


def test_a_place_that_takes_no_checkpoint_stops_the_run(tmp_path):
    cfg = tiny("mae", tmp_path)
    cfg.directory.mkdir()
    (cfg.directory / "checkpoints").write_text("a file stands where the folder should")
    with pytest.raises(ConfigError, match="checkpoints is not a directory"):
        pretrain(cfg)
    assert not (cfg.directory / "metrics.jsonl").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("board, said", [(False, "cannot write .*at step 3"), (True, "has gone")])
def test_a_run_whose_directory_goes_ends_in_a_sentence(board, said, tmp_path, monkeypatch):
    """Fault 34: it is not begun anew, without its configuration and its log."""
    every = {"log__every": 1 if board else 100, "checkpoint__every_steps": 3}
    cfg = tiny("mae", tmp_path, log__tensorboard=board, **every)
    step, others = Engine.step, set(threading.enumerate())

    def delete(self, *args, **options):
        if self.ds.global_steps == 1:
            shutil.rmtree(cfg.directory)
        return step(self, *args, **options)

    monkeypatch.setattr(Engine, "step", delete)
    with pytest.raises(LogError, match=f"{said}.*No such file"):
        pretrain(cfg)
    assert not cfg.directory.exists()
    for thread in {*threading.enumerate()} - others:  # its exception is this test's alone
        if type(thread).__name__ == "_AsyncWriterThread":
            thread.join(60)


def test_a_checkpoint_comes_after_its_log_and_configuration(tmp_path, monkeypatch):
    """Fault 44: what is needed with a checkpoint is on the disk before it."""
    synced, fsync = [], os.fsync

    def noting(descriptor):
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.split(".")[:2])
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    pretrain(tiny("mae", tmp_path, epochs=1))
    order = [["", "data"], ["", "config"], ["run"]]
    order += [["metrics", "jsonl"], ["", "manifest"], ["checkpoints"]]
    at = 0
    for name in order:  # each after the one before
        at = synced.index(name, at) + 1


@pytest.mark.parametrize(
    "model, stage",
    [("vit_tiny_patch16_224", 3), ("resnet10t", 1)],  # stages of a ViT: test_engine
)
def test_bfloat16_trains_with_batch_norms(model, stage, tmp_path):
    # Not at 16 pixels: on maps of one pixel the CPU's bfloat16 convolution has returned NaN.
    # Few images and narrow layers: without AVX-512 a CPU takes minutes otherwise.
    few = {"name": "fractals", "classes": 4, "per_class": 15, "size": 48}
    narrow = {"channels": [8, 16, 32, 64], "stem_width": 8}
    resnet = {"model__name": model, "model__kwargs": narrow, "data__image_size": 48}
    resnet |= {"data__source": few, "batch_size": 24}
    changes = {"epochs": 1, "engine__zero_stage": stage, **(resnet if "resnet" in model else {})}
    exact = tiny("simclr", tmp_path, name="exact", **changes)
    half = tiny("simclr", tmp_path, name="half", engine__precision="bf16", **changes)
    pretrain(exact)
    pretrain(half)
    np.testing.assert_allclose(losses(half), losses(exact), rtol=0.03)


@pytest.mark.pictures
def test_a_finished_masked_run_is_shown_again_at_stage_3(tmp_path):
    uncut = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    cfg = tiny("mae", tmp_path, epochs=1, engine__zero_stage=3, engine__deepspeed=uncut)
    first = pretrain(cfg)
    (cfg.directory / "reconstructions.png").unlink()
    assert pretrain(cfg.model_copy(update={"resume": "auto"}))["rows"] == first["rows"]
    assert (cfg.directory / "reconstructions.png").is_file()


def test_overwriting_needs_a_run_that_can_start(run, tmp_path):
    cfg = run.model_copy(update={"resume": "never", "epochs": 1})
    whole = final(cfg)
    broken = cfg.engine.model_copy(update={"deepspeed": {"train_batch_size": 3}})
    for killed in (False, True):
        if killed:  # one that was to replace it, before its first step
            cfg.directory.rename(tmp_path / ".run.replaced")
            cfg.directory.mkdir()
            shutil.copy(tmp_path / ".run.replaced/config.yaml", cfg.directory)
        with pytest.raises(EngineError, match="DeepSpeed or the optimizer refuses this"):
            pretrain(cfg.model_copy(update={"overwrite": True, "engine": broken}))
        assert final(cfg) == whole

    def interrupt(self, step):
        raise KeyboardInterrupt  # a signal is ignored in a background job

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "evaluate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pretrain(cfg.model_copy(update={"overwrite": True}))
    assert final(cfg) == whole
    pretrain(cfg.model_copy(update={"overwrite": True}))
    assert not load(cfg.directory).overwrite  # or its config.yaml would replace it unasked
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["run"]


def test_an_infinite_run_asks_for_more_epochs(tmp_path):
    schedule = {"name": "infinite", "warmup_steps": 2, "cooldown_steps": 3}
    cfg = tiny("mae", tmp_path, epochs=2, optim__schedule=schedule)
    pretrain(cfg)
    with pytest.raises(ConfigError, match="epochs=1 is 5 steps, and the run is at step 10"):
        pretrain(cfg.model_copy(update={"resume": "auto", "epochs": 1}))
    annealed = tiny("mae", tmp_path, epochs=3, optim__schedule=schedule | {"anneal_steps": 4})
    pretrain(annealed.model_copy(update={"resume": "auto"}))
    rates = [r["lr"] for r in read_metrics(cfg.directory / "metrics.jsonl") if "lr" in r]
    assert len(rates) == 15 and len(set(rates[5:11])) == 1 and rates[-1] < 0.1 * rates[10]
    with pytest.raises(ConfigError, match="optim.schedule.anneal_steps=100 leaves nothing"):
        pretrain(tiny("mae", tmp_path, optim__schedule=schedule | {"anneal_steps": 100}))


def test_what_is_not_a_number_is_never_the_best(tmp_path):
    class Stub:
        cfg = tiny("mae", tmp_path, checkpoint__best="loss")
        progress = Progress()

    told = [Run.improves(Stub, {"loss": loss}) for loss in (2.0, float("nan"), 5.0, 1.0, 1.0)]
    assert told == [True, False, False, True, False]


def test_what_is_written_meanwhile_is_the_state_of_its_step(tmp_path, monkeypatch):
    files, later = {}, threading.Event()
    step, write = Engine.step, checkpoint.write_atomically

    def steps_on(self, *args, **kwargs):
        if self.ds.global_steps == 7:
            later.set()
        return step(self, *args, **kwargs)

    def slow(path, content):
        assert later.wait(60)
        write(path, content)

    monkeypatch.setattr(Engine, "step", steps_on)
    for asynchronous in (False, True):
        if asynchronous:
            later.clear()
            monkeypatch.setattr(checkpoint, "write_atomically", slow)
        else:
            later.set()
        cfg = tiny("mocov3", tmp_path, name=f"run-{asynchronous}", epochs=2)
        update = {"asynchronous": asynchronous, "keep": 3}
        pretrain(cfg.model_copy(update={"checkpoint": cfg.checkpoint.model_copy(update=update)}))
        for path in cfg.directory.glob("checkpoints/step-*/*"):
            files.setdefault(f"{path.parent.name}/{path.name}", []).append(path.read_bytes())
    assert len(files) == 12
    clocked = ("trainer.json", "manifest.json")
    different = [name for name, (one, other) in files.items() if one != other]
    assert all(name.endswith(clocked) for name in different)


def test_a_damaged_checkpoint_is_passed_over(finished, run):
    newest = run.directory / "checkpoints/step-00000010"
    victim = newest / "state-0.safetensors"
    victim.write_bytes(victim.read_bytes()[:-100])
    results = pretrain(run)
    rows = read_metrics(run.directory / "metrics.jsonl")
    damaged = [r["detail"] for r in rows if r.get("what") == "damaged"]
    assert len(damaged) == 1 and "step-00000010 is damaged" in damaged[0]
    kept = {p.name for p in newest.parent.iterdir()}
    assert {".damaged-step-00000010", "step-00000010", "step-00000005"} <= kept
    assert not list(newest.rglob("*.py"))
    assert results["rows"] == finished[1]["rows"]


def test_with_no_intact_checkpoint_a_run_begins_anew(finished, run):
    for manifest in run.directory.glob("checkpoints/step-*/manifest.json"):
        manifest.write_text("{")
    pretrain(run)
    assert final(run) == final(finished[0])


def test_with_no_intact_checkpoint_a_run_begins_anew_with_its_weights(finished, tmp_path):
    cfg = tiny("mae", tmp_path, epochs=1, model__weights=str(finished[0].directory))
    pretrain(cfg)
    whole = final(cfg)
    assert whole[0]["knn"] == final(finished[0])[-1]["knn"]  # it begins where that one ended
    assert whole[0]["rankme"] == final(finished[0])[-1]["rankme"]
    (manifest,) = cfg.directory.glob("checkpoints/step-*/manifest.json")
    manifest.write_text("{")
    again = cfg.model_copy(update={"resume": "auto"})
    with pytest.raises(CheckpointError, match="is damaged.*without model.weights: resume=auto"):
        pretrain(again)
    pretrain(again)
    assert final(cfg) == whole


def test_the_newest_checkpoints_and_the_best_are_kept(tmp_path):
    cfg = tiny("simclr", tmp_path, epochs=5, evaluate__every=1, checkpoint__keep=1)
    pretrain(cfg)
    rows = [r for r in read_metrics(cfg.directory / "metrics.jsonl") if r["kind"] == "eval"]
    best = max(rows[1:], key=lambda row: row["knn"])  # the first of equals
    kept = {p.name for p in (cfg.directory / "checkpoints").glob("step-*")}
    assert kept == {f"step-{best['step']:08}", "step-00000025"}
    assert (cfg.directory / "checkpoints/latest").read_text() == "step-00000025"
    assert (cfg.directory / "checkpoints/best").read_text() == f"step-{best['step']:08}"


def test_a_run_that_is_going_on_is_left_alone(tmp_path, monkeypatch):
    clock = SimpleNamespace(monotonic=itertools.count(0, 4).__next__, sleep=lambda seconds: None)
    monkeypatch.setattr(directory, "time", clock)
    cfg = tiny("mae", tmp_path, epochs=1)
    rival = cfg.model_copy(update={"overwrite": True})
    with prepared(cfg), pytest.raises(ConfigError, match="is being trained by another process"):
        pretrain(rival)
    with prepared(rival):
        pass
    assert not (tmp_path / ".run.lock").exists()  # fault 27


def test_accumulating_a_joint_loss_is_said(tmp_path):
    class Ear(Silent):
        heard = ""

        def say(self, text):
            self.heard += text

    ear = Ear()
    plain = {"engine__accumulation": 2, "engine__large_batch": "plain"}
    pretrain(tiny("simclr", tmp_path, epochs=1, **plain), ear)
    assert "compares or mixes images of one micro-batch (12) only" in ear.heard


@pytest.fixture
def photos(tmp_path):
    """Two class folders of 24 small pictures, two of which cannot be read."""
    folder, rng = tmp_path / "my photos", np.random.default_rng(0)
    for label in ("cats", "dögs"):
        (folder / label).mkdir(parents=True)
        for i in range(24):
            pixels = rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{i:02}.png")
    cut = folder / "cats/03.png"
    cut.write_bytes(cut.read_bytes()[:200])
    (folder / "dögs/05.png").write_bytes(b"")
    return folder


def test_unreadable_images_are_named_and_counted(photos, tmp_path):
    source = {"name": "folder", "path": str(photos), "test_fraction": 0.25}
    cfg = tiny("simclr", tmp_path, data__source=source, batch_size=12, evaluate__neighbors=5)
    results = pretrain(cfg)
    rows = read_metrics(cfg.directory / "metrics.jsonl")
    named = {r["detail"].split(":")[0] for r in rows if r.get("what") == "bad_image"}
    assert results["train"]["bad_images"] == len(named) == 2
    assert any("03.png" in n for n in named) and any("05.png" in n for n in named)


@pytest.mark.pictures
@pytest.mark.parametrize("fraction", [0.0, 0.03])
def test_own_images_without_labels_or_held_out_ones(fraction, photos, tmp_path):
    source = {"name": "folder", "path": str(photos), "flat": True, "test_fraction": fraction}
    results = pretrain(tiny("mae", tmp_path, data__source=source, batch_size=12))
    assert set(results["rows"][0]) == {"encoder", "rankme", "uniformity", "alignment"}
    assert (tmp_path / "run/embedding.png").is_file()


def test_captions_are_asked_for_before_the_training(photos, tmp_path):
    source = {"name": "folder", "path": str(photos), "flat": True}
    with pytest.raises(ConfigError, match="method.name=clip .*data.source has no labels"):
        pretrain(tiny("clip", tmp_path, data__source=source, batch_size=12))
    with pytest.raises(ConfigError, match="method.captions=9 .*10 classes.*method.captions=10"):
        pretrain(tiny("clip", tmp_path, method__captions=9))
    assert not (tmp_path / "run").exists()


@pytest.mark.pictures
def test_names_that_are_no_text_are_shown_escaped(tmp_path):
    """Faults 13 and 45: of the data, of a class, and of a file that cannot be read."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff photos"))
    for label in ("a", os.fsdecode(b"b\xff")):
        (folder / label).mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (16, 16), (20 * i, 0, 0)).save(folder / label / f"{i}.png")
    (folder / "a/\x1b[2J\udcff.png").write_bytes(b"no image")
    source = {"name": "folder", "path": str(folder), "test_fraction": 0.25}
    cfg = tiny("mae", tmp_path, data__source=source, batch_size=12, evaluate__neighbors=2)
    shown = io.StringIO()
    results = pretrain(cfg, RichWatch(Console(file=shown), 1), f"fastssl {folder}")
    assert (
        results["train"]["bad_images"] == 1 and load(cfg.directory).data.source == cfg.data.source
    )
    assert "\\x1b[2J\\udcff.png" in shown.getvalue() and "\x1b" not in shown.getvalue()
    page = (cfg.directory / "report.html").read_text(encoding="utf-8")
    assert "\\x1b[2J\\udcff.png" in page and "\x1b" not in page


def test_too_few_readable_images_to_measure(tmp_path):
    for part, count in (("train", 3), ("val", 2)):
        (tmp_path / "few" / part / "a").mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / f"few/{part}/a/{i}.png")
    for i in (0, 2):
        (tmp_path / f"few/train/a/{i}.png").write_bytes(b"no image")
    source = {"name": "folder", "path": str(tmp_path / "few")}
    results = pretrain(tiny("mae", tmp_path, data__source=source, batch_size=2, epochs=1))
    assert results["rows"][0] == {"encoder": "pretrained"}
    assert results["train"]["bad_images"] == 2


def test_the_log_is_json_and_forgets_what_is_done_again(tmp_path):
    """Faults 37 and 45: what is not finite is null, and a name is escaped."""
    log = RunLog(tmp_path, Silent(), writing=True)
    for step in (1, 2, 3):
        log.row("train", step, epoch=0.5, loss=float("nan"), lr=0.1)
        log.bad_images(step, [(f"\x1b{step}", "no image"), ("a", "no image")])
    lines = [json.loads(x, parse_constant=pytest.fail) for x in log.path.read_text().splitlines()]
    assert [row["loss"] for row in lines if row["kind"] == "train"] == [None] * 3
    again = RunLog(tmp_path, Silent(), writing=True)
    again.cut(2)
    assert [row["step"] for row in again.rows() if row["kind"] == "train"] == [1, 2]
    assert list(again.bad) == ["\\x1b1", "a", "\\x1b2"]


def test_a_log_that_cannot_be_written_stops_the_run(tmp_path):
    cfg = tiny("mae", tmp_path)
    (cfg.directory / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(LogError, match="cannot write .*metrics.jsonl at step 0"):
        pretrain(cfg)


def test_features_that_are_not_finite_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(Engine, "features", lambda self, images: images.flatten(1) * float("nan"))
    with pytest.raises(EvaluationError, match="cannot be evaluated: .*non-finite"):
        pretrain(tiny("mae", tmp_path))


def test_the_best_by_loss_is_the_epoch_with_the_lowest_mean(tmp_path):
    cfg = tiny("mae", tmp_path, epochs=4, checkpoint__best="loss", checkpoint__keep=1)
    pretrain(cfg)
    curve = np.array(losses(cfg)).reshape(4, 5).mean(1)
    best = (cfg.directory / "checkpoints/best").read_text()
    assert best == f"step-{5 * (curve.argmin() + 1):08}"


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    with pytest.raises(DataError, match="2048.*130"):
        pretrain(tiny("simclr", tmp_path, batch_size=2048))


def test_an_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="output=.*cannot be written"):
        pretrain(tiny("mae", tmp_path / "file"))


def test_accumulation_of_a_loss_per_sample_changes_nothing(tmp_path):
    one = tiny("mae", tmp_path, name="one", epochs=1)
    four = tiny("mae", tmp_path, name="four", epochs=1, engine__accumulation=4)
    pretrain(one)
    pretrain(four)
    torch.testing.assert_close(losses(one), losses(four), atol=1e-5, rtol=1e-5)
