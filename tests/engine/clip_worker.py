"""What each rank of test_clipping runs: a tiny method through the engine, its masters at the end.

Two ranks with different data train STEPS steps with every kind of clip, rates and decay by name,
and a weight that is frozen in the first epoch.  "resumed" runs go on from a checkpoint at HALF,
when it is still frozen.
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.engine import launch
from fastssl.engine.config import EngineConfig
from fastssl.engine.engine import Engine
from fastssl.engine.groups import GroupConfig
from fastssl.engine.optim import OptimConfig
from fastssl.methods import Method
from tests.runs import whole

WORLD, ROWS, STEPS, HALF, PER_EPOCH = 2, 4, 6, 2, 3
RULES = (
    {"match": "encoder.*", "clip": 0.02},
    {"match": "body.0.*", "lr_scale": 0.5},
    {"match": "head.weight", "freeze_epochs": 1, "weight_decay": 0.5},
    {"match": "*.bias", "weight_decay": 0.2},
)
CLIPS: dict[str, Any] = {"clip": 0.03, "clip_each": 0.015}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"name": "adamw", "lr": 0.05, "weight_decay": 0.1, "eps": 1e-3},
    "lars": {"name": "lars", "lr": 1.0, "weight_decay": 0.05, "trust_coefficient": 0.05},
    "lamb": {"name": "lamb", "lr": 0.05, "weight_decay": 0.05, "eps": 1e-3},
    "momentum": {"name": "momentum", "lr": 1.0, "weight_decay": 0.05},
}
RUNS = [  # optimizer, stage, precision, micro-batches; any two of the first three meet in part
    ("momentum", 0, "fp32", 2),
    ("lamb", 0, "bf16", 1),
    ("lars", 1, "fp32", 1),
    ("adamw", 1, "bf16, fp32 gradients", 1),
    ("momentum", 2, "fp32", 2),
    ("lars", 2, "bf16", 1),
    ("adamw", 3, "fp32", 2),
    ("momentum", 3, "bf16", 1),
]


class Tiny(Method):
    """Tensors of odd sizes, whose encoder is not under that name."""

    preset, views, couples_batch = "simclr", 1, False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(7, 13), nn.LayerNorm(13), nn.Tanh())
        self.head = nn.Linear(13, 3)
        self.scale = nn.Parameter(torch.full((1, 1), 1.5))
        self.teacher = nn.Linear(2, 2).requires_grad_(False)

    @property
    def encoder(self) -> nn.Module:  # type: ignore[override]
        return self.body

    def loss(self, encoded: Any, batch: Any) -> dict[str, Tensor]:
        wanted = torch.tensor([1.0, 0.0, -2.0])
        return {"loss": ((self.head(encoded[0]) * self.scale).float() - wanted).square().mean()}


def config(name: str, **options: Any) -> OptimConfig:
    rules = tuple(GroupConfig(**rule) for rule in RULES)
    return OptimConfig(**{**OPTIMIZERS[name], "groups": rules, **CLIPS, **options})


def data(rank: int, step: int, rows: int = ROWS) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(100 * rank + step)
    return {"views": [torch.randn(rows, 7, generator=generator)]}


def rate(name: str, step: int) -> float:
    return OPTIMIZERS[name]["lr"] / (1 + step)


def worker(rank: int, world: int, folder: str) -> dict[Any, Any]:
    """{run: (masters, norms of the gradients), (*run, "resumed"): masters, ("frozen alone", stage):
    norms where nothing is clipped}"""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    results: dict[Any, Any] = {}
    with launch.session("cpu"):
        for run in RUNS:
            first = engine(*run)
            norms = train(first, run[0], 0, HALF)
            first.snapshot(copied=False)(folder_of(folder, run))
            norms += train(first, run[0], HALF, STEPS)
            results[run] = masters(first), norms
            second = engine(*run)
            second.load(folder_of(folder, run))
            train(second, run[0], HALF, STEPS)
            results[(*run, "resumed")] = masters(second)
        frozen = (GroupConfig(match="head.*", freeze_epochs=1),)
        for stage in (0, 2):
            alone = engine("adamw", stage, "fp32", 2, groups=frozen, clip=0.0, clip_each=0.0)
            results["frozen alone", stage] = train(alone, "adamw", 0, 1)
    return results


def folder_of(folder: str, run: tuple[Any, ...]) -> Path:
    """Made by the first rank, for all of them."""
    path = Path(folder) / "-".join(map(str, run))
    path.mkdir(exist_ok=True)
    torch.distributed.barrier()
    return path


def engine(
    name: str, stage: int, variant: str, parts: int, raw: Any = None, **options: Any
) -> Engine:
    """raw: keys of DeepSpeed's."""
    cut = {"stage3_param_persistence_threshold": 0, **(raw or {}).get("zero_optimization", {})}
    raw = {"zero_optimization": cut}
    if variant.endswith("fp32 gradients"):  # yet another wrapper inside DeepSpeed
        raw["data_types"] = {"grad_accum_dtype": "fp32"}
    cfg: Any = {"zero_stage": stage, "precision": variant[:4], "accumulation": parts}
    cfg = EngineConfig(**cfg, deepspeed=raw)
    device = torch.device("cpu")
    optim = config(name, **options)
    return Engine(Tiny(), optim, cfg, device=device, batch_size=WORLD * ROWS)


def train(e: Engine, name: str, start: int, end: int) -> list[float]:
    norms = []
    for step in range(start, end):
        batch = data(torch.distributed.get_rank(), step)
        done = e.step(batch, rate(name, step), epoch=step / PER_EPOCH)
        norms.append(float(done.metrics["grad_norm"]))
    return norms


def masters(e: Engine) -> dict[str, Tensor]:
    """The float32 parameters, whole, by name; collective."""
    named = [(n, p) for n, p in e.method.named_parameters() if p.requires_grad]
    return {n: whole(e, p).clone() for n, p in named}
