"""What each rank of test_layerwise runs: a tiny model under DeepSpeed, its masters at the end.

Two ranks with different data train `STEPS` steps; a run is (optimizer, ZeRO stage, variant).
"resumed" runs go on from a checkpoint at step `HALF`; "pieces" ones have a fault: they take
the norms of the pieces on a rank for those of whole parameters.
"""

import itertools
import os
from typing import Any

import torch
from torch import Tensor, nn

from fastssl import pieces
from fastssl.engine import launch
from fastssl.engine.fragments import Fragments, ZeroPieces
from fastssl.engine.layerwise import LAMB, LARS
from fastssl.engine.optim import OptimConfig, after_initialize, build_optimizer
from fastssl.engine.states import States
from tests.engine.clip_worker import folder_of

WORLD, BATCH, STEPS, HALF = 2, 3, 5, 3
CONFIGS = {
    "lars": OptimConfig(name="lars", lr=2.0, weight_decay=0.05, trust_coefficient=0.08),
    "lamb": OptimConfig(name="lamb", lr=0.05, weight_decay=0.05),
    "adamw": OptimConfig(name="adamw", lr=0.05, weight_decay=0.5),
}
RUNS = [  # any two of optimizer, stage and precision meet
    *itertools.product(("lars",), (1, 3), ("fp32",)),
    *itertools.product(("lamb",), (0, 2), ("fp32",)),
    *itertools.product(("lars",), (0, 2), ("bf16",)),
    *itertools.product(("lamb",), (1, 3), ("bf16",)),
    ("lamb", 1, "bf16, fp32 gradients"),
    ("lars", 2, "fp32, one group"),
    ("lamb", 3, "fp32, one group"),
    ("adamw", 0, "bf16"),
]
FAULTY = [("lars", 1, "fp32"), ("lamb", 3, "fp32")]


class Model(nn.Module):
    """Tensors of odd sizes; one of a single element, which only one rank of stage 3 holds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(7, 13)
        self.norm = nn.LayerNorm(13)
        self.last = nn.Linear(13, 3)
        self.scale = nn.Parameter(torch.full((1, 1), 1.5))
        self.frozen = nn.Parameter(torch.ones(13), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).tanh() * self.frozen) * self.scale


def data(rank: int, step: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(BATCH, 7, generator=generator).to(dtype)


def loss_of(output: Tensor) -> Tensor:
    return (output.float() - torch.tensor([1.0, 0.0, -2.0])).square().mean()


def rate(cfg: OptimConfig, step: int) -> float:
    return cfg.lr / (1 + step)


def dtype_of(variant: str) -> torch.dtype:
    return torch.bfloat16 if variant.startswith("bf16") else torch.float32


def optimizer_of(model: nn.Module, name: str, variant: str) -> torch.optim.Optimizer:
    """With "one group" parameters of one dimension lie among those that adapt."""
    cfg = CONFIGS[name]
    if not variant.endswith("one group"):
        return build_optimizer(model, cfg)
    kind = {"lars": LARS, "lamb": LAMB}[name]
    return kind(model.parameters(), cfg.lr, weight_decay=cfg.weight_decay, **cfg.options())


def worker(rank: int, world: int, folder: str) -> dict[Any, dict[str, Tensor]]:
    """{run, (*run, "resumed") or (*run, "pieces"): masters at the end}"""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    results: dict[Any, dict[str, Tensor]] = {}
    with launch.session("cpu"):
        for run in RUNS:
            whole = _Run(*run)
            whole.steps(0, HALF)
            whole.states.snapshot(copied=False)(folder_of(folder, run))
            whole.steps(HALF, STEPS)
            results[run] = whole.masters()
            second = _Run(*run)
            second.states.read(folder_of(folder, run))
            second.steps(HALF, STEPS)
            results[(*run, "resumed")] = second.masters()
        Fragments.whole_norms = lambda self, norms: norms
        for run in FAULTY:
            whole = _Run(*run)
            whole.steps(0, STEPS)
            results[(*run, "pieces")] = whole.masters()
    return results


class _Run:
    def __init__(self, name: str, stage: int, variant: str):
        self.cfg, self.stage = CONFIGS[name], stage
        self.dtype = dtype_of(variant)
        model = Model()
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": BATCH,
            "gradient_clipping": self.cfg.clip,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
            "bf16": {"enabled": self.dtype == torch.bfloat16},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        }
        if variant == "bf16, fp32 gradients":  # yet another wrapper inside DeepSpeed
            config["data_types"] = {"grad_accum_dtype": "fp32"}
        self.engine, *_ = launch.deepspeed().initialize(
            model=model,
            optimizer=optimizer_of(model, name, variant),
            config=config,
            dist_init_required=False,
        )
        after_initialize(self.engine)
        pieces.cut_by(ZeroPieces())
        self.states = States(self.engine)

    def steps(self, start: int, end: int) -> None:
        for step in range(start, end):
            for group in self.engine.optimizer.param_groups:
                group["lr"] = rate(self.cfg, step)
            x = data(torch.distributed.get_rank(), step, self.dtype)
            self.engine.backward(loss_of(self.engine(x)))
            self.engine.step()

    def masters(self) -> dict[str, Tensor]:
        """The float32 parameters, whole, in a fresh dict by name; collective."""
        from deepspeed.utils import safe_get_full_fp32_param

        named = {n: p for n, p in self.engine.module.named_parameters() if p.requires_grad}
        if self.stage > 0:
            return {n: safe_get_full_fp32_param(p).clone() for n, p in named.items()}
        zero, copies = self.engine.optimizer, {}
        if self.dtype == torch.bfloat16:
            for models, masters in zip(zero.fp16_groups, zero.fp32_groups, strict=True):
                copies.update({id(p): m for p, m in zip(models, masters, strict=True)})
        return {n: copies.get(id(p), p).detach().clone() for n, p in named.items()}
