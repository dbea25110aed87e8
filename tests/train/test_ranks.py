"""Two gloo processes under every ZeRO stage train as one process on the joined batch does."""

import os
from pathlib import Path

import pytest
import torch

from fastssl.distributed import barrier
from fastssl.train import pretrain
from tests.ranks import run_ranks
from tests.runs import losses, tiny

STAGES = (0, 1, 2, 3)


def configuration(method: str, stage: int, output: Path, world: int):
    return tiny(
        method,
        output,
        name=f"{method}-zero{stage}-{world}",
        epochs=2,
        batch_size=128,
        engine__zero_stage=stage,
        # Else parameters this small are never cut, and stage 3 is stage 2 by another name.
        engine__deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}},
        evaluate__max_images=64,
    )


def train_all(rank: int, world: int, folder: str):
    """Both methods at every stage; returns (cut, results) so that the test sees stage 3 cut."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    done = {}
    for method in ("simclr", "mae"):
        for stage in STAGES if world > 1 else (0,):
            results = pretrain(configuration(method, stage, Path(folder), world))
            done[f"{method}-{stage}"] = [row["knn"] for row in results["rows"]]
    if world > 1:
        for stage in (1, 2, 3):
            done[f"resumed-{stage}"] = resumed(rank, stage, folder)
    return done


def resumed(rank: int, stage: int, folder: str):
    """Spoil the newest checkpoint of a finished run, and train its last epoch again."""
    cfg = configuration("mae", stage, Path(folder), 2)
    before = losses(cfg)
    barrier()
    if rank == 0:
        newest = cfg.directory / "checkpoints/step-00000022"
        (newest / "encoder.safetensors").write_bytes(b"")
    barrier()
    pretrain(cfg.model_copy(update={"resume": "auto"}))
    return before, losses(cfg)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return folder, {w: run_ranks(train_all, w, str(folder), timeout=300) for w in (1, 2)}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("method", ["simclr", "mae"])
def test_loss_curve_of_two_ranks_is_that_of_one(trained, method, stage):
    folder, done = trained
    one = losses(configuration(method, 0, folder, 1))
    two = losses(configuration(method, stage, folder, 2))
    assert len(one) == 22
    torch.testing.assert_close(two, one, atol=1e-4, rtol=1e-4)
    assert done[2][0] == done[2][1]  # every rank returns the same results
    torch.testing.assert_close(
        torch.tensor(done[2][0][f"{method}-{stage}"]),
        torch.tensor(done[1][0][f"{method}-0"]),
        atol=0.01,  # of 64 held-out images one may fall to the other side
        rtol=0.0,
    )


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_two_ranks_resume_to_the_last_bit(trained, stage):
    before, after = trained[1][2][0][f"resumed-{stage}"]
    assert len(after) == 22 and after == before
