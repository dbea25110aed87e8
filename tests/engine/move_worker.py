"""What each rank of test_states runs: states that are taken up elsewhere, and written again there.

1 process -> 2 -> 1, each at another ZeRO stage or precision
"""

import os
from pathlib import Path
from typing import Any

import torch

from fastssl.engine import launch
from fastssl.engine.engine import Engine
from tests.engine import clip_worker, state_worker
from tests.engine.clip_worker import folder_of

PLAIN: dict[str, Any] = {"zero_optimization": {}}
OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
# (optimizer of clip_worker's method, or a method; stage; precision; raw keys)
Kind = tuple[str, int, str, dict[str, Any]]
CHAINS: list[tuple[Kind, Kind, Kind]] = [
    (("adamw", 0, "fp32", {}), ("adamw", 3, "fp32", {}), ("adamw", 1, "fp32", {})),
    (("lars", 0, "bf16", {}), ("lars", 1, "bf16, fp32 gradients", {}), ("lars", 3, "bf16", {})),
    (("lamb", 1, "fp32", {}), ("lamb", 0, "bf16", {}), ("lamb", 2, "fp32", {})),
    (("adamw", 2, "fp32", OFFLOAD), ("adamw", 1, "fp32", PLAIN), ("adamw", 3, "fp32", OFFLOAD)),
    (("mocov3", 1, "fp32", {}), ("mocov3", 3, "bf16", {}), ("mocov3", 2, "bf16", {})),
    (("mocov3", 0, "bf16", {}), ("mocov3", 2, "fp32", {}), ("mocov3", 3, "fp32", PLAIN)),
]


def engine(kind: Kind) -> Engine:
    name, stage, variant, raw = kind
    if name != "mocov3":
        free = {"clip": 0.0, "clip_each": 0.0, "groups": ()} if raw else {}
        return clip_worker.engine(name, stage, variant, 1, raw=raw, **free)
    how: dict[str, Any] = {"zero_stage": stage, "precision": variant}
    how["deepspeed"] = raw or state_worker.CUT  # else parameters this small are kept whole
    return state_worker.engine("mocov3", "test_resnet", 8, optim={"name": "adamw"}, **how)


def steps(e: Engine, kind: Kind, rank: int, world: int) -> None:
    for step in range(2):
        if kind[0] == "mocov3":
            batch = state_worker.batch(rank, world, 2, 32, step)
        else:
            batch = clip_worker.data(rank, step, clip_worker.WORLD * clip_worker.ROWS // world)
        assert e.step(batch, 1e-2, progress=0.1, epoch=0.0).applied


def worker(rank: int, world: int, folder: str, leg: int) -> list[dict[str, Any]]:
    """For each chain: the float32 masters as they were taken up, the weights of the forward pass,
    and the masters after two steps.

    Written are both, to FOLDER/taken-LEG-CHAIN and FOLDER/left-LEG-CHAIN.
    """
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    found = []
    with launch.session("cpu"):
        for number, chain in enumerate(CHAINS):
            kind = chain[leg]
            e = engine(kind)
            if leg:
                e.load(Path(folder) / f"left-{leg - 1}-{number}")
            taken = clip_worker.masters(e)
            e.snapshot(copied=False)(folder_of(folder, ("taken", leg, number)))
            with e.whole_parameters():
                weights = {n: p.detach().clone() for n, p in e.method.named_parameters()}
            steps(e, kind, rank, world)
            e.snapshot(copied=False)(folder_of(folder, ("left", leg, number)))
            found.append({"taken": taken, "left": clip_worker.masters(e), "weights": weights})
            torch.distributed.barrier()
    return found
