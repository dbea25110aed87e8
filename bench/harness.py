"""Times rivals on one problem, once each has been found right.

A case lists what computes the same loss; "reference" is the formula as written.  Before any clock
starts, every rival's value and gradients are compared with the reference in float64.  "fastssl"
may err at most twice as much as the reference does in the same dtype; the others ten times, which
is still the same loss.  One that is wrong gets no time.  The rest take turns, round after round, so
that a slow minute of the machine falls on all of them alike.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import quantiles

import torch
from torch import Tensor

OURS = "fastssl"
Rival = Callable[..., Tensor]
Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One problem: `make(shape, dtype, device)` gives the arguments every rival is called with."""

    name: str
    shape: dict[str, int]
    make: Callable[[dict[str, int], torch.dtype, torch.device], Inputs]
    rivals: dict[str, Rival]  # "reference" is among them


@dataclass(frozen=True)
class Timing:
    """What one rival did on one case; times of forward + backward in milliseconds."""

    case: str
    shape: dict[str, int]
    dtype: str
    rival: str
    wrong: str = ""  # why the gate is red, and then there is no time
    times_ms: list[float] = field(default_factory=list)
    peak_mib: float | None = None  # what a step allocates on top of its inputs; CUDA only

    def percentiles(self) -> tuple[float, float, float]:
        """p20, p50 and p80 of the times."""
        tenths = quantiles(self.times_ms, n=10, method="inclusive")
        return tenths[1], tenths[4], tenths[7]


def run_case(
    case: Case, dtype: torch.dtype, device: torch.device, *, budget_s: float
) -> list[Timing]:
    """Check, then time, every rival of `case`: at least 5 rounds, more while `budget_s` lasts."""
    torch.manual_seed(0)
    inputs = case.make(case.shape, dtype, device)
    truth = _step(case.rivals["reference"], tuple(map(_double, inputs)))
    eager = _step(case.rivals["reference"], inputs)
    wrong = {
        name: why_wrong(_step(rival, inputs), eager, truth, slack=2 if name == OURS else 10)
        for name, rival in case.rivals.items()
    }
    right = {name: rival for name, rival in case.rivals.items() if not wrong[name]}
    times = _take_turns(right, inputs, device, budget_s)
    return [
        Timing(
            case=case.name,
            shape=case.shape,
            dtype=str(dtype).removeprefix("torch."),
            rival=name,
            wrong=wrong[name],
            times_ms=times.get(name, []),
            peak_mib=_peak_mib(rival, inputs, device) if name in right else None,
        )
        for name, rival in case.rivals.items()
    ]


def why_wrong(
    actual: list[Tensor], eager: list[Tensor], truth: list[Tensor], *, slack: float
) -> str:
    """How `actual`, [value, gradients ...], misses the truth in a few words; "" when it does not.

    Each may be off by slack * max|eager - truth| + 4 eps max|truth|, eps that of its own dtype.
    """
    for i, (a, e, t) in enumerate(zip(actual, eager, truth, strict=True)):
        what = f"gradient {i}" if i else "value"
        if a.shape != t.shape:
            return f"{what} has shape {tuple(a.shape)}, not {tuple(t.shape)}"
        if not torch.isfinite(a).all():
            return f"{what} is not finite"
        error, par = (float((x.double() - t).abs().max()) for x in (a, e))
        bound = slack * par + 4 * torch.finfo(a.dtype).eps * float(t.abs().max())
        if error > bound:
            return f"{what} is off by {error:.1e}, allowed {bound:.1e}"
    return ""


def _step(rival: Rival, inputs: Inputs) -> list[Tensor]:
    """The value and its gradients with respect to the inputs that ask for one."""
    value = rival(*inputs)
    return [value.detach(), *torch.autograd.grad(value, [x for x in inputs if x.requires_grad])]


def _double(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        return x
    return x.detach().double().requires_grad_(x.requires_grad)


def _take_turns(
    rivals: dict[str, Rival], inputs: Inputs, device: torch.device, budget_s: float
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in rivals}
    order = list(rivals)
    end = time.perf_counter() + budget_s
    rounds = -1  # the first round warms up
    while order and (rounds < 5 or time.perf_counter() < end) and rounds < 200:
        for name in order:
            _wait(device)
            start = time.perf_counter()
            _step(rivals[name], inputs)
            _wait(device)
            if rounds >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
        order = order[1:] + order[:1]  # nobody always follows the same one
        rounds += 1
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_mib(rival: Rival, inputs: Inputs, device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    _step(rival, inputs)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20
