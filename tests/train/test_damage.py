"""Directories of runs that are damaged, or that a stranger has made: passed over, never obeyed."""

import hashlib
import json
import os
import pickle
import shutil
import signal

import pytest

from fastssl.config import ConfigError
from fastssl.engine.checkpoint import CheckpointError, Checkpoints, damaged
from fastssl.export import load_encoder
from fastssl.report import read_metrics
from fastssl.run.train import pretrain
from tests.runs import final, tiny


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        from tests.runs import without_pictures

        without_pictures(patch.setattr)
        cfg = tiny("mae", tmp_path_factory.mktemp("finished"), checkpoint__keep=1)
        pretrain(cfg)
    return cfg


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run, with one checkpoint."""
    shutil.copytree(finished.directory, tmp_path / "run")
    return finished.model_copy(update={"output": tmp_path, "resume": "auto"})


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
    for state in forged(run, 11).glob("deepspeed/*"):
        state.write_bytes(attack)
        sign(state.parents[1])
    (forged(run, 12) / "deepspeed/mp_rank_000_model_states.pt").write_bytes(attack)
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
    assert "holds more than tensors" in said[-1] and "does not name deepspeed/mp" in said[-2]


def lists_too_little(checkpoint):
    sign(checkpoint, keep=lambda name: name in ("trainer.json", "encoder.safetensors"))
    for file in [*checkpoint.glob("deepspeed/*"), *checkpoint.glob("rng*")]:
        file.unlink()


def links_outside(checkpoint):
    state = checkpoint / "rng-0.pt"
    state.rename(checkpoint.parent / "elsewhere")
    state.symlink_to(checkpoint.parent / "elsewhere")


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
        (lambda c: (c / ".hidden").write_text(""), "does not name .hidden"),
        (lambda c: os.mkfifo(c / "fifo"), "does not name fifo"),
        (lists_too_little, "does not name rng-0.pt"),
        (links_outside, "rng-0.pt is no plain file"),
    ],
)
def test_a_checkpoint_is_whole_and_of_its_step_or_damaged(spoil, reason, run):
    checkpoint = run.directory / "checkpoints/step-00000010"
    assert damaged(checkpoint) is None
    if isinstance(spoil, str):
        (checkpoint / "manifest.json").write_text(spoil)
    else:
        spoil(checkpoint)
    assert reason in damaged(checkpoint)


def forged_step(checkpoint, step):
    said = json.loads((checkpoint / "trainer.json").read_text())
    (checkpoint / "trainer.json").write_text(json.dumps(said | {"step": step}))
    sign(checkpoint)


# fault 30
def test_weights_that_are_none_are_refused_in_a_sentence(run):
    checkpoint = run.directory / "checkpoints/step-00000010"
    (checkpoint / "encoder.safetensors").write_text("no weights")
    sign(checkpoint)
    with pytest.raises(CheckpointError, match="encoder.safetensors holds no weights"):
        load_encoder(run.directory)


def test_a_reader_that_dies_meanwhile_fails_no_checkpoint(finished, tmp_path):
    """Fault 43: torch's handler raises wherever the main thread is."""

    class Reached(Exception):
        pass

    class Stub:
        def encoder_state(self):
            os.kill(os.getpid(), signal.SIGCHLD)
            raise Reached

    def alarm(number, frame):
        raise RuntimeError("DataLoader worker is killed")

    before = signal.signal(signal.SIGCHLD, alarm)
    try:
        with pytest.raises(Reached):
            Checkpoints(tmp_path, finished.checkpoint).save(Stub(), 1, {}, best=False)
        assert signal.getsignal(signal.SIGCHLD) is alarm
    finally:
        signal.signal(signal.SIGCHLD, before)


# fault 34
def test_a_directory_in_the_place_of_a_file_is_refused_at_once(run):
    best = run.directory / "checkpoints/best"
    best.unlink(missing_ok=True)
    best.mkdir()
    with pytest.raises(ConfigError, match="checkpoints/best is a directory"):
        pretrain(run)
