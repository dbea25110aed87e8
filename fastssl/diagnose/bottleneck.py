"""What holds a run up, its data or its model: each is measured alone, and the other's wait follows.

    images/s of the pipeline    a rank's loader, as the run has it, with nobody training
    images/s of the step        forward, backward and update of one batch that is held on the device
    wait = 1 - data / step      of the time of a step, where the data are the slower ones

Ceilings stand beside: what one process reads, and what it reads and decodes.  A pipeline cannot be
faster than so many of these as it has workers.  On a CPU the two compete for the same cores, and a
run is slower than either alone.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from fastssl import distributed
from fastssl.config import RunConfig
from fastssl.data.batch.ops import apply_batch_ops
from fastssl.data.datasets import open_source
from fastssl.data.errors import BadItem
from fastssl.data.render.backend import Backend, choose_backend
from fastssl.data.sources.base import EncodedSource, Source
from fastssl.data.views.image import Views
from fastssl.engine import launch
from fastssl.engine.engine import Engine
from fastssl.engine.verbs import Verbs
from fastssl.methods import Method
from fastssl.random import REPLACE, mix
from fastssl.run.build import build, build_loader, fitted, kept_backend, with_backend
from fastssl.tree import map_leaves

Batch = dict[str, Any]
_NEVER = 1 << 40  # steps: more than anybody waits for
_MOST_SAMPLES = 512
_NEAR = 1.5  # a ceiling so near is what holds the pipeline up
_EQUAL = 1.1  # neither waits for the other


@dataclass(frozen=True)
class Measured:
    """What one rank measured.  Rates in this rank's images a second.

    images: in its share of a batch.  first: seconds to the first batch.  data: of the pipeline.
    step: of the model.  read, decode: of one process; read is 0 for items that are made, not read.
    side: the median shorter side of its images, pixels; 0 for what is no image.
    """

    images: int
    first: float
    data: float
    step: float
    read: float
    decode: float
    side: int


@dataclass(frozen=True)
class Verdict:
    """The ranks together: the slowest is what all wait for."""

    data: float  # images/s over all ranks
    step: float

    @property
    def waits(self) -> bool:
        """Whether the model waits for data."""
        return self.data * _EQUAL < self.step

    @property
    def wait(self) -> float:
        """The share of a step's time that would be spent waiting for data."""
        return max(0.0, 1 - self.data / self.step)

    def sentence(self) -> str:
        """Who is the bottleneck, and by how much."""
        factor = self.step / self.data
        share = f"some {100 * self.wait:.0f} % of each step would be spent waiting for data"
        if self.waits:
            return f"the data are the bottleneck: the model is {factor:.1f} times as fast, {share}"
        if factor > 1 / _EQUAL:
            return f"data and model are as fast as each other: {share}"
        return (
            f"the model is the bottleneck: the data are {1 / factor:.1f} times as fast, and "
            "are not waited for"
        )


def on_cpu(cfg: RunConfig) -> bool:
    """Whether the model trains on the CPU."""
    return cfg.device == "cpu" or not torch.cuda.is_available()


def verdict(ranks: Sequence[Measured]) -> Verdict:
    """Of what every rank measured."""
    world = len(ranks)
    return Verdict(world * min(r.data for r in ranks), world * min(r.step for r in ranks))


def examine(cfg: RunConfig, seconds: float = 5.0) -> tuple[RunConfig, list[Measured]]:
    """`cfg` with its back end settled, and what each rank measured; on every rank.  Collective.

    seconds: for the pipeline, and as many for the model; a tenth of it for each ceiling.
    Raises as train.pretrain does for what a user can mend, and ValueError for no time at all.
    """
    if not seconds > 0:
        raise ValueError(f"seconds: want more than 0, got {seconds}")
    # A single process tells of a mistake before it loads DeepSpeed; several do it together.
    ready = None if launch.launched() else _prepare(cfg)
    with launch.session(cfg.device) as device:
        cfg, source, method = ready or _prepare(cfg)
        loader = build_loader(cfg, source, device, parameters=method.needs_view_params)
        first, data, batch = _pipeline(loader.stream(0, _NEVER), seconds)
        read, decode, side = _ceilings(source, seconds / 10)
        engine = Engine(method, cfg.optim, cfg.engine, device=device, batch_size=cfg.batch_size)
        step = _model(cfg, engine, batch, source.channels, seconds)
        images = len(batch["index"])
        mine = Measured(images, first, data, step, read, decode, side)
        return cfg, distributed.gather_objects(mine)


def _prepare(cfg: RunConfig) -> tuple[RunConfig, Source, Method]:
    """Collective: a mistake that one rank meets all of them raise."""
    backend: Backend = distributed.from_first(lambda: kept_backend(cfg))
    with distributed.alike():
        source = open_source(cfg.data.source, cfg.seed, cfg.data.streams).train
        cfg, _ = with_backend(fitted(cfg, source), source, backend)
        return cfg, source, build(cfg, source.channels)


