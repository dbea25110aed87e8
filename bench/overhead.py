"""What the engine costs over a bare loop that does the same work, in one process, turn by turn.

    python -m fastssl.bench.overhead            method, batch, ms a step of each, median ratio

Both train a copy of one method on one batch: forward, backward, the norm's clipping, AdamW.  The
engine is DeepSpeed at ZeRO stage 0 in float32, alone in its world.  A pair of steps is one turn,
and who goes first alternates; a ratio is of a pair.  Processor time stands beside the clock's: of
a machine that is shared with others it is what can be trusted.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

from fastssl.bench.cases.trainers import make_batch
from fastssl.engine import launch
from fastssl.engine.config import EngineConfig
from fastssl.engine.engine import Engine
from fastssl.engine.optim import OptimConfig, build_optimizer
from fastssl.methods import build_method
from fastssl.methods.configs import MAEConfig, SimCLRConfig
from fastssl.models import build_backbone

ENCODER = {"patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 4}  # as in *-digits
METHODS: dict[str, Any] = {
    "simclr": SimCLRConfig(temperature=0.1, hidden_dim=256, projection_dim=64),  # type: ignore
    "mae": MAEConfig(decoder_dim=64, decoder_depth=2, decoder_heads=4),  # type: ignore
}
LR, SIDE = 2e-3, 16
OPTIM = OptimConfig(name="adamw", lr=LR, weight_decay=0.05, clip=1.0)
Clock = Callable[[], float]


def steps_of(name: str, batch_size: int, on_nonfinite: str) -> tuple[Callable, Callable]:
    """A step of the engine and one of the bare loop, on copies of one method."""
    torch.manual_seed(0)
    encoder = build_backbone("vit_tiny_patch16_224", shape=(1, SIDE, SIDE), kwargs=ENCODER)
    method: Any = build_method(encoder, METHODS[name])
    bare, views = copy.deepcopy(method), [torch.randn(batch_size, 1, SIDE, SIDE)] * method.views
    batch = make_batch((*views, torch.arange(batch_size)))
    cfg = EngineConfig.model_validate({"zero_stage": 0, "on_nonfinite": on_nonfinite})
    engine = Engine(method, OPTIM, cfg, device=torch.device("cpu"), batch_size=batch_size)
    optimizer = build_optimizer(bare, OPTIM)
    parameters = [p for p in bare.parameters() if p.requires_grad]

    def loop() -> None:
        bare(batch)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(parameters, OPTIM.clip)
        optimizer.step()
        optimizer.zero_grad()

    return lambda: engine.step(batch, LR), loop


def measure(mine: Callable, bare: Callable, rounds: int, clock: Clock) -> tuple[float, float]:
    """Median seconds of a bare step, and the median ratio of pairs."""
    spent: dict[Callable, list[float]] = {mine: [], bare: []}
    for i in range(rounds + 2):
        for step in (mine, bare) if i % 2 else (bare, mine):
            since = clock()
            step()
            spent[step].append(clock() - since)
    ratios = [a / b for a, b in zip(spent[mine][2:], spent[bare][2:], strict=True)]
    return median(spent[bare][2:]), median(ratios)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--on-nonfinite", choices=("stop", "skip"), default="stop")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with launch.session("cpu"):
        for name in METHODS:
            for size in args.batch:
                pair = steps_of(name, size, args.on_nonfinite)
                for which, clock in (("processor", time.process_time), ("clock", time.monotonic)):
                    seconds, ratio = measure(*pair, args.rounds, clock)
                    step = f"bare step {1e3 * seconds:.1f} ms"
                    print(f"{name} B={size} {which}: {step}, engine / bare {ratio:.3f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
