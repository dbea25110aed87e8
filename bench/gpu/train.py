"""Two whole training steps in bfloat16, of torch, timm and our losses alone: a watched child.

    python -m fastssl.bench.gpu.train

SimCLR with a ViT-S/16 and MAE with a ViT-L/16, in a plain loop under autocast, as the cases train-*
have it; those also train under DeepSpeed and beside rivals, where the packages are there.  What is
absent is said, and no failure.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fastssl.bench.cases.train import mae_decoder, mae_flops, simclr_flops, simclr_head
from fastssl.bench.gpu.watched import Case, Watch, rehearsing, run
from fastssl.bench.measure.peaks import measure_ceilings
from fastssl.bench.measure.turns import Clock, wait
from fastssl.bench.registry import Shape
from fastssl.losses import MAELoss, NTXentLoss
from fastssl.masking import random_masking

SIMCLR = {"B": 512, "S": 224, "P": 16, "W": 384, "L": 12}
MAE = {"B": 512, "S": 224, "P": 16, "W": 1024, "L": 24}
TINY = {"B": 4, "S": 32, "P": 8, "W": 64, "L": 2}
WARM, STEPS = 3, 10
OPTIONAL = ("pydantic", "deepspeed", "lightly", "yaml")


def main() -> int:
    """The child: two steps, and a note of what is not there."""
    watch = Watch.told()
    if absent := [name for name in OPTIONAL if find_spec(name) is None]:
        watch.write("note", absent=absent, words="the engine's step is not measured without them")
    device = torch.device("cpu" if rehearsing() else "cuda:0")
    return run(cases(device), watch)


def cases(device: torch.device) -> list[Case]:
    """The two steps."""
    plans = (("simclr", SIMCLR, simclr, simclr_flops), ("mae", MAE, mae, mae_flops))
    found = []
    for name, full, make, flops in plans:
        shape = TINY if rehearsing() else full
        sides = " ".join(f"{side}={size}" for side, size in shape.items())
        call = partial(measure, make, shape, device, flops(shape))
        found.append((f"train {name} {sides}", call))
    return found


Step = Callable[[], Tensor]


@cache
def _peak(device: torch.device) -> float:
    """TFLOP/s of a product in bfloat16; a rehearsal has no share of it, and does without."""
    return 0.0 if rehearsing() else measure_ceilings(device, ("bfloat16",))[1].measured


def measure(
    make: Callable[[Shape, torch.device], Step], shape: Shape, device: torch.device, flops: float
) -> dict[str, Any]:
    """The median step, what it comes to, and its share of the measured product's rate."""
    peak = _peak(device)
    step = make(shape, device)
    losses = [step() for _ in range(1 if rehearsing() else WARM)]
    times, enqueued = [], []
    for _ in range(2 if rehearsing() else STEPS):
        clock = Clock(device)
        wait(device)
        begun = time.perf_counter()
        clock.mark()
        losses.append(step())
        clock.mark()
        enqueued.append(1e3 * (time.perf_counter() - begun))
        times += clock.spans()
    ms, tflops = median(times), flops / median(times) / 1e9
    found = {
        "ms": ms,
        "enqueue_ms": median(enqueued),
        "images_per_s": 1e3 * shape["B"] / ms,
        "tflops": tflops,
        "share": tflops / peak if peak else None,
        "first_loss": float(losses[0]),
        "last_loss": float(losses[-1]),
    }
    if device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        torch.cuda.reset_peak_memory_stats(device)
    if not all(torch.isfinite(loss) for loss in losses):
        return {**found, "why": "a loss is not finite"}
    return found


def _vit(shape: Shape) -> Any:
    from timm.models.vision_transformer import VisionTransformer

    width, heads = shape["W"], max(1, shape["W"] // 64)
    size = {"embed_dim": width, "depth": shape["L"], "num_heads": heads}
    return VisionTransformer(shape["S"], shape["P"], num_classes=0, **size)


def _loop(modules: list[Any], loss: Callable[[], Tensor], device: torch.device) -> Step:
    """Forward under autocast in bfloat16, backward, AdamW."""
    parameters = [p for module in modules for p in module.parameters()]
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.05, fused=fused)

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        return value.detach()

    return step


def simclr(shape: Shape, device: torch.device) -> Step:
    """Two views of each image through encoder and head, then NT-Xent."""
    from fastssl.models import projection_head

    torch.manual_seed(0)
    hidden, out = simclr_head(shape)
    encoder = _vit(shape).to(device)
    head = projection_head(shape["W"], hidden, out, 2, final_norm=True).to(device)
    views = _images(shape, device, 2)
    loss = NTXentLoss(0.5)
    return _loop([encoder, head], lambda: loss(*(head(encoder(x)) for x in views)), device)


def mae(shape: Shape, device: torch.device) -> Step:
    """The visible quarter through the encoder, all places through the decoder, hidden pixels."""
    from fastssl.models import MAEDecoder, MaskedViT

    torch.manual_seed(0)
    masked = MaskedViT(_vit(shape)).to(device)
    (width, depth), places = mae_decoder(shape), masked.num_patches
    sizes = {"width": width, "depth": depth, "heads": max(1, width // 32)}
    values = 3 * shape["P"] ** 2
    decoder = MAEDecoder(shape["W"], **sizes, patches=places, values=values).to(device)
    (images,) = _images(shape, device, 1)
    seeds, loss = torch.arange(shape["B"], device=device), MAELoss(shape["P"])

    def value() -> Tensor:
        masking = random_masking(seeds, places, places // 4)
        return loss(decoder(masked(images, masking.visible), masking), images, masking.masked)

    return _loop([masked, decoder], value, device)


def _images(shape: Shape, device: torch.device, views: int) -> list[Tensor]:
    size = (shape["B"], 3, shape["S"], shape["S"])
    return [torch.randn(size, device=device) for _ in range(views)]


if __name__ == "__main__":
    sys.exit(main())
