"""Directories of runs that are damaged, or that a stranger has made: passed over, never obeyed."""

import hashlib
import json
import os
import pickle
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch

from fastssl.config import ConfigError
from fastssl.engine.checkpoint import CheckpointError, Checkpoints, _unreadable, damaged
from fastssl.engine.config import CheckpointConfig
from fastssl.engine.shards import key_of, write_shard
from fastssl.export import load_encoder
from fastssl.random import RESUME, mix
from fastssl.report import read_metrics
from fastssl.run.directory import prepared
from fastssl.run.train import pretrain
from tests.runs import final, tiny


def forged(run, step, **trainer):
    """A copy of the checkpoint, as of another step; `sign` it when it is changed."""
    folder = run.directory / "checkpoints"
    copy = folder / f"step-{step:08d}"
    shutil.copytree(folder / "step-00000010", copy, dirs_exist_ok=True)
    said = json.loads((copy / "trainer.json").read_text())
    (copy / "trainer.json").write_text(json.dumps(said | {"step": step} | trainer))
    return sign(copy)


def sign(checkpoint, keep=lambda name: True):
    """Write a manifest that fits what lies there."""
    files = [f for f in checkpoint.rglob("*") if f.is_file() and f.name != "manifest.json"]
    sums = {
        str(f.relative_to(checkpoint)): {
            "bytes": f.stat().st_size,
            "sha256": hashlib.sha256(f.read_bytes()).hexdigest(),
        }
        for f in files
    }
    listed = {name: entry for name, entry in sums.items() if keep(name)}
    (checkpoint / "manifest.json").write_text(json.dumps({"files": listed}))
    return checkpoint


class Attack:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_resumed_run_executes_and_believes_nothing(run, tmp_path):
    """Faults 29 and 30: five hostile checkpoints, each of a later step, and a hostile log."""
    marker, before = tmp_path / "executed", final(run)
    attack = pickle.dumps(Attack(marker))
    (forged(run, 11) / "state-0.safetensors").write_bytes(attack)
    sign(run.directory / "checkpoints/step-00000011")
    (forged(run, 12) / "state-1.safetensors").write_bytes(attack)
    (forged(run, 13) / "rng-0.pt").write_bytes(attack)
    sign(run.directory / "checkpoints/step-00000013")
    forged(run, 14, epoch_losses="many")
    (run.directory / "checkpoints/step-00000015").mkdir()
    (run.directory / "checkpoints/step-00000015/manifest.json").write_text('{"files": {}}')
    lines = ["[]", '{"kind": "train"}', '{"kind": "event", "step": 3}', "[" * 100_000]
    lines += ['{"kind": "train", "step": 3, "loss": "x"}', '{"kind": 3, "step": "x"}']
    with open(run.directory / "metrics.jsonl", "a") as log:
        log.write("\n".join(lines) + "\n")
    pretrain(run)
    assert not marker.exists()
    assert final(run) == before
    rows = read_metrics(run.directory / "metrics.jsonl")
    said = [row["detail"] for row in rows if row.get("what") == "damaged"]
    assert [line.split()[1] for line in said] == [f"step-000000{i}" for i in (15, 14, 13, 12, 11)]
    assert "holds more than tensors" in said[-1] and "does not name state-1" in said[-2]
    old = forged(run, 14, format=2)
    (old / "deepspeed").mkdir()
    (old / "state-0.safetensors").rename(old / "deepspeed/mp_rank_00_model_states.pt")
    (old / "deepspeed/mp_rank_00_model_states.pt").write_bytes(attack)
    sign(old)
    with pytest.raises(CheckpointError, match=r"step-00000014 was .* another version .*format 2, "):
        pretrain(run)
    assert not marker.exists()


def lists_too_little(checkpoint):
    sign(checkpoint, keep=lambda name: name in ("trainer.json", "encoder.safetensors"))
    for file in [*checkpoint.glob("state-*"), *checkpoint.glob("rng*")]:
        file.unlink()


def lists_no_weights(checkpoint):
    (checkpoint / "state-0.safetensors").unlink()
    sign(checkpoint)


def lists_no_random_state(checkpoint):
    (checkpoint / "rng-0.pt").unlink()
    sign(checkpoint)


def links_outside(checkpoint):
    state = checkpoint / "rng-0.pt"
    state.rename(checkpoint.parent / "elsewhere")
    state.symlink_to(checkpoint.parent / "elsewhere")


def adds_a_state(checkpoint, name="state-1.safetensors"):
    (checkpoint / "deepspeed").mkdir()
    (checkpoint / name).write_bytes(b"0")
    sign(checkpoint)


def adds_an_encoder(checkpoint):
    shutil.copy(checkpoint / "encoder.safetensors", checkpoint / "encoder-x.safetensors")
    sign(checkpoint)


@pytest.fixture
def checkpoint(tmp_path):
    """As `save` leaves one, of step 10 by one process, its states small."""
    path = tmp_path / "run/checkpoints/step-00000010"
    path.mkdir(parents=True)
    (path / "trainer.json").write_text('{"step": 10, "world": 1, "format": 3}')
    (path / "encoder.safetensors").write_bytes(b"weights")
    torch.save({"a": torch.ones(3)}, path / "rng-0.pt")
    write_shard(path / "state-0.safetensors", {key_of("a", "parameter", 0): torch.ones(3)}, {})
    return sign(path)


