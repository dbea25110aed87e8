"""A few real steps of a recipe on made-up views: their time, and this process's peak memory.

    python -m fastssl.diagnose.measured RECIPE key=value ...
    torchrun --nproc-per-node 2 -m fastssl.diagnose.measured RECIPE key=value ...

What a plan is held against.  Rank 0 prints a line of JSON: bytes before there was a model, at most
since then; seconds of a step, their median by the clock and the least by the processor, which
others disturb less.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from fastssl import distributed
from fastssl.config import RunConfig, resolve
from fastssl.data.datasets import open_source
from fastssl.engine import launch
from fastssl.engine.engine import Engine
from fastssl.methods.base import PARAMETERS
from fastssl.run.build import build, fitted
from fastssl.tree import map_leaves

STEPS = 8


def measure(cfg: RunConfig, channels: int | dict[str, int], steps: int = STEPS) -> dict[str, Any]:
    """`steps` steps of this rank's share, the first two of which warm up.  Collective."""
    with launch.session(cfg.device) as device:
        cuda = device.type == "cuda"
        before = 0 if cuda else resident()
        method = build(cfg, channels)
        engine = Engine(method, cfg.optim, cfg.engine, device=device, batch_size=cfg.batch_size)
        rows = cfg.batch_size // distributed.world_size()
        shapes: Any = cfg.views().shapes(channels)  # type: ignore[arg-type]
        each = torch.arange(rows)
        views = [torch.randn(rows, *shape) for shape in shapes]
        batch = {"views": views, "index": each, "seeds": each + 1, "label": each % 10}
        batch["params"] = [torch.ones(rows, len(PARAMETERS)) for _ in shapes]
        clock, busy = [], []
        for _ in range(steps):
            since = time.perf_counter(), time.process_time()
            engine.step(map_leaves(torch.Tensor.clone, batch), 1e-4, progress=0.5, epoch=0.0)
            if cuda:
                torch.cuda.synchronize(device)
            clock.append(time.perf_counter() - since[0])
            busy.append(time.process_time() - since[1])
        peak = torch.cuda.max_memory_reserved(device) if cuda else peak_resident()
        return {
            "before": before,
            "peak": peak,
            "seconds": median(clock[2:] or clock),
            "processor_seconds": min(busy[2:] or busy),
        }


def resident() -> int:
    """Bytes of this process in memory, now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def peak_resident() -> int:
    """Bytes, at most since the program began; getrusage's would be its parent's as well."""
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))


def main(argv: Sequence[str] | None = None) -> None:
    recipe, *overrides = sys.argv[1:] if argv is None else argv
    torch.set_num_threads(1)
    cfg = resolve(recipe, overrides)
    source = open_source(cfg.data.source, cfg.seed, cfg.data.streams).train
    found = measure(fitted(cfg, source), source.channels)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
