"""Two gloo processes under every ZeRO stage train as one process on the joined batch does."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from fastssl.config import RunConfig
from fastssl.distributed import barrier
from fastssl.report import read_metrics
from fastssl.run.train import pretrain
from tests.ranks import run_ranks
from tests.runs import losses, tiny, without_pictures
from tests.train.test_train import poison, spike

WHOLE = "3, uncut"  # parameters this small are whole on every rank, beside their pieces
RUNS: dict[
    str, tuple[int | str, ...]
] = {  # of each kind of method; every stage with MAE: test_engine
    "simclr": (0,),
    "barlow_twins": (1,),
    "mae": (2,),
    "mocov3": (WHOLE,),
    "nnclr": (1,),
    "swav": (3,),
    "msn": (2,),
    "sie": (3,),
}
ALL = [(method, stage) for method, stages in RUNS.items() for stage in stages]
RESUMED = [("mae", 2), ("mocov3", WHOLE), ("nnclr", 1)]
MOVED = [("mae", 0, 3), ("mocov3", 0, 2), ("sie", 0, 1)]  # begun by one process: stage, and then


def configuration(method: str, stage: int | str, output: Path, world: int):
    # Else parameters this small are never cut, and stage 3 is stage 2 by another name.
    cut = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    return tiny(
        method,
        output,
        name=f"{method}-zero{stage}-{world}",
        engine__zero_stage=3 if stage == WHOLE else stage,
        engine__deepspeed={} if stage == WHOLE else cut,
        batch_size=28,  # of 130 samples: a short batch of 18, which the ranks share
        data__last="pad",
        checkpoint__asynchronous=method in ("mocov3", "nnclr"),
        **({"method__queue_size": 64} if method == "nnclr" else {}),  # begun anew at step 4
    )


def train_all(rank: int, world: int, folder: str):
    """Accuracies of every run of RUNS, or on one rank of each method's at stage 0, by its name."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    without_pictures()
    done = {}
    for method, stage in ALL if world > 1 else [(method, 0) for method in RUNS]:
        results = pretrain(configuration(method, stage, Path(folder), world))
        done[f"{method}-{stage}"] = [row["knn"] for row in results["rows"]]
    if world > 1:
        for method, stage in RESUMED:
            done[f"resumed-{method}-{stage}"] = resumed(rank, method, stage, folder)
        done["back"] = gone_back(rank, Path(folder))
        for method, before, after in MOVED:
            cfg = moved(rank, configuration(method, before, Path(folder), 1), folder)
            engine = cfg.engine.model_copy(update={"zero_stage": after})
            pretrain(cfg.model_copy(update={"engine": engine, "resume": "auto"}))
    return done


def resumed(rank: int, method: str, stage: int | str, folder: str):
    """Spoil the newest checkpoint of a finished run, and train its last epoch again.

    A queue is saved by the first rank alone: the second one's must have been the same.
    """
    cfg = configuration(method, stage, Path(folder), 2)
    before = losses(cfg)
    barrier()
    if rank == 0:
        newest = cfg.directory / "checkpoints/step-00000010"
        (newest / "encoder.safetensors").write_bytes(b"")
    barrier()
    pretrain(cfg.model_copy(update={"resume": "auto"}))
    return before, losses(cfg)


def gone_back(rank: int, folder: Path):
    """Losses of a run that goes back from a spike of the second rank's, and of one whose steps 5 to
    7 are skipped."""
    back = {"spike": 20.0, "spike_window": 4, "spike_back": 2}
    found = []
    for name, keys in {"back": back, "skipped": {"on_nonfinite": "skip"}}.items():
        cfg = configuration("mae", 3, folder, 2)
        engine = cfg.engine.model_copy(update=keys)
        with pytest.MonkeyPatch.context() as patch:
            if name == "skipped":
                poison(patch, 5, 6, 7)
            elif rank == 1:
                spike(patch, 7, 100.0)
            pretrain(cfg.model_copy(update={"name": name, "engine": engine}))
        rows = read_metrics(folder / name / "metrics.jsonl")
        found.append([row["loss"] for row in rows if row["kind"] == "train"])
    return found


def moved(rank: int, cfg: RunConfig, folder: str) -> RunConfig:
    """A copy of a finished run, without its last epoch's checkpoint."""
    there = Path(folder) / "moved"
    if rank == 0:
        shutil.copytree(cfg.directory, there / cfg.name)
        shutil.rmtree(there / cfg.name / "checkpoints/step-00000010")
    barrier()
    return cfg.model_copy(update={"output": there})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return folder, {w: run_ranks(train_all, w, str(folder), timeout=900) for w in (1, 2)}


@pytest.mark.parametrize("method, stage", ALL)
def test_loss_curve_of_two_ranks_is_that_of_one(trained, method, stage):
    folder, done = trained
    one = losses(configuration(method, 0, folder, 1))
    two = losses(configuration(method, stage, folder, 2))
    assert len(one) == 10
    torch.testing.assert_close(two, one, atol=1e-4, rtol=1e-4)
    assert done[2][0] == done[2][1]  # every rank returns the same results
    torch.testing.assert_close(
        torch.tensor(done[2][0][f"{method}-{stage}"]),
        torch.tensor(done[1][0][f"{method}-0"]),
        atol=0.11,  # of 10 held-out images one may fall to the other side
        rtol=0.0,
    )


@pytest.mark.parametrize("method, stage", RESUMED)
def test_two_ranks_resume_to_the_last_bit(trained, method, stage):
    before, after = trained[1][2][0][f"resumed-{method}-{stage}"]
    assert len(after) == 10 and after == before


def test_two_ranks_go_back_together(trained):
    back, skipped = trained[1][2][0]["back"]
    assert len(back) == 7 and back == skipped[:4] + skipped[7:]


@pytest.mark.parametrize("method, before, _", MOVED)
def test_two_ranks_go_on_where_one_was_at_another_stage(trained, method, before, _):
    cfg = configuration(method, before, trained[0], 1)
    again = cfg.model_copy(update={"output": trained[0] / "moved"})
    torch.testing.assert_close(losses(again), losses(cfg), rtol=1e-6, atol=1e-6)
    rows = read_metrics(again.directory / "metrics.jsonl")
    (said,) = [row["detail"] for row in rows if row.get("what") == "resumed"]
    assert said.startswith("resumed at step 5, written by 1 processes and taken up by 2, whose")
