"""A launcher that starts a run again goes on with it; any other is refused or replaces it."""

import os
import signal

import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from fastssl.engine import launch
from fastssl.engine.engine import Engine
from fastssl.report import read_metrics
from fastssl.run import restarts
from fastssl.run.restarts import after_restart, sign
from fastssl.run.train import pretrain
from tests.ranks import start
from tests.runs import final, losses, tiny, without_pictures

HERE = {"process": "a 1", "agents": ["a 9", "b 7"], "job": ["", "12"], "restarts": 0}


@pytest.mark.parametrize(
    "now, taken",
    [
        ({"process": "b 2"}, True),  # of one agent at least
        ({}, False),  # the same process once more
        ({"process": "b 2", "agents": ["a 8"]}, False),
        ({"process": "b 2", "agents": [], "restarts": 1}, True),  # the job was queued again
        ({"process": "b 2", "agents": [], "restarts": 1, "job": ["", "13"]}, False),
        ({"process": "b 2", "agents": []}, False),  # as within an interactive job
        ({"process": "b 2", "agents": [], "restarts": 1, "job": ["", ""]}, False),
    ],
)
def test_a_launch_takes_up_what_it_began_and_nothing_else(now, taken, tmp_path, monkeypatch):
    cfg = tiny("mae", tmp_path, overwrite=True)
    cfg.directory.mkdir()
    monkeypatch.setattr(restarts, "launches", lambda: HERE | now)
    assert after_restart(cfg) == cfg
    sign(cfg.directory, {**HERE, "job": ["", ""]} if now.get("job") == ["", ""] else HERE)
    go_on = {"overwrite": False, "resume": "auto"}
    assert after_restart(cfg) == (cfg.model_copy(update=go_on) if taken else cfg)
    extended = cfg.model_copy(update={"resume": "extend"})
    assert after_restart(extended).resume == "extend"


def rank(folder):
    """In the first start an undisturbed run, then one in which the second rank dies at step 7."""
    without_pictures()
    torch.set_num_threads(1)
    first, step = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0", Engine.step
    changes = {"checkpoint__every_steps": 3, "engine__zero_stage": 2}
    with launch.session("cpu"):
        if first:
            pretrain(tiny("mae", folder, name="whole", **changes))

        def dies(self, *args, **options):
            if first and self.ds.global_steps == 7 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, *args, **options)

        Engine.step = dies
        pretrain(tiny("mae", folder, name="killed", overwrite=True, **changes))


def agent(folder):
    """As `torchrun --nproc-per-node=2 --max-restarts=1` does, its workers forked from here."""
    how = {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": 2, "max_restarts": 1}
    where = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": "night"}
    elastic_launch(LaunchConfig(**how, **where, start_method="fork"), rank)(folder)


def test_a_run_that_torchrun_starts_again_ends_as_if_undisturbed(tmp_path):
    launched = start(agent, tmp_path, daemon=False)
    launched.join(400)
    launched.kill()
    assert launched.exitcode == 0
    whole, killed = (tiny("mae", tmp_path, name=name) for name in ("whole", "killed"))
    assert losses(killed) == losses(whole) and len(losses(whole)) == 10
    assert final(killed) == final(whole)
    events = read_metrics(killed.directory / "metrics.jsonl")
    assert [row["step"] for row in events if row.get("what") == "resumed"] == [6]
