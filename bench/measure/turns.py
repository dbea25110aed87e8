"""Times rivals on one problem: in turns, on inputs that are not in the cache, against their noise.

Rivals take turns, round after round, each round in another order, so that a slow minute of the
machine falls on all alike.  Ours runs twice a round: how far it is from itself is the noise, and a
rival nearer to ours than that is a tie.  Every call gets other copies of the inputs, as many as
fill the last-level cache twice.  CUDA events on a GPU, perf_counter elsewhere.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor

from fastssl.bench.record import Spread
from fastssl.bench.registry import OURS, Problem, Rival, outputs

AGAIN = OURS + " again"  # ours a second time, in the same rounds
MOST_COPIES, MOST_COPY_BYTES = 64, 1 << 30
MOST_ROUNDS = 500
LONG_S = 10  # of a round
Times = dict[str, list[float]]  # by pass, milliseconds, one for each round


class RivalFailed(Exception):
    """What a rival raised while it was timed, and which one it was."""

    def __init__(self, name: str, error: Exception) -> None:
        super().__init__(f"{name}: {error}")
        self.name, self.error = name, error


@dataclass
class Clock:
    """Marks on the device's own time line: `mark()` as often as needed, then `spans()`."""

    device: torch.device
    marks: list = field(default_factory=list)

    def mark(self) -> None:
        """Note the moment at which everything launched so far is done."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def spans(self) -> list[float]:
        """Milliseconds between the marks; waits for the last one."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if self.device.type == "cuda":
            self.marks[-1].synchronize()
            return [a.elapsed_time(b) for a, b in pairs]
        return [1e3 * (b - a) for a, b in pairs]


def wait(device: torch.device) -> None:
    """Until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed_call(rival: Rival, inputs: Sequence[Tensor], device: torch.device) -> dict[str, float]:
    """One call: fwd, bwd and step in milliseconds, or run when nothing asks for a gradient.

    On a GPU also `enqueue`: until the processor had launched it all, in its own milliseconds.
    """
    wanted = [x for x in inputs if x.requires_grad]
    clock = Clock(device)
    wait(device)
    begun = time.perf_counter()
    clock.mark()
    made = outputs(rival(*inputs))
    clock.mark()
    if wanted:
        gradients = torch.autograd.grad(made[0].sum(), wanted)
        clock.mark()
        del gradients
    enqueued = 1e3 * (time.perf_counter() - begun)
    del made
    spans = clock.spans()
    launched = {"enqueue": enqueued} if device.type == "cuda" else {}
    if not wanted:
        return {"run": spans[0], **launched}
    fwd, bwd = spans
    return {"fwd": fwd, "bwd": bwd, "step": fwd + bwd, **launched}


def take_turns(
    rivals: Mapping[str, Rival],
    problem: Problem,
    device: torch.device,
    *,
    budget_s: float,
    least_rounds: int = 7,
) -> dict[str, Times]:
    """Times of every rival, one for each round, after a round that warms up.

    At least `least_rounds` rounds, or three of more than LONG_S each, and more while `budget_s`
    lasts.  Ours, when it is among the rivals,
    is there a second time as AGAIN.  Raises RivalFailed with what one of them raised.
    """
    entrants = dict(rivals)
    if OURS in entrants:
        entrants[AGAIN] = entrants[OURS]
    times: dict[str, Times] = {name: {} for name in entrants}
    fresh = cycle(copies(problem, device))
    order, start, end, rounds = list(entrants), 0.0, math.inf, -1
    while order and rounds < MOST_ROUNDS and (rounds < least_rounds or time.perf_counter() < end):
        for name in order:
            try:
                spent = timed_call(entrants[name], next(fresh), device)
            except Exception as error:
                raise RivalFailed(name.removesuffix(" again"), error) from error
            for part, ms in spent.items():
                if rounds >= 0:
                    times[name].setdefault(part, []).append(ms)
        if rounds < 0:
            start = time.perf_counter()
            end = start + budget_s
        elif rounds == 0 and time.perf_counter() - start > LONG_S:
            least_rounds = min(least_rounds, 3)
        order = _next_order(order, rounds)
        rounds += 1
    return times


def _next_order(order: list[str], rounds: int) -> list[str]:
    """Rotated by one, and every other time reversed: nobody always follows the same one."""
    rotated = order[1:] + order[:1]
    return rotated[::-1] if rounds % 2 else rotated


def copies(problem: Problem, device: torch.device) -> list[tuple[Tensor, ...]]:
    """The inputs and as many copies of them as fill the last-level cache twice (64 at most)."""
    size = sum(x.numel() * x.element_size() for x in problem.inputs)
    if not problem.rotate or not size:
        return [problem.inputs]
    wanted = math.ceil(2 * cache_bytes(device) / size)
    count = max(1, min(wanted, MOST_COPIES, MOST_COPY_BYTES // size))
    return [problem.inputs, *(_copy(problem.inputs) for _ in range(count - 1))]


def _copy(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Tensors that are one another stay one another: a rival may use `q is k`."""
    made: dict[int, Tensor] = {}
    for x in inputs:
        if id(x) not in made:
            made[id(x)] = x.detach().clone().requires_grad_(x.requires_grad)
    return tuple(made[id(x)] for x in inputs)


def cache_bytes(device: torch.device) -> int:
    """The last-level cache: the GPU's, or the processor's as Linux tells it (else 32 MiB)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return max(_linux_caches(), default=32 << 20)


def _linux_caches() -> Iterator[int]:
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        yield int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]]


def spread(ms: Sequence[float]) -> Spread:
    """The 20th, 50th and 80th percentile.

    >>> spread([float(t) for t in range(101)])
    Spread(p20=20.0, p50=50.0, p80=80.0)
    """
    if len(ms) == 1:
        return Spread(ms[0], ms[0], ms[0])
    tenths = quantiles(ms, n=10, method="inclusive")
    return Spread(tenths[1], tenths[4], tenths[7])


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> tuple[float, float, float]:
    """Median over rounds of theirs / ours, and the ends of a 95 % interval for that median.

    The interval stands on ranks alone (the sign test): with n rounds its ends are the order
    statistics n/2 -+ 0.98 sqrt(n), rounded outward; nothing is assumed of how times are spread.
    """
    sides = sorted(a / b for a, b in zip(theirs, ours, strict=True))
    n = len(sides)
    low = max(0, math.floor(n / 2 - 0.98 * math.sqrt(n)))
    high = min(n - 1, math.ceil(n / 2 + 0.98 * math.sqrt(n)) - 1)
    return median(sides), sides[low], sides[high]


def noise(times: Mapping[str, Times], part: str) -> float | None:
    """How far ours is from itself, as a share of its time; None when it did not run twice.

    The median over rounds of its second run over its first, as a distance from 1, and twice the
    standard error of that median (from the median absolute deviation, on logarithms).
    """
    if AGAIN not in times:
        return None
    sides = [math.log(a / b) for a, b in zip(times[AGAIN][part], times[OURS][part], strict=True)]
    middle = median(sides)
    deviation = 1.4826 * median(abs(side - middle) for side in sides)
    return abs(middle) + 2 * 1.2533 * deviation / math.sqrt(len(sides))


def peak_on_gpu(call: Callable[[], object], device: torch.device) -> int:
    """Bytes the CUDA allocator held at most during a call, beyond what it held before."""
    wait(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    wait(device)
    return torch.cuda.max_memory_allocated(device) - before
