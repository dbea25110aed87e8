"""What a run will need before it starts: memory on each device, time, traffic between ranks.

Nothing of it is run, and no memory is taken for the model: `counting` reckons on fake tensors, so
that billions of parameters for a cluster are planned on a laptop.  What a device does at most is in
`hardware`; `memory` and `speed` say what follows.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from fastssl.config import ConfigError, RunConfig
from fastssl.data.datasets import open_source
from fastssl.data.loader import PretrainLoader
from fastssl.engine.blocks import recompute
from fastssl.engine.launch import deepspeed
from fastssl.engine.optim import check_optimizer
from fastssl.models import synchronize_batch_norms, widen_batch_norms
from fastssl.run.build import build, check_steps, fitted

from . import replay
from .counting import LARGE, Channels, Counts, count
from .hardware import using
from .measured import resident
from .memory import MOMENTS, Memory, Rule, Sizes, Zero, memory
from .speed import Cluster, Speed, Traffic, by_rates, speed, traffic

NOT_COUNTED = "evaluation, loader processes, and whether the data come as fast as they are trained"
OFFLOAD = "engine.zero.offload_optimizer=cpu"


@dataclass(frozen=True)
class Plan:
    """images: of the training data.  total_steps: of all epochs."""

    cfg: RunConfig
    cluster: Cluster
    sizes: Sizes
    counts: Counts
    rule: Rule
    zero: Zero
    memory: Memory
    speed: Speed | None
    traffic: Traffic
    images: int
    total_steps: int

    @property
    def capacity(self) -> float:
        """Bytes that a rank may take."""
        device = self.cluster.device
        return device.memory / (self.cluster.per_node if device.on_cpu else 1)

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.capacity

    @property
    def images_per_s(self) -> float:
        """Over all ranks."""
        return self.cfg.batch_size / self._speed.step

    @property
    def mfu(self) -> float:
        """Of the matrix rate that the device's maker states, what the model's own work takes."""
        rate = self.cluster.device.rate(self.cfg.engine.precision)
        return self._speed.useful / self._speed.step / rate

    @property
    def flops_per_image(self) -> float:
        return self._speed.useful * self.cluster.world / self.cfg.batch_size

    @property
    def seconds(self) -> float:
        """Of all epochs."""
        return self.total_steps * self._speed.step

    @property
    def checkpoint(self) -> int:
        """Bytes of one: float32 weights, states, and the encoders once more."""
        kept = 4 * (self.sizes.parameters - self.sizes.frozen)
        return int(kept + self.rule.states * self.sizes.trained + 4 * self.sizes.networks)

    @property
    def _speed(self) -> Speed:
        assert self.speed is not None, "a device without rates has no speed"
        return self.speed


@dataclass(frozen=True)
class Data:
    """Of the training data: channels, images, those held out, steps of an epoch."""

    channels: Channels
    images: int
    held_out: int
    epoch_steps: int


def data_of(cfg: RunConfig, world: int, images: int | None) -> tuple[RunConfig, Data]:
    """`cfg` with what it leaves to the data, and those; images: there are so many images or clips,
    of 3 channels, and the source is not opened.

    Raises ConfigError and DataError for what a run refuses, and for streams that are not opened.
    """
    if images is None:
        split = open_source(cfg.data.source, cfg.seed, cfg.data.streams)
        cfg = fitted(cfg, split.train)
        given: dict[str, Any] = {"batch_size": cfg.batch_size, "seed": cfg.seed, "world": world}
        loader = PretrainLoader(split.train, cfg.views(), last=cfg.data.last, **given)
        check_steps(cfg, loader)
        found = (split.train.channels, len(split.train), len(split.test), loader.steps_per_epoch)
        return cfg, Data(*found)
    if cfg.data.streams or getattr(cfg.views(), "kind", "image") not in ("image", "clip"):
        raise ConfigError(
            f"--images {images} is for plain images and clips: leave it out for these data"
        )
    if images < cfg.batch_size:
        raise ConfigError(f"--images {images} are fewer than batch_size={cfg.batch_size}")
    try:
        method = cfg.method.fitted(images, None)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    steps = images // cfg.batch_size
    steps += cfg.data.last == "pad" and images % cfg.batch_size > 0
    return cfg.model_copy(update={"method": method}), Data(3, images, 0, steps)


def check_cluster(cfg: RunConfig, cluster: Cluster) -> None:
    """Raise ConfigError where the ranks do not divide: among nodes, or the batch among them."""
    W, nodes, parts = cluster.world, cluster.nodes, cfg.engine.accumulation
    for name, value in (("--gpus", W), ("--nodes", nodes)):
        if value < 1:
            raise ConfigError(f"{name} {value} must be at least 1")
    if W % nodes:
        raise ConfigError(f"--gpus {W} does not divide among --nodes {nodes}")
    if cfg.batch_size % (W * parts):
        shares = f"--gpus {W}" + (f" x engine.accumulation={parts}" if parts > 1 else "")
        raise ConfigError(f"batch_size={cfg.batch_size} does not divide into {shares}")


def make_plan(
    cfg: RunConfig,
    channels: Channels,
    cluster: Cluster,
    *,
    images: int,
    total_steps: int = 0,
    counts: Counts | None = None,
) -> Plan:
    """The plan of `cfg`, for items of `channels` channels.

    total_steps: of all epochs; 0 where that is of no interest.  counts: those of a plan with as
    many images a rank, where they are the same.
    Raises ConfigError for ranks that do not divide, and for what `build` refuses.
    """
    check_cluster(cfg, cluster)
    device, engine = cluster.device, cfg.engine
    if device.on_cpu:
        deepspeed()  # what a run imports is part of its process
    with torch.device("meta"):
        method = build(cfg, channels)
    process = resident() if device.on_cpu else 0
    sizes, zero = Sizes.of(method), Zero.of(cfg, method, cluster.world, cuda=not device.on_cpu)
    half, parts = engine.precision == "bf16", engine.accumulation
    if half:
        widen_batch_norms(method)
        for parameter in method.parameters():  # and no buffer, as DeepSpeed does
            parameter.data = parameter.data.to(torch.bfloat16)
    if cluster.world > 1 and engine.sync_batchnorm:
        synchronize_batch_norms(method)
    recompute(method, engine)
    counts = counts or count(method, cfg, channels, cluster.world, on_gpu=not device.on_cpu)
    with using(device.threads if device.on_cpu else torch.get_num_threads()):
        rule = Rule.of(cfg.optim, on_cpu=device.on_cpu)
        if device.on_cpu and (rate := device.rate(engine.precision)):
            replay.measure(counts.works, lambda call: by_rates(call, device, rate))
    held = {
        "world": cluster.world,
        "half": half,
        "parts": parts,
        "inputs": counts.inputs * (parts if device.on_cpu else 1),
        "process": process,
    }
    speed_of = None
    found = memory(sizes, counts, rule, zero, device, **held)
    flat = ("reduction buckets", "flat copy for the collective", "float32 gradient in the step")
    flat = [max(found.parts.get(name, (0,))) for name in (*flat, "optimizer's temporaries")]
    again = max(0.0, counts.encode_backward.flops - 2 * counts.encode.flops)
    if device.rate(engine.precision):
        speed_of = speed(
            sizes,
            counts,
            rule,
            zero,
            cluster,
            precision=engine.precision,
            parts=parts,
            recompute=again if engine.activation_checkpointing else 0.0,
            fresh=sum(size for size in flat if size > LARGE),
        )
    sent = traffic(sizes, counts, zero, cluster.world, parts, 2 if half else 4)
    return Plan(cfg, cluster, sizes, counts, rule, zero, found, speed_of, sent, images, total_steps)


@dataclass(frozen=True)
class Remedy:
    """A change of keys, the bytes that it saves on a rank, and whether the run fits with it."""

    keys: str
    saves: int
    fits: bool


def remedies(plan: Plan, channels: Channels) -> list[Remedy]:
    """What makes a run smaller, each by itself: those that cost the least time first."""
    found = []
    for keys, cfg in _changes(plan):
        try:
            other = make_plan(cfg, channels, plan.cluster, images=plan.images)
        except ValueError:  # of an encoder without checkpointing, say
            continue
        saves = plan.memory.peak - other.memory.peak
        if saves > 0:
            found.append(Remedy(keys, saves, other.fits))
    return found


def _changes(plan: Plan) -> Iterator[tuple[str, RunConfig]]:
    cfg, W = plan.cfg, plan.cluster.world
    engine = cfg.engine

    def with_engine(**update: Any) -> RunConfig:
        return cfg.model_copy(update={"engine": engine.model_copy(update=update)})

    if engine.precision == "fp32":
        yield "engine.precision=bf16", with_engine(precision="bf16")
    for stage in range(engine.zero_stage + 1, 4 if W > 1 else 0):
        try:
            check_optimizer(cfg.optim.name, stage)
        except ValueError:
            break
        yield f"engine.zero_stage={stage}", with_engine(zero_stage=stage)
    if not engine.activation_checkpointing:
        yield "engine.activation_checkpointing=true", with_engine(activation_checkpointing=True)
    parts = 2 * engine.accumulation
    while cfg.batch_size % (W * parts) == 0 and cfg.batch_size // (W * parts) >= 1:
        yield f"engine.accumulation={parts}", with_engine(accumulation=parts)
        parts *= 4
    if engine.zero_stage and not plan.zero.offloads:
        yield (
            OFFLOAD,
            with_engine(zero=engine.zero.model_copy(update={"offload_optimizer": "cpu"})),
        )


def weak_scaling(plan: Plan, channels: Channels, worlds: list[int]) -> Iterator[Plan]:
    """Plans of as many ranks, each with as many images a step and as many to a node as in `plan`.

    Raises ConfigError where a number of ranks is no multiple of a node's.
    """
    share, per_node = plan.cfg.batch_size // plan.cluster.world, plan.cluster.per_node
    alone = not plan.cfg.method_class.couples_batch and not plan.counts.collectives
    same = plan.counts if alone and plan.cluster.world > 1 else None
    for world in worlds:
        if world > per_node and world % per_node:
            raise ConfigError(f"--scaling: {world} ranks do not divide into nodes of {per_node}")
        cfg = plan.cfg.model_copy(update={"batch_size": share * world})
        cluster = replace(plan.cluster, world=world, nodes=max(1, world // per_node))
        yield make_plan(cfg, channels, cluster, images=plan.images, counts=same)


def as_json(plan: Plan, disk: float) -> dict[str, Any]:
    """What --json writes: bytes, seconds and counts.  disk: bytes a second of a checkpoint."""
    device, cluster = plan.cluster.device, plan.cluster
    made: dict[str, Any] = {
        "gpu": asdict(device),
        "gpus": cluster.world,
        "nodes": cluster.nodes,
        "parameters": plan.sizes.parameters,
        "trained_parameters": plan.sizes.trained,
        "memory": {
            "parts": {
                name: dict(zip(MOMENTS, row, strict=True))
                for name, row in plan.memory.parts.items()
            },
            "peak": plan.memory.peak,
            "moment": plan.memory.moment,
            "capacity": plan.capacity,
            "fits": plan.fits,
        },
        "traffic_bytes": asdict(plan.traffic),
        "images": plan.images,
        "steps": plan.total_steps,
        "checkpoint_bytes": plan.checkpoint,
        "checkpoint_seconds": plan.checkpoint / disk,
    }
    if plan.speed is not None:
        made["flops_per_image"] = plan.flops_per_image
        made["seconds"] = asdict(plan.speed) | {"step": plan.speed.step}
        made["images_per_s"], made["mfu"] = plan.images_per_s, plan.mfu
        made["days"] = plan.seconds / 86400
        made["gpu_hours"] = plan.seconds * cluster.world / 3600
    return made
