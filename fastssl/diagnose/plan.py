"""What a run will need before it starts: parameters, and memory on each device.

Weights, gradients and optimizer state follow ZeRO's arithmetic (Rajbhandari et al. 2020,
arXiv:1910.02054, figure 1).  Activations are counted, not guessed: the method runs once on fake
tensors, which have shapes but no memory and take the paths that real ones take, and every tensor
that autograd keeps for backward is added up.  On a CPU the process itself comes on top: what Python
and the libraries take before a model is there, measured in the process that plans.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastssl.config import RunConfig
from fastssl.engine.blocks import recompute
from fastssl.engine.large_batch import is_exact
from fastssl.methods.base import PARAMETERS
from fastssl.models import frozen_in
from fastssl.run.build import build
from fastssl.run.summary import count_parameters, peak_memory
from fastssl.tree import leaves

NOT_COUNTED = (
    "DeepSpeed's buffers for reduction and gathering, copies made in the optimizer's step, "
    "evaluation, loader processes"
)
# float32 values an optimizer keeps for each parameter; two where it is not listed (the Adam family)
STATES = {"sgd": 1, "momentum": 1, "lars": 1, "lion": 1, "muon": 1}


@dataclass(frozen=True)
class Plan:
    """Bytes on each device, NOT_COUNTED left out; `parameters` is a count, over all devices.

    process: resident memory before the model is built; 0 on CUDA, whose allocator has none of it.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    process: int

    @property
    def total(self) -> int:
        held = self.weights + self.gradients + self.optimizer
        return held + self.activations + self.process


def make_plan(cfg: RunConfig, channels: int | dict[str, int], world: int) -> Plan:
    """The plan of `cfg` on `world` devices, for items of `channels` channels."""
    device = "cuda" if torch.cuda.is_available() and cfg.device != "cpu" else "cpu"
    process = peak_memory() if device == "cpu" else 0
    with torch.device("meta"):
        method = build(cfg, channels)
    P, stage, half = count_parameters(method), cfg.engine.zero_stage, cfg.engine.precision == "bf16"
    T = sum(p.numel() for p in method.parameters() if p.requires_grad)
    if half:
        method.to(torch.bfloat16)
    F = sum(p.numel() for network in frozen_in(method) for p in network.parameters())
    recompute(method, cfg.engine)
    width = 2 if half else 4
    means = 4 * (P - T - F) if half else 0  # of a teacher
    states = 4 * STATES.get(cfg.optim.name, 2)
    masters = 4 if half or stage > 0 else 0
    held = is_exact(method, cfg.engine) and cfg.engine.reduce_once
    return Plan(
        parameters=P,
        weights=int((width * P + means) / (world if stage == 3 else 1)),
        gradients=int(width * T / (world if stage >= 2 and not held else 1)),
        optimizer=int((masters + states) * T / (world if stage >= 1 else 1)),
        activations=_activations(method, cfg, channels, world, device),
        process=process,
    )


def _activations(
    method: torch.nn.Module, cfg: RunConfig, channels: int | dict[str, int], world: int, device: str
) -> int:
    """Bytes kept for backward: linear in the images, measured at 4 and 8 of them.

    Of an exact large batch the loss keeps its share of every image of the rank, beside their rows
    and the rows' gradient; the encoder of those of one micro-batch.
    """
    parts, rows = cfg.engine.accumulation, cfg.batch_size // world
    exact = is_exact(method, cfg.engine)
    with FakeTensorMode(allow_non_fake_inputs=True):
        method.to_empty(device=device)
        measured = [_kept(method, cfg, channels, n, device) for n in (4, 8)]
    counts = (rows // parts, rows if exact else rows // parts, rows if exact else 0)
    total = 0.0
    for small, large, images in zip(*measured, counts, strict=True):
        slope = (large - small) / 4
        total += max(0, small - 4 * slope) + slope * images
    return int(total)


def _kept(
    method: torch.nn.Module, cfg: RunConfig, channels: int | dict[str, int], n: int, device: str
) -> tuple[int, int, int]:
    """Of n images: what the encoder keeps, what the loss adds, and twice the encoded rows."""
    own = {p.untyped_storage()._cdata for p in method.parameters()}
    kept: dict[int, int] = {}
    alive = []  # a storage freed in mid-pass would lend its address to another

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            alive.append(x)
        return x

    shapes = cfg.views().shapes(channels)  # type: ignore[arg-type]
    index = torch.zeros(n, dtype=torch.int64, device=device)
    batch: dict[str, Any] = {"index": index, "seeds": index, "label": index}
    batch["views"] = _each(shapes, lambda shape: torch.empty(n, *shape, device=device))
    batch["params"] = _each(shapes, lambda _: torch.ones(n, len(PARAMETERS), device=device))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        batch = method.prepare(batch)  # type: ignore[operator]
        encoded = method(batch, "encode")
        in_encoder = sum(kept.values())
        if method.has_targets:
            batch["targets"] = method(batch, "targets")
        method(batch, "loss", encoded)["loss"]
    rows = 2 * sum(leaf.nbytes for leaf in leaves(encoded))
    return in_encoder, sum(kept.values()) - in_encoder, rows


def _each(shapes: Any, made: Callable[[tuple[int, ...]], torch.Tensor]) -> Any:
    """A tensor each view; by stream where the shapes are."""
    if isinstance(shapes, dict):
        return {name: _each(own, made) for name, own in shapes.items()}
    return [made(shape) for shape in shapes]
