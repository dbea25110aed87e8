"""kill -9 in mid-run, through the command line: resume=auto ends with the identical numbers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastssl.config import dump, load
from fastssl.report import read_metrics
from fastssl.run.train import pretrain
from tests.data.photos import folder
from tests.runs import losses, tiny

ROOT = Path(__file__).parents[2]


def command(cfg, tmp_path, *more, dies_at=None):
    recipe = tmp_path / f"{cfg.name}.yaml"
    recipe.write_text(dump(cfg))
    program = ["fastssl"] if dies_at is None else ["tests.train.killed_run", str(dies_at)]
    return [sys.executable, "-m", *program, "pretrain", str(recipe), *more]


def test_a_whole_group_told_to_stop_saves_its_state(tmp_path):
    """As a cluster does it: SIGTERM reaches the loader's workers as well."""
    cfg = tiny("mae", tmp_path, name="told", epochs=400, data__workers=2)
    with open(tmp_path / "out", "w") as out:
        words = command(cfg, tmp_path)
        run = subprocess.Popen(words, stdout=out, stderr=out, start_new_session=True)
        while not (cfg.directory / "metrics.jsonl").is_file() or len(losses(cfg)) < 3:
            assert run.poll() is None, (tmp_path / "out").read_text()
            time.sleep(0.05)
        os.killpg(run.pid, signal.SIGTERM)
        assert run.wait(timeout=300) == 5, (tmp_path / "out").read_text()
    said = (tmp_path / "out").read_text()
    assert "resume=auto continues" in said and "Traceback" not in said
    assert list(cfg.directory.glob("checkpoints/step-*/manifest.json"))


@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_killed_and_resumed_equals_undisturbed(backend, tmp_path):
    data = {}
    if backend == "dali":
        photos = {"name": "folder", "path": str(folder(tmp_path / "photos", 100))}
        data = {"data__source": photos, "batch_size": 16, "data__backend": "auto"}
    changes = {"epochs": 3, "checkpoint__every_steps": 3, **data}
    whole = tiny("simclr", tmp_path, name="whole", **changes)
    killed = whole.model_copy(update={"name": "killed"})
    pretrain(whole)  # undisturbed, in this process
    done = subprocess.run(
        command(killed, tmp_path, dies_at=8), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(losses(killed)) == 8
    pretrain(killed.model_copy(update={"resume": "auto"}))
    assert losses(killed) == losses(whole) and len(losses(whole)) == 15
    rows = [json.loads((c.directory / "results.json").read_text())["rows"] for c in (whole, killed)]
    assert rows[0] == rows[1]
    assert load(killed.directory).data.backend == backend
    logged = read_metrics(killed.directory / "metrics.jsonl")
    assert "resumed" in [row["what"] for row in logged if row["kind"] == "event"]
