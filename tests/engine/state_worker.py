"""What ranks share and what a step leaves behind, for test_engine: run on one rank and on two."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastssl import distributed
from fastssl.engine.checkpoint import Checkpoints
from fastssl.engine.config import CheckpointConfig, EngineConfig
from fastssl.engine.engine import Engine
from fastssl.engine.optim import OptimConfig
from fastssl.engine.verbs import Limits
from fastssl.methods import build_method
from fastssl.models import build_backbone, freeze
from tests.runs import VIT, saved_state, tiny, weights_of, whole

# (encoder, stage, precision, synchronized); the second encoder has timm's BatchNormAct2d
NORMED = [
    ("test_resnet", 0, "fp32", True),
    ("test_efficientnet", 1, "fp32", True),
    ("test_resnet", 3, "fp32", True),
    ("test_resnet", 2, "bf16", True),
    ("test_resnet", 1, "fp32", False),
]
CUT = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
# (method, stage, options of the engine); the loss of matryoshka has no parameters
LARGE = [
    ("mocov3", 0, {}),
    ("nnclr", 1, {"deepspeed": {"zero_optimization": {"overlap_comm": True}}}),
    ("matryoshka", 2, {"reduce_once": False}),
    ("sit", 2, {}),
    ("isogclr", 3, {"reduce_once": False}),
    ("mixed_barlow_twins", 3, {}),
]
# (stage, precision, engine.zero): each beside stage 0, of bfloat16 beside stage 2
TUNED: list[tuple[int, str, dict[str, Any]]] = [
    (1, "fp32", {"overlap_comm": True, "reduce_bucket": 3000}),
    (2, "fp32", {"overlap_comm": True, "reduce_bucket": 3000, "allgather_bucket": 1000}),
    (2, "fp32", {"offload_optimizer": "cpu"}),
    (3, "fp32", {"leaf_blocks": False, "overlap_comm": True, "max_live_parameters": 1000}),
    (1, "bf16", {"accumulation_dtype": "fp32"}),
    (3, "bf16", {"persistence_threshold": 0, "bf16_masters": True, "sub_group": 900}),
    (3, "fp32", {"persistence_threshold": 0, "prefetch_bucket": 5000, "partition_size": 2}),
]
TWO = {"accumulation": 2, "micro_batchnorm": True}


def engine(
    name: str, encoder: str, batch: int, freezing: bool = False, optim: Any = None, **options: Any
) -> Engine:
    """Method `name` over a small encoder; by plain SGD, weights differ by what gradients do."""
    torch.manual_seed(0)
    kwargs = VIT if encoder.startswith("vit") else {}
    side = 16 if kwargs else 32
    backbone = build_backbone(encoder, shape=(1, side, side), kwargs=kwargs)
    if freezing:
        freeze(backbone)
    method = build_method(backbone, tiny(name, ".").method)  # type: ignore[arg-type]
    for key, parameter in method.named_parameters():
        if key.endswith("bias") and parameter.requires_grad:  # else adding it would never round
            torch.nn.init.normal_(parameter, std=0.5)
    return Engine(
        method,
        OptimConfig(lr=1e-2, weight_decay=0.0, **optim or {"name": "momentum", "momentum": 0.0}),
        EngineConfig(**options),
        device=torch.device("cpu"),
        batch_size=batch,
    )


def batch(
    rank: int, world: int, views: int, side: int, step: int = 0, rows: int = 8
) -> dict[str, Any]:
    g = torch.Generator().manual_seed(step)
    each = [torch.randn(rows, 1, side, side, generator=g) for _ in range(views)]
    images = [view.chunk(world)[rank] for view in each]
    index = torch.arange(rows).chunk(world)[rank]
    return {"views": images, "index": index, "seeds": index + 3}


def norms(rank: int, world: int) -> dict[str, Any]:
    """For each of NORMED: the first loss, features of four images after two steps, the notes."""
    found = {}
    for kind in NORMED:
        encoder, stage, precision, sync = kind
        e = engine(
            "simclr",
            encoder,
            8,
            **{"zero_stage": stage, "precision": precision, "sync_batchnorm": sync},
            deepspeed=CUT,
        )
        loss, *_ = (
            e.step(batch(rank, world, 2, 32, step), 1e-2).metrics["loss"] for step in range(2)
        )
        seen = e.features(batch(0, 2, 1, 32, 9)["views"][0])
        found[str(kind)] = [loss, seen, [note for note in e.notes if "optimizer" not in note]]
    return found


def halves(rank: int, world: int) -> list[float]:
    """The first loss in bfloat16 at stages 1 and 3."""
    options = {"precision": "bf16", "deepspeed": CUT}
    engines = (engine("mae", "vit_tiny_patch16_224", 8, zero_stage=s, **options) for s in (1, 3))
    return [e.step(batch(rank, world, 1, 16), 1e-3).metrics["loss"].item() for e in engines]


def skipped(rank: int, world: int) -> list[str]:
    """What a step with one NaN on rank 0, and one above its limit, have changed: parameters, norms,
    queues and teachers."""
    changed = []
    for name in ("nnclr", "mocov3"):
        e = engine(name, "test_resnet", 8, zero_stage=1, on_nonfinite="skip", **TWO)
        e.step(batch(rank, world, 2, 32), 1e-2, progress=0.5)
        before = {n: x.clone() for n, x in _everything(e)}
        bad = batch(rank, world, 2, 32, 1)
        if rank == 0:
            bad["views"][0][0, 0, 0, 0] = float("nan")
        assert not e.step(bad, 1e-2, progress=1.0).applied
        fine = batch(rank, world, 2, 32, 2)
        spike = e.step(fine, 1e-2, progress=1.0, limits=Limits(-torch.inf, torch.inf))
        assert spike.spike and not spike.applied and spike.loss is not None
        changed += [f"{name} {n}" for n, x in _everything(e) if not torch.equal(x, before[n])]
        mean = spike.loss * (1 + 1e-5)  # one rank's own loss is above it
        if not e.step(fine, 1e-2, progress=1.0, limits=Limits(mean, torch.inf)).applied:
            changed.append(f"{name} is judged by one rank's loss")
        if sum("running_var" in n for n in before) < 10:
            changed.append(f"{name} has too few norms")
    return changed


def teachers(rank: int, world: int) -> list[dict[str, Tensor]]:
    """The teacher's encoder before and after a step at stage 3, and the student's after it."""
    e = engine("mocov3", "vit_tiny_patch16_224", 8, zero_stage=3, deepspeed=CUT)
    before = weights_of(e, "teacher")
    assert e.step(batch(rank, world, 2, 16), 1e-1, progress=0.1).applied
    return [before, *(weights_of(e, name) for name in ("teacher", ""))]


def frozen(rank: int, world: int, folder: str) -> dict[str, list[Any]]:
    """Of a frozen encoder, at stages 2 and 3: what moved, the files and losses of a checkpoint."""
    found: dict[str, list[Any]] = {}
    for stage, precision, options in ((2, "fp32", CUT), (3, "bf16", CUT), (3, "fp32", {})):
        how = {"zero_stage": stage, "precision": precision, "deepspeed": options}
        begun = partial(engine, "mocov3", "test_resnet", 8, freezing=True, **how)
        first, run = begun(), Path(folder) / f"{stage}-{precision}"
        if rank == 0:
            run.mkdir()
        before = weights_of(first)
        _steps(first, rank, world, 0)
        moved = [k for k, v in weights_of(first, "teacher").items() if not v.equal(before[k])]
        checkpoints = Checkpoints(run, CheckpointConfig())  # type: ignore[call-arg]
        path = checkpoints.save(first, 2, {}, best=False)
        saved = [key for key in saved_state(path) if "student.0." in key or "model.0." in key]
        second = begun()
        assert checkpoints.load(second, [], dict) is not None
        after = [_steps(e, rank, world, 2) for e in (first, second)]
        names = [file.name for file in path.glob("encoder*.safetensors")]
        found[f"{stage}-{precision}-{len(options)}"] = [moved, names, saved, *after]
    return found


def _steps(e: Engine, rank: int, world: int, start: int) -> list[float]:
    return [
        e.step(batch(rank, world, 2, 32, s), 1e-1, progress=s / 8).metrics["loss"].item()
        for s in range(start, start + 2)
    ]


def _everything(e: Engine) -> list[tuple[str, Tensor]]:
    return [*e.method.named_buffers(), *e.method.named_parameters()]


def moved_once(rank: int, world: int) -> list[int]:
    """After one step of 8 samples in 4 micro-batches: keys in the queue, calls of on_step."""
    e = engine("nnclr", "vit_tiny_patch16_224", 8, accumulation=4 // world)
    calls: list[float] = []
    on_step = e.method.on_step
    e.method.on_step = lambda keep, progress: (calls.append(progress), on_step(keep, progress))
    assert e.step(batch(rank, world, 2, 16), 1e-2, progress=0.25).applied
    assert set(calls) == {0.25}
    return [int(e.method.criterion.queue.next), len(calls)]


def resumed(rank: int, world: int, folder: str, name: str) -> tuple[list[float], list[float]]:
    """Losses of steps 2 and 3 under ZeRO-3 with parameters kept whole, and as resumed at 2."""

    def steps(e: Engine, start: int, end: int) -> list[float]:
        losses = []
        for step in range(start, end):
            done = e.step(batch(rank, world, 1, 16, step), 1e-1, progress=step / 8)
            losses.append(done.metrics["loss"].item())
        return losses

    first = engine(name, "vit_tiny_patch16_224", 8, zero_stage=3)
    first.features(torch.zeros(2, 1, 16, 16))  # a run is evaluated before its first step
    steps(first, 0, 2)
    if rank == 0:
        (Path(folder) / name).mkdir(parents=True)
    distributed.barrier()
    first.snapshot(copied=False)(Path(folder) / name)
    second = engine(name, "vit_tiny_patch16_224", 8, zero_stage=3)
    second.load(Path(folder) / name)
    return steps(first, 2, 4), steps(second, 2, 4)


def tuned(rank: int, world: int) -> list[float]:
    """For each of TUNED how far its step is from that of a stage that is not tuned.

    The encoder is called twice in a micro-batch, its blocks are recomputed, and there are two
    micro-batches.
    """
    losses = []
    # A second copy of the teacher follows it.  First: a process makes such copies for one engine.
    for zero in ({}, {"partition_size": 2}):
        options = {"zero_stage": 3, "zero": {"persistence_threshold": 0, **zero}}
        e = engine("mocov3", "vit_tiny_patch16_224", 8, **options)
        e.method.cfg = e.method.cfg.model_copy(update={"momentum": 0.5})
        steps = (e.step(batch(rank, world, 2, 16, s), 1.0) for s in range(3))
        losses.append([step.metrics["loss"].item() for step in steps][-1])
    found, wanted = [], {}
    for stage, precision, zero in [(0, "fp32", {}), (2, "bf16", {}), *TUNED]:
        options = {"zero_stage": stage, "precision": precision, "zero": zero}
        options |= {"accumulation": 2, "large_batch": "plain", "activation_checkpointing": True}
        e = engine("simclr", "vit_tiny_patch16_224", 16, **options)
        before = torch.cat([p.flatten() for p in weights_of(e).values()])
        e.step(batch(rank, world, 2, 16, rows=16), 16.0)
        move = torch.cat([p.flatten() for p in weights_of(e).values()]) - before
        right = wanted.setdefault(precision, move)
        found.append(float((move - right).norm() / right.norm()))
    return [*found[2:], abs(losses[1] / losses[0] - 1)]


def at_once(rank: int, world: int) -> list[tuple[float, float]]:
    """For each of LARGE how far an exact step of 4 micro-batches is from a step in one: the loss
    and the buffers, and the parameters' change."""
    found = []
    for name, stage, options in LARGE:
        states, moves = [], []
        for parts in ({}, {"accumulation": 4, **options}):
            parts = {"zero_stage": stage, "deepspeed": CUT, **parts}
            e = engine(name, "vit_tiny_patch16_224", 16, **parts)
            before = [whole(e, p).clone() for p in e.method.parameters() if p.requires_grad]
            step = e.step(batch(rank, world, 2, 16, rows=16), 16.0, progress=0.1)
            after = [whole(e, p) for p in e.method.parameters() if p.requires_grad]
            moves.append(torch.cat([(b - a).flatten() for a, b in zip(before, after, strict=True)]))
            state = [step.metrics["loss"], *e.method.buffers()]
            states.append(torch.cat([value.float().flatten().nan_to_num() for value in state]))
        apart = [float((b - a).norm() / a.norm()) for a, b in (states, moves)]
        found.append((apart[0], apart[1]))
    return found