# faults 29 and 30
@pytest.mark.parametrize(
    "spoil, reason",
    [
        ("[]", "manifest"),
        ("null", "manifest"),
        ('{"files": null}', "manifest"),
        ('{"files": {"trainer.json": 3}}', "manifest"),
        ("[" * 100_000, "manifest"),
        (lambda c: forged_step(c, "x"), "trainer.json is of step 'x'"),
        (lambda c: forged_step(c, 5), "trainer.json is of step 5"),
        (lambda c: forged_step(c, 10, networks={"a": "", "../x": ""}), "networks {'a': '', '../x'"),
        (lambda c: forged_step(c, 10, networks={}), "networks {}"),
        (
            lambda c: forged_step(c, 10, networks={"image": "", "depth": ""}),
            "encoder-depth.safetensors",
        ),
        (adds_an_encoder, "encoder-x.safetensors is no file of a checkpoint"),
        (lambda c: (c / ".hidden").write_text(""), "does not name .hidden"),
        (lambda c: os.mkfifo(c / "fifo"), "does not name fifo"),
        (lists_too_little, "does not name rng-0.pt"),
        (lists_no_random_state, "does not name rng-0.pt"),
        (lists_no_weights, "does not name state-0.safetensors"),
        (lambda c: forged_step(c, 10, world=9), "the files of 9 processes"),
        (links_outside, "rng-0.pt is no plain file"),
        (adds_a_state, "state-1.safetensors is no file of a checkpoint"),
        (
            lambda c: adds_a_state(c, "deepspeed/mp_rank_00_model_states.pt"),
            "mp_rank_00_model_states.pt is no file of a checkpoint",
        ),
        (lambda c: (c / "rng-0.pt").unlink(), "rng-0.pt is missing"),
        (lambda c: (c / "encoder.safetensors").write_bytes(b"w"), "has 1 bytes, not 7"),
        (lambda c: (c / "encoder.safetensors").write_bytes(b"Weights"), "match its checksum"),
    ],
)
def test_a_checkpoint_is_whole_and_of_its_step_or_damaged(spoil, reason, checkpoint):
    assert damaged(checkpoint) is None
    if isinstance(spoil, str):
        (checkpoint / "manifest.json").write_text(spoil)
    else:
        spoil(checkpoint)
    assert reason in damaged(checkpoint)


# fault 29
@pytest.mark.parametrize("name", ["rng-0.pt", "state-0.safetensors"])
def test_a_state_that_is_code_is_not_run(name, checkpoint, tmp_path):
    assert _unreadable(checkpoint, share=False) is None
    (checkpoint / name).write_bytes(pickle.dumps(Attack(tmp_path / "executed")))
    assert f"{name} holds more than tensors" in _unreadable(checkpoint, share=False)
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_of_two_processes_is_taken_up_by_one(checkpoint):
    for name in ("state-{}.safetensors", "rng-{}.pt"):
        shutil.copy(checkpoint / name.format(0), checkpoint / name.format(1))
    forged_step(checkpoint, 10, world=2)
    loaded = []
    engine = SimpleNamespace(
        method=SimpleNamespace(networks=lambda: {"encoder": None}), load=loaded.append
    )
    checkpoints, before = Checkpoints(checkpoint.parents[1], CheckpointConfig()), torch.seed()
    try:
        assert checkpoints.load(engine, [], lambda trainer: trainer["step"], seed=5) == 10
        assert torch.initial_seed() == int(mix(RESUME, 5, 10, 0)[0])
    finally:
        torch.manual_seed(before)
    assert loaded == [checkpoint] and "written by 2 processes" in checkpoints.notes[0]


def test_the_newest_and_the_best_are_kept_and_the_newest_is_first(checkpoint):
    checkpoints = Checkpoints(checkpoint.parents[1], CheckpointConfig(keep=1))
    for step in (2, 4, 100):
        shutil.copytree(checkpoint, checkpoint.with_name(f"step-{step:08d}"))
    (checkpoint.parent / "best").write_text("step-00000004")
    assert checkpoints.latest() == "step-00000100"
    checkpoints._prune(100)
    assert checkpoints.names() == ["step-00000100", "step-00000004"]


def forged_step(checkpoint, step, **more):
    said = json.loads((checkpoint / "trainer.json").read_text())
    (checkpoint / "trainer.json").write_text(json.dumps(said | {"step": step} | more))
    sign(checkpoint)


# fault 30
def test_weights_that_are_none_are_refused_in_a_sentence(run):
    checkpoint = run.directory / "checkpoints/step-00000010"
    (checkpoint / "encoder.safetensors").write_text("no weights")
    sign(checkpoint)
    with pytest.raises(CheckpointError, match="encoder.safetensors holds no weights"):
        load_encoder(run.directory)


def test_a_reader_that_dies_meanwhile_fails_no_checkpoint(tmp_path):
    """Fault 43: torch's handler raises wherever the main thread is."""

    class Reached(Exception):
        pass

    class Stub:
        method = SimpleNamespace(networks=lambda: {"encoder": None})

        device = torch.device("cpu")

        def snapshot(self, copied):
            os.kill(os.getpid(), signal.SIGCHLD)
            raise Reached

    def alarm(number, frame):
        raise RuntimeError("DataLoader worker is killed")

    before = signal.signal(signal.SIGCHLD, alarm)
    try:
        with pytest.raises(Reached):
            Checkpoints(tmp_path, CheckpointConfig()).save(Stub(), 1, {}, best=False)
        assert signal.getsignal(signal.SIGCHLD) is alarm
    finally:
        signal.signal(signal.SIGCHLD, before)


# fault 34
@pytest.mark.parametrize("name", ["best", "latest"])
def test_a_directory_in_the_place_of_a_file_is_refused_at_once(name, tmp_path):
    cfg = tiny("mae", tmp_path)
    (cfg.directory / "checkpoints" / name).mkdir(parents=True)
    with pytest.raises(ConfigError, match=f"checkpoints/{name} is a directory"), prepared(cfg):
        pass