def _pipeline(stream: Any, seconds: float) -> tuple[float, float, Batch]:
    """Seconds to the first batch, images a second from then on, and the last batch."""
    start = time.perf_counter()
    batch = next(stream)
    since, images = time.perf_counter(), 0
    first = since - start
    while not images or time.perf_counter() - since < seconds:
        batch = next(stream)
        images += len(batch["index"])
    spent = time.perf_counter() - since
    stream.close()
    return first, images / spent, batch


def _model(cfg: RunConfig, engine: Verbs, batch: Batch, channels: int, seconds: float) -> float:
    """Images a second of training steps on one batch, at a learning rate of 0."""
    views = cfg.views()
    norm = views.normalization(channels) if isinstance(views, Views) else None  # of one stream
    rows = {key: value for key, value in batch.items() if key != "bad"}
    held = map_leaves(lambda leaf: leaf.to(engine.device), rows)

    def steps(count: int) -> float:
        since = time.perf_counter()
        for _ in range(count):
            given = apply_batch_ops(cfg.data.batch_ops, held, 0.0, norm, engine.device)
            engine.step(given, 0.0)
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)
        return time.perf_counter() - since

    steps(2)
    wanted = max(1, min(1000, round(seconds / steps(1))))
    count = min(distributed.gather_objects(wanted))  # all ranks make as many steps
    return count * len(batch["index"]) / steps(count)


def _ceilings(source: Source, seconds: float) -> tuple[float, float, int]:
    """Items a second read, and read and decoded, by this process alone; their shorter side."""
    order = mix(REPLACE, 0, np.arange(_MOST_SAMPLES)) % np.uint64(len(source))
    samples = [int(i) for i in order]
    read = 0.0
    if isinstance(source, EncodedSource):
        read = _rate(source.encoded, samples, seconds)
    sides: list[int] = []

    def item(i: int) -> None:
        for pixels in tree_leaves(source.item(i)):
            if pixels.ndim == 3:
                sides.append(min(pixels.shape[-2:]))

    return read, _rate(item, samples, seconds), median_low(sides) if sides else 0


def _rate(call: Callable[[int], Any], samples: Sequence[int], seconds: float) -> float:
    """Calls a second; what cannot be read counts as well."""
    since, done = time.perf_counter(), 0
    for i in samples:
        try:
            call(i)
        except BadItem:
            pass
        done += 1
        if time.perf_counter() - since > seconds:
            break
    return done / max(time.perf_counter() - since, 1e-9)


def advice(cfg: RunConfig, ranks: Sequence[Measured], source: Source) -> list[str]:
    """What to change, the most telling first; `cfg` as `examine` returns it."""
    found = verdict(ranks)
    if not found.waits:
        spare = found.data > 2 * found.step and cfg.data.workers > 1
        return ["faster data would change nothing"] + (
            [f"data.workers={cfg.data.workers} are more than it needs"] if spare else []
        )
    mine = min(ranks, key=lambda rank: rank.data)
    return [
        *_of_backend(cfg, source),
        *_of_workers(cfg, len(ranks)),
        *_of_ceilings(cfg, mine),
        *_of_views(cfg),
    ] or ["the pipeline is at its best here: a faster processor, or fewer views of an image"]


def _of_backend(cfg: RunConfig, source: Source) -> list[str]:
    views, data = cfg.views(), cfg.data
    if data.backend == "dali":
        idle = data.dali_on == "cpu" and not on_cpu(cfg)
        return ["data.dali_on=auto: DALI decodes and augments on the GPU"] if idle else []
    chosen = choose_backend("auto", views, source)
    if chosen.backend == "dali":
        return ["data.backend=dali: DALI makes these views in less time"]
    said = [f"{chosen.note}"] if chosen.note else []
    jitter = isinstance(views, Views) and any(
        view.jitter and view.color == "sequential" for view in views.views
    )
    return said + (["data.overrides.color=linear: all color changes at once"] if jitter else [])


def _of_workers(cfg: RunConfig, world: int) -> list[str]:
    cores, local = os.cpu_count() or 1, int(os.environ.get("LOCAL_WORLD_SIZE", world))
    share, have = max(1, cores // local), cfg.data.workers
    if share <= have:
        return []
    what = "threads of DALI" if cfg.data.backend == "dali" else "workers"
    return [f"data.workers={share}, now {have}: {what}, {cores} cores over {local} rank(s)"]


def _of_ceilings(cfg: RunConfig, mine: Measured) -> list[str]:
    workers, size = max(1, cfg.data.workers), cfg.data.image_size
    said = []
    if mine.read and mine.data * _NEAR > workers * mine.read:
        said.append("reading holds it up: fastssl pack RECIPE OUT, or a faster disk")
    small = round(size * 8 / 7)
    if mine.side > 1.5 * small:
        said.append(
            f"images have {mine.side} pixels on their shorter side, and views {size}: "
            f"fastssl pack RECIPE OUT --max-side {small}"
        )
    return said


def _of_views(cfg: RunConfig) -> list[str]:
    views = cfg.views()
    if views.count <= 2:
        return []
    return [f"{views.count} views of an image: fewer of them (data.overrides.local_count)"]
