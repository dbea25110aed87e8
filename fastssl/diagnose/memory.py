"""Bytes on the fullest rank, part by part, at the three moments of a step that can be its peak.

    backward    the fullest moment of forward and backward, as counted on fake tensors
    reduce      gradients in buckets, and the copies that collectives make of them
    update      the optimizer's step: its float32 gradient and its temporaries

Weights, gradients and states follow ZeRO's arithmetic (Rajbhandari et al. 2020, arXiv:1910.02054,
figure 1); buckets and copies are what DeepSpeed 0.19 makes of them.  With T trained parameters of w
bytes, W ranks and b = min(T, bucket) elements:

    stage 0     reduce: a flat copy, b w
    stage 1, 2  reduce: bucket + flat copy, 2 b w         update: (w + 4 + temporaries) T / W
    stage 3     backward: all parameters, gathered        update: (4 + temporaries) s
                reduce: bucket + flat copy, 2 b w         s = min(T / W, sub-group)

What an optimizer keeps and takes in its step is measured on a small one of its kind.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fastssl.config import RunConfig
from fastssl.engine.config import offloads_optimizer
from fastssl.engine.large_batch import is_exact
from fastssl.engine.optim import OptimConfig, build_optimizer
from fastssl.engine.zero import STEPPED, deepspeed_keys
from fastssl.models import frozen_in

from .counting import Counts, Meter, Work
from .hardware import Device
from .replay import seconds

MOMENTS = ("backward", "reduce", "update")
_BUCKET = 500_000_000  # elements: DeepSpeed's, and of its all-reduce without ZeRO
_LIVE = 1_000_000_000  # parameters gathered at a time, at stage 3
FIRST_STEP = 80 << 20  # bytes of libraries on a CPU (kernels, stacks): measured, 80 to 150 MiB
CONTEXT = 1 << 30  # bytes of CUDA's context and NCCL's buffers: assumed
SLACK = 0.05  # of what CUDA's allocator hands out, lost between blocks: assumed


@dataclass(frozen=True)
class Sizes:
    """Of a method: parameters, those trained, those frozen, those of the largest tensor trained.

    largest: of the tensors that are trained.  networks: parameters of what a checkpoint exports.
    modules: how many have parameters of their own.  tensors: how many are trained.
    """

    parameters: int
    trained: int
    frozen: int
    largest: int
    networks: int
    modules: int
    tensors: int

    @property
    def teacher(self) -> int:
        return self.parameters - self.trained - self.frozen

    @classmethod
    def of(cls, method: Any) -> "Sizes":
        still = {id(p): p for network in frozen_in(method) for p in network.parameters()}
        trained = [p.numel() for p in method.parameters() if p.requires_grad]
        exported = {
            id(p): p.numel() for net in method.networks().values() for p in net.parameters()
        }
        return cls(
            parameters=sum(p.numel() for p in method.parameters()),
            trained=sum(trained),
            frozen=sum(p.numel() for p in still.values()),
            largest=max(trained),
            networks=sum(size for key, size in exported.items() if key not in still),
            tensors=len(trained),
            modules=sum(bool(list(m.parameters(recurse=False))) for m in method.modules()),
        )


@dataclass(frozen=True)
class Rule:
    """What an optimizer takes, bytes a parameter.

    states: kept.  one: temporaries of its step, of a single flat tensor; many: of several tensors,
    of which `whole` says whether they are there for all at once or for the largest.
    moved: read and written.
    calls: operators for one tensor; each: for each one more.  seconds: a parameter, on a processor.
    """

    states: float
    one: float
    many: float
    whole: bool
    moved: float
    calls: int
    each: int = 0
    seconds: float = 0.0

    def calls_of(self, tensors: int) -> int:
        return self.calls + self.each * (tensors - 1)

    @classmethod
    def of(cls, cfg: OptimConfig, *, on_cpu: bool) -> "Rule":
        """Measured on float32 tensors of 2^14 elements; seconds on one of 2^20."""
        plain = cfg.model_copy(update={"groups": ()})
        single, several = (_measured(plain, n, on_cpu) for n in (1, 3))
        whole = several.peak > 2.5 * single.peak
        states = single.states / single.elements
        return cls(
            states,
            single.peak / single.elements,
            several.peak / (several.elements if whole else single.elements),
            whole,
            single.work.moved / single.elements,
            len(single.work.calls),
            (len(several.work.calls) - len(single.work.calls)) // 2,
            _seconds_of(plain) if on_cpu else 0.0,
        )


@dataclass
class _Step:
    elements: int
    states: int
    peak: int
    work: Work


def _seconds_of(cfg: OptimConfig) -> float:
    """Of a step, for each parameter."""
    side = 1024
    optimizer, _ = _small(cfg, 1, side)
    return seconds(optimizer.step, 0.01, 3) / side**2


def _small(cfg: OptimConfig, tensors: int, side: int) -> tuple[torch.optim.Optimizer, nn.Module]:
    """An optimizer that has taken a step, and its model of square tensors."""
    model = nn.Module()
    for n in range(tensors):
        model.register_parameter(f"w{n}", nn.Parameter(torch.ones(side, side)))
    optimizer = build_optimizer(model, cfg)
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.1)
    optimizer.step()
    return optimizer, model


def _measured(cfg: OptimConfig, tensors: int, on_cpu: bool) -> _Step:
    side = 128
    optimizer, model = _small(cfg, tensors, side)
    for group in optimizer.param_groups:
        if "foreach" in group and not on_cpu:  # torch's default on a GPU
            group["foreach"] = True
    kept = [x for state in optimizer.state.values() for x in state.values()]
    kept = [x for x in kept if isinstance(x, torch.Tensor)]
    known = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
    meter, work = Meter([*known, *kept]), Work()
    with torch.no_grad(), meter, meter.into(work):
        optimizer.step()
    states = sum(x.nbytes for x in kept if x.numel() == side * side)
    return _Step(tensors * side * side, states, meter.peak, work)


@dataclass(frozen=True)
class Zero:
    """What DeepSpeed is told of ZeRO, where this says something of memory or of time."""

    stage: int
    bucket: int
    overlap: bool
    live: int
    stepped: int
    offloads: bool
    cuts: bool  # gradients are cut as they come

    @classmethod
    def of(cls, cfg: RunConfig, method: Any, world: int, *, cuda: bool) -> "Zero":
        engine = cfg.engine
        stage, trained = engine.zero_stage, Sizes.of(method).trained
        parts = 1 if is_exact(method, engine) else engine.accumulation
        keys = deepspeed_keys(engine.zero, stage, trained, cuda=cuda, world=world, parts=parts)
        given = {**keys["zero_optimization"], **engine.deepspeed.get("zero_optimization", {})}
        held = is_exact(method, engine) and engine.reduce_once
        return cls(
            stage,
            int(float(given.get("reduce_bucket_size", _BUCKET))),
            bool(given.get("overlap_comm")),
            int(float(given.get("stage3_max_live_parameters", _LIVE))),
            int(float(given.get("sub_group_size", STEPPED))),
            offloads_optimizer(engine),
            stage >= 2 and not held,
        )


Row = tuple[int, int, int]


@dataclass(frozen=True)
class Memory:
    """Bytes by part; a row has one number for each of MOMENTS."""

    parts: dict[str, Row]

    @property
    def totals(self) -> Row:
        one, two, three = (sum(row[n] for row in self.parts.values()) for n in range(3))
        return one, two, three

    @property
    def peak(self) -> int:
        return max(self.totals)

    @property
    def moment(self) -> str:
        """When that is."""
        return MOMENTS[self.totals.index(self.peak)]


def memory(
    sizes: Sizes,
    counts: Counts,
    rule: Rule,
    zero: Zero,
    device: Device,
    *,
    world: int,
    half: bool,
    parts: int,
    inputs: int,
    process: int,
) -> Memory:
    """What each of `world` ranks holds.

    half: in bfloat16.  parts: micro-batches.  inputs: bytes of the views that lie on the device.
    process: bytes of the process before it has a model.
    """
    P, T, stage, W = sizes.parameters, sizes.trained, zero.stage, world
    w = 2 if half else 4
    cut = W if stage == 3 else 1
    share = T / W if stage else T
    on_cpu = device.on_cpu
    rows: dict[str, tuple[float, float, float]] = {}

    def always(name: str, size: float) -> None:
        rows[name] = (size, size, size)

    always("process" if on_cpu else "CUDA and NCCL", process + FIRST_STEP if on_cpu else CONTEXT)
    always("weights", w * (P - sizes.teacher) / cut)
    always("EMA teacher", (6 if half else 4) * sizes.teacher / cut)  # in 16 bits with a mean in 32
    masters = 4 * share if half or stage else 0
    off = zero.offloads and stage > 0
    always("float32 masters", 0 if off else masters)
    always("optimizer states", 0 if off else rule.states * share)
    always("views", inputs)

    grads, b = w * T, min(T, zero.bucket)
    full = b if on_cpu else zero.bucket  # untouched pages of a bucket take no memory on a CPU
    buckets = w * full * (2 if zero.overlap and stage in (1, 2) else 1) if stage else 0
    # A tensor that is larger than a bucket travels by itself.
    flat = w * max(b, sizes.largest) if W > 1 or stage else 0
    # gloo knows no reduce-scatter, and makes another copy for its all-reduce
    flat *= 2 if on_cpu and stage == 3 else 1
    piece = w * T / W
    gathered = w * min(P, zero.live) if stage == 3 else 0
    if stage == 3:
        always("gradients, this rank's piece", 0 if off else piece)
    # The account of the fullest moment: what is kept for backward, and the gradients made by then.
    made = counts.grads
    if parts > 1 or zero.cuts:
        made, kept = (grads if not zero.cuts else 0), counts.lean
    else:
        kept = counts.backward - made
    if on_cpu:  # malloc keeps what is freed: what is kept and all gradients add up
        made, kept = grads, max(counts.lean, counts.kept + counts.heads)
    kept += counts.rows_held
    heads = min(counts.heads, kept)
    left = kept if on_cpu else 0
    held = grads if on_cpu else 0
    if zero.cuts and stage == 2:
        rows["gradients"] = (piece, piece, piece)
    elif stage == 0:
        rows["gradients"] = (made, grads, grads)
    else:
        rest = w * max(T - b, 0) if stage < 3 and not zero.cuts else 0
        rows["gradients"] = (made, max(rest, held), held)
    rows["activations"] = (kept - heads, left and left - heads, left and left - heads)
    rows["loss and gathered embeddings"] = (heads, left and heads, left and heads)
    rows["gathered parameters"] = (gathered, gathered, gathered if on_cpu else 0)
    rows["reduction buckets"] = (buckets, buckets, buckets if stage == 3 else 0)
    rows["flat copy for the collective"] = (0, flat, 0)
    if off:
        rows["float32 gradient in the step"] = (0, 0, 0)
        rows["optimizer's temporaries"] = (0, 0, 0)
    elif stage:
        # The rank's piece of all groups is one tensor, which stays until the last group is done.
        # Stage 3 takes it in parts, each ending with the parameter that fills it.
        stepped = min(share, zero.stepped + sizes.largest / W) if stage == 3 else share
        lower = 0 if stage == 3 or zero.cuts else w
        rows["float32 gradient in the step"] = (0, 0, (lower + 4) * stepped)
        rows["optimizer's temporaries"] = (0, 0, rule.one * stepped)
    else:
        rows["float32 gradient in the step"] = (0, 0, 4 * T if half else 0)
        most = T if rule.whole else sizes.largest
        rows["optimizer's temporaries"] = (0, 0, rule.many * most)
    if not on_cpu:
        sums = [sum(row[n] for row in rows.values()) - CONTEXT for n in range(3)]
        one, two, three = (SLACK * total for total in sums)
        rows["allocator's slack"] = (one, two, three)
    whole = {name: _whole(row) for name, row in rows.items() if any(row)}
    return Memory(whole)


def _whole(row: tuple[float, float, float]) -> Row:
    one, two, three = (int(size) for size in row)
    return one, two, three


def at_stage(zero: Zero, stage: int, held: bool) -> Zero:
    """The same at another stage.  held: gradients stay whole until a step's end."""
    overlap = stage == 3 if zero.stage != 3 else zero.overlap
    return replace(zero, stage=stage, overlap=overlap, cuts=stage >= 2 and not held)
