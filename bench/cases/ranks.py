"""Losses over W ranks: the joined batch, each rank holding B different images of it.

A step is every rank's forward and backward with the exchange between them.  The
gate is the contract itself: the mean over ranks of value and gradients is that of the joined batch
in one process.  "reference" is that one process, on all W x B images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from fastssl.bench.measure.gate import SLACK_OTHERS, SLACK_OURS, step, why_wrong
from fastssl.bench.measure.rank_pool import Loss, RankPool
from fastssl.bench.registry import (
    OURS,
    REFERENCE,
    Absent,
    Problem,
    Rival,
    Shape,
    Sweep,
    case,
    shapes_of,
)
from fastssl.losses import BarlowTwinsLoss, NTXentLoss

_TEMPERATURE, _LAMBDA = 0.5, 5e-3


def _by_lightly(name: str, value: float) -> Loss:
    from lightly import loss

    return getattr(loss, name)(value, gather_distributed=True)


@case(
    "ntxent-ranks",
    test="tests/losses/test_ranks.py",
    shapes=shapes_of(
        "W B D",
        quick=[(2, 128, 128)],
        cpu=[(2, 1024, 128)],
        cuda=[(w, 4096, 128) for w in (1, 2, 4, 8)],
    ),
    sweeps={
        "quick": [Sweep("W", (1, 2, 4), {"B": 64, "D": 64})],
        "cpu": [Sweep("W", (1, 2, 4), {"B": 512, "D": 128})],
        "cuda": [Sweep("W", (1, 2, 4, 8), {"B": 4096, "D": 128})],
    },
    dtypes=("float32",),
)
def ntxent_ranks(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """SimCLR's loss over W ranks of B images each, embeddings gathered."""
    return _problem(shape, device, NTXentLoss, _TEMPERATURE)


@case(
    "barlow-ranks",
    test="tests/losses/test_ranks.py",
    shapes=shapes_of("W B D", cpu=[(2, 256, 1024)], cuda=[(w, 512, 8192) for w in (1, 2, 4, 8)]),
    sweeps={
        "cpu": [Sweep("W", (1, 2, 4), {"B": 128, "D": 1024})],
        "cuda": [Sweep("W", (1, 2, 4, 8), {"B": 512, "D": 8192})],
    },
    dtypes=("float32",),
)
def barlow_ranks(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """Barlow Twins' loss over W ranks of B images each, statistics of the joined batch."""
    return _problem(shape, device, BarlowTwinsLoss, _LAMBDA)


def _problem(
    shape: Shape, device: torch.device, kind: Callable[..., Loss], value: float
) -> Problem:
    """kind(value): our loss, which lightly has under the same name."""
    W, B, D = shape["W"], shape["B"], shape["D"]
    builds: dict[str, Callable[[], Loss]] = {
        OURS: partial(kind, value),
        "lightly": partial(_by_lightly, kind.__name__, value),
    }
    if device.type == "cuda" and torch.cuda.device_count() < W:
        why = f"needs {W} GPUs, there are {torch.cuda.device_count()}"
        return Problem((), dict.fromkeys([*builds, REFERENCE], Absent(why)), check=lambda n, o: "")
    z = torch.randn(W * B, D, device=device)
    joined = [(z + 0.5 * torch.randn_like(z)).requires_grad_() for _ in range(2)]
    rows = [x.detach().chunk(W) for x in joined]
    loss = builds[OURS]()
    pools: dict[str, RankPool] = {}
    rivals: dict[str, Rival | Absent] = {
        name: _Ranks(partial(RankPool, build, rows, device), name, pools)
        for name, build in builds.items()
    }
    if not find_spec("lightly"):
        rivals["lightly"] = Absent("pip install lightly")
    rivals[REFERENCE] = lambda: step(loss, joined)[0]
    eager = step(loss, joined)
    truth = step(loss, [x.detach().double().requires_grad_() for x in joined])

    def check(name: str, outputs: Sequence[Tensor]) -> str:
        if name == REFERENCE:
            return why_wrong(outputs, eager[:1], truth[:1], slack=SLACK_OURS)
        slack = SLACK_OURS if name == OURS else SLACK_OTHERS
        gradients = [g.to(device) for g in pools[name].gradients()]
        return why_wrong([outputs[0].to(eager[0]), *gradients], eager, truth, slack=slack)

    items = (W * B, "images")
    return Problem((), rivals, items=items, check=check, rotate=False, own_memory=False)


class _Ranks:
    """A pool of ranks that starts at its first call."""

    def __init__(
        self, start: Callable[[], RankPool], name: str, pools: dict[str, RankPool]
    ) -> None:
        self.start, self.name, self.pools = start, name, pools

    def __call__(self) -> Tensor:
        if self.name not in self.pools:
            self.pools[self.name] = self.start()
        return self.pools[self.name].step()
