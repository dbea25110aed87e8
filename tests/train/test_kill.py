"""kill -9 in mid-run, through the command line: resume=auto ends with the identical numbers."""

import json
import os
import signal
import time

import pytest

from fastssl.config import dump, load
from fastssl.report import read_metrics
from fastssl.run.train import pretrain
from tests import ranks
from tests.data.photos import folder
from tests.runs import losses, tiny
from tests.train import killed_run


def start(cfg, tmp_path, dies_at=None):
    """`fastssl pretrain` of this configuration, begun; and the file of what it says."""
    recipe, log = tmp_path / f"{cfg.name}.yaml", tmp_path / "out"
    recipe.write_text(dump(cfg))
    words = ["pretrain", str(recipe)]
    return ranks.start(killed_run.run, words, log, dies_at, daemon=False), log


def test_a_whole_group_told_to_stop_saves_its_state(tmp_path):
    """As a cluster does it: SIGTERM reaches the loader's workers as well."""
    cfg = tiny("mae", tmp_path, name="told", epochs=400, data__workers=2, evaluate__max_images=8)
    run, log = start(cfg, tmp_path)
    while not (cfg.directory / "metrics.jsonl").is_file() or len(losses(cfg)) < 3:
        assert run.is_alive(), log.read_text()
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGTERM)
    run.join(300)
    run.kill()
    said = log.read_text()
    assert run.exitcode == 5, said
    assert "resume=auto continues" in said and "Traceback" not in said
    assert list(cfg.directory.glob("checkpoints/step-*/manifest.json"))


@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_killed_and_resumed_equals_undisturbed(backend, tmp_path):
    data = {"checkpoint__asynchronous": True}  # that of step 6 is half written
    if backend == "dali":
        photos = {"name": "folder", "path": str(folder(tmp_path / "photos", 100))}
        data = {"data__source": photos, "batch_size": 16, "data__backend": "auto"}
    changes = {"epochs": 3, "checkpoint__every_steps": 3, **data}
    whole = tiny("simclr", tmp_path, name="whole", **changes)
    killed = whole.model_copy(update={"name": "killed"})
    pretrain(whole)  # undisturbed, in this process
    run, log = start(killed, tmp_path, dies_at=8)
    run.join(300)
    run.kill()
    assert run.exitcode == -signal.SIGKILL, log.read_text()
    assert len(losses(killed)) == 8
    there = {path.name for path in (killed.directory / "checkpoints").iterdir()}
    last = {name for name in there if "step-00000006" in name}
    assert last == {"torch": {".step-00000006.partial"}, "dali": {"step-00000006"}}[backend]
    pretrain(killed.model_copy(update={"resume": "auto"}))
    assert losses(killed) == losses(whole) and len(losses(whole)) == 15
    rows = [json.loads((c.directory / "results.json").read_text())["rows"] for c in (whole, killed)]
    assert rows[0] == rows[1]
    assert load(killed.directory).data.backend == backend
    logged = read_metrics(killed.directory / "metrics.jsonl")
    assert "resumed" in [row["what"] for row in logged if row["kind"] == "event"]
