"""What the engine costs over a bare loop that does the same work, in one process, turn by turn.

    python -m fastssl.bench.overhead            method, batch, stage, ms a bare step, median ratio

All train a copy of one method on one batch: forward, backward, the norm's clipping, AdamW (of the
bare loop torch's as it comes; "fused" as the engine has it).  The engine is DeepSpeed in float32,
alone in its world, at each ZeRO stage.  A turn is a step of each,
and who goes first changes; a ratio is of one turn.  Processor time stands beside the clock's: of a
machine that is shared with others it is what can be trusted.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import torch

from fastssl.bench.cases.trainers import make_batch
from fastssl.engine import launch
from fastssl.engine.config import EngineConfig
from fastssl.engine.engine import Engine
from fastssl.engine.optim import OptimConfig, parameter_groups
from fastssl.methods import build_method
from fastssl.methods.configs import MAEConfig, SimCLRConfig
from fastssl.models import build_backbone

ENCODERS = {
    "small": {"patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 4},  # as in *-digits
    "vit": {"patch_size": 4, "embed_dim": 192, "depth": 6, "num_heads": 6},  # 3 M parameters
}
METHODS: dict[str, Any] = {
    "simclr": SimCLRConfig(temperature=0.1, hidden_dim=256, projection_dim=64),  # type: ignore
    "mae": MAEConfig(decoder_dim=64, decoder_depth=2, decoder_heads=4),  # type: ignore
}
LR, SIDES = 2e-3, {"small": 16, "vit": 32}
OPTIM = OptimConfig(name="adamw", lr=LR, weight_decay=0.05, clip=1.0)
CLOCKS: dict[str, Callable[[], float]] = {
    "processor": time.process_time,
    "clock": time.monotonic,
}


def steps_of(
    name: str, size: str, batch_size: int, stages: Sequence[int], on_nonfinite: str
) -> dict[str, Callable]:
    """A step of the bare loop and one of an engine at each stage, on copies of one method."""
    torch.manual_seed(0)
    kwargs, side = ENCODERS[size], SIDES[size]
    encoder = build_backbone("vit_tiny_patch16_224", shape=(1, side, side), kwargs=kwargs)
    method: Any = build_method(encoder, METHODS[name])
    count = method.views if isinstance(method.views, int) else method.views[0]
    views = [torch.randn(batch_size, 1, side, side)] * count
    batch = make_batch((*views, torch.arange(batch_size)))
    steps: dict[str, Callable] = {
        "bare": loop_of(copy.deepcopy(method), batch, fused=None),
        "fused": loop_of(copy.deepcopy(method), batch, fused=True),
    }
    for stage in stages:
        cfg = EngineConfig.model_validate({"zero_stage": stage, "on_nonfinite": on_nonfinite})
        kind = {"device": torch.device("cpu"), "batch_size": batch_size}
        engine = Engine(copy.deepcopy(method), OPTIM, cfg, **kind)
        steps[f"stage {stage}"] = partial(engine.step, batch, LR)
    return steps


def loop_of(model: Any, batch: dict[str, Any], fused: bool | None) -> Callable[[], None]:
    """A step of the loop that everybody writes."""
    groups = parameter_groups(model, OPTIM.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=LR, fused=fused)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def loop() -> None:
        model(batch)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(parameters, OPTIM.clip)
        optimizer.step()
        optimizer.zero_grad()

    return loop


def measure(steps: dict[str, Callable], rounds: int) -> dict[str, dict[str, tuple[float, float]]]:
    """Of both clocks and every step: its median seconds, and the median of turns beside bare."""
    spent = {clock: {name: [] for name in steps} for clock in CLOCKS}
    for turn in range(rounds + 2):
        names = [*steps][turn % len(steps) :] + [*steps][: turn % len(steps)]
        for name in names if turn % 2 else reversed(names):
            since = {clock: read() for clock, read in CLOCKS.items()}
            steps[name]()
            for clock, read in CLOCKS.items():
                spent[clock][name].append(read() - since[clock])
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for clock, of in spent.items():
        bare = of["bare"][2:]
        found[clock] = {
            name: (median(each[2:]), median(a / b for a, b in zip(each[2:], bare, strict=True)))
            for name, each in of.items()
        }
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int, nargs="+", default=[64])
    parser.add_argument("--stages", type=int, nargs="+", choices=range(4), default=[0, 1, 2, 3])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--encoder", choices=ENCODERS, default="vit")
    parser.add_argument("--on-nonfinite", choices=("stop", "skip"), default="stop")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with launch.session("cpu"):
        for name, size in product(args.methods, args.batch):
            steps = steps_of(name, args.encoder, size, args.stages, args.on_nonfinite)
            for clock, found in measure(steps, args.rounds).items():
                ratios = ", ".join(f"{step} {of[1]:.3f}" for step, of in found.items())
                bare = f"bare step {1e3 * found['bare'][0]:.1f} ms"
                print(f"{name} B={size} {clock}: {bare}; over bare: {ratios}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
