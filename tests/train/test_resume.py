"""A run that was stopped and resumed ends with the same bits as one that never stopped."""

import os
import re
import signal
import socket
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from fastssl import distributed
from fastssl.config import load
from fastssl.data.sources.arrays import ArrayImages
from fastssl.engine.checkpoint import Checkpoints, damaged
from fastssl.engine.engine import Engine
from fastssl.engine.watchdog import SAVING, Stalled, heart
from fastssl.run import train
from fastssl.run.evaluation import Evaluator
from fastssl.run.log import Silent
from fastssl.run.train import Interrupted, Progress, Run, _Signals, pretrain
from tests.data.photos import folder
from tests.ranks import run_ranks
from tests.runs import final, saved_state, tiny


@pytest.fixture(autouse=True)
def _heard():
    """Started by nohup or behind &, a process ignores these, and so would these tests' runs."""
    usual = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def saved_method(cfg):
    """All that a finished run keeps: parameters, their optimizer, queues, a teacher's means."""
    last = max((cfg.directory / "checkpoints").glob("step-*"))
    return saved_state(last)


@pytest.mark.parametrize(
    "method, stage, precision, number",
    [
        ("sie", 0, "fp32", signal.SIGHUP),  # fault 46
        ("mae", 1, "bf16", signal.SIGUSR1),  # fault 46
        ("nnclr", 2, "fp32", signal.SIGINT),
        ("mocov3", 3, "bf16", signal.SIGTERM),
    ],
)
def test_a_stopped_run_goes_on_as_if_never_stopped(
    method, stage, precision, number, tmp_path, monkeypatch
):
    engine = {"engine__zero_stage": stage, "engine__precision": precision}
    others = {"model__kwargs__proj_drop_rate": 0.1, "evaluate__max_images": 40}
    if method == "nnclr":
        others["method__queue_size"] = 64  # filled and begun anew
    whole = tiny(method, tmp_path, name="whole", epochs=2, **engine, **others)
    pretrain(whole)
    parted = whole.model_copy(update={"name": "parted", "resume": "auto"})
    step = Engine.step

    def step_and_ask(self, *args, **options):
        if self.ds.global_steps == 6:  # in mid-epoch
            os.kill(os.getpid(), number)
        return step(self, *args, **options)

    monkeypatch.setattr(Engine, "step", step_and_ask)
    with pytest.raises(Interrupted, match="step 8 of 10.*resume=auto"):
        pretrain(parted)
    monkeypatch.undo()
    pretrain(parted)
    assert final(parted) == final(whole)
    weights = [
        c.directory / "checkpoints/step-00000010/encoder.safetensors" for c in (whole, parted)
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    kept, other = saved_method(whole), saved_method(parted)
    assert [k for k in kept.keys() | other.keys() if not torch.equal(kept[k], other[k])] == []


def test_a_run_that_waits_for_data_saves_and_leaves(tmp_path, monkeypatch):
    """Fault 11: a disk that does not answer, and SIGTERM meanwhile."""
    cfg = tiny("mae", tmp_path, log__every=100)
    item, read = ArrayImages.item, []

    def stall(self, index):
        read.append(index)
        if len(read) == 3 * cfg.batch_size + 7:
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(60)
        return item(self, index)

    monkeypatch.setattr(Run, "evaluate", lambda self, step: {})
    monkeypatch.setattr(Evaluator, "pictures_before", lambda self, directory: None)
    monkeypatch.setattr(ArrayImages, "item", stall)
    with pytest.raises(Interrupted, match="stopped at step 3 of 10; the state is saved"):
        pretrain(cfg)
    assert damaged(cfg.directory / "checkpoints/step-00000003") is None


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_do_not_come_end_a_run_once_it_is_saved(workers, tmp_path, monkeypatch, capfd):
    """A reader that hangs is named, with what it is at; one that is slow is waited for."""
    cfg = tiny("mae", tmp_path, data__workers=workers, engine__watchdog=1.0)
    item, read = ArrayImages.item, []

    def stalls_here(self, index):
        read.append(index)
        if len(read) in range(cfg.batch_size + 1, cfg.batch_size + 5):  # 1.6 s for a batch
            time.sleep(0.4)
        if len(read) == 2 * cfg.batch_size + 7:
            threading.Event().wait(60)
        return item(self, index)

    monkeypatch.setattr(Run, "evaluate", lambda self, step: {})
    monkeypatch.setattr(Evaluator, "pictures_before", lambda self, directory: None)
    monkeypatch.setattr(train, "rehearse", lambda *given: None)
    monkeypatch.setattr(ArrayImages, "item", stalls_here)
    named = (
        rf"rank 0 on {re.escape(socket.gethostname())} has waited 1 s for a batch "
        r"\(engine.watchdog\): process \d+ hangs in item \d+ \("
    )
    with pytest.raises(Stalled, match=named + r".*; stopped at step 2 of 10; the state") as caught:
        pretrain(cfg)
    assert caught.value.exit_code == 6
    assert damaged(cfg.directory / "checkpoints/step-00000002") is None
    assert "in stalls_here" in capfd.readouterr().err


def lagging(rank, world, output):
    """Whether there is a run to take up; to the second rank the disk shows nothing as yet."""
    if rank == 1:
        Checkpoints.latest = lambda self: None
    return train.prepare(tiny("mae", output, resume="auto")).goes_on


def test_whether_there_is_a_run_the_first_rank_says(run):
    assert run_ranks(lagging, 2, run.output) == [True, True]


def test_a_second_interrupt_says_what_it_waits_for(tmp_path, monkeypatch):
    cfg = tiny("mae", tmp_path, checkpoint__asynchronous=True)
    step, write, said = Engine.step, Checkpoints._write, threading.Event()

    def interrupted(self, *args, **options):
        if self.ds.global_steps == 6:
            raise KeyboardInterrupt
        return step(self, *args, **options)

    def slow(self, save):
        assert said.wait(60)
        write(self, save)

    class Ear(Silent):
        def say(self, text):
            if text.startswith("a checkpoint is being written"):
                said.set()

    monkeypatch.setattr(Engine, "step", interrupted)
    monkeypatch.setattr(Checkpoints, "_write", slow)
    with pytest.raises(KeyboardInterrupt):
        pretrain(cfg, Ear())
    assert damaged(cfg.directory / "checkpoints/step-00000005") is None


def test_a_rank_leaves_with_another_that_was_asked_to_stop(monkeypatch):
    """Fault 11: it has a batch, and the other, which waits for data, has none."""
    saved = []

    class Stub:
        total, progress, stalled, leave = 10, Progress(step=4), "", Run.leave
        engine = SimpleNamespace(agree=lambda vote: train.LEAVE)
        time_to_save = Run.time_to_save
        cfg = SimpleNamespace(checkpoint=SimpleNamespace(every_minutes=0))
        saved_at = 0.0

        def save(self, *, best):
            saved.append((best, heart.place))

        def stopped(self):
            return "saved"

        def interrupted(self):
            return Interrupted("together")

    with pytest.raises(Interrupted, match="together"):
        next(Run.agreed(Stub(), iter([{}])))
    monkeypatch.setattr(distributed, "gather_objects", lambda own: [own, "rank 1 has waited"])
    with pytest.raises(Stalled, match="^rank 1 has waited; saved"):
        next(Run.agreed(Stub(), iter([{}])))
    assert saved == [(False, ""), (False, SAVING)]  # the first one takes as long as it takes


# fault 46
def test_signals_ask_a_run_to_stop_and_no_more():
    class Stub:
        asked_to_stop = False

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    for number in numbers:
        stub = Stub()
        with _Signals(stub):
            os.kill(os.getpid(), number)
        assert stub.asked_to_stop
    assert [signal.getsignal(number) for number in numbers] == before
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with _Signals(Stub()):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, hangup)


class Heard(Silent):
    def __init__(self):
        self.words = []

    def say(self, text):
        self.words.append(text)


def test_a_run_keeps_its_back_end_or_says_that_it_changes(tmp_path):
    photos = {"name": "folder", "path": str(folder(tmp_path / "photos", 20))}
    own = {"data__source": photos, "batch_size": 8, "data__backend": "torch", "resume": "auto"}
    watch = Heard()
    pretrain(tiny("mae", tmp_path, epochs=1, **own), watch)
    pretrain(tiny("mae", tmp_path, epochs=1, **(own | {"data__backend": "auto"})), watch)
    assert load(tmp_path / "run").data.backend == "torch"  # though DALI is there
    assert not any("views are made" in said for said in watch.words)
    pretrain(tiny("mae", tmp_path, epochs=1, **(own | {"data__backend": "dali"})), watch)
    assert "views are made by dali from here on, and were by torch: near, not the same" in (
        watch.words
    )
    assert load(tmp_path / "run").data.backend == "dali"
