"""The gate: nothing is timed before it is found right.

Value and gradients of every rival are compared with the truth in float64, and the yardstick is the
reference in the same dtype: ours may err at most twice as much as that, the others ten times, which
is still the same loss.  Wrong means no time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastssl.bench.registry import OURS, REFERENCE, Absent, Problem, Rival, outputs

SLACK_OURS, SLACK_OTHERS = 2.0, 10.0


def step(rival: Rival, inputs: Sequence[Tensor]) -> list[Tensor]:
    """One whole call: what the rival returns, then the gradient of its sum to each input asking."""
    made = outputs(rival(*inputs))
    wanted = [x for x in inputs if x.requires_grad]
    if not wanted:
        return [x.detach() for x in made]
    (value,) = made
    return [value.detach(), *torch.autograd.grad(value.sum(), wanted)]


def why_wrong(
    actual: Sequence[Tensor], eager: Sequence[Tensor], truth: Sequence[Tensor], *, slack: float
) -> str:
    """How `actual`, [value, gradients ...], misses the truth in a few words; "" when it does not.

    Each may be off by slack * max|eager - truth| + 4 eps max|truth|, eps that of its own dtype.
    Tensors that are not of a floating dtype must be equal.
    """
    if len(actual) != len(truth):
        return f"{len(actual)} tensors came out, not {len(truth)}"
    for i, (a, e, t) in enumerate(zip(actual, eager, truth, strict=True)):
        what = f"gradient {i}" if i else "value"
        if a.shape != t.shape:
            return f"{what} has shape {tuple(a.shape)}, not {tuple(t.shape)}"
        if not a.is_floating_point():
            if not torch.equal(a, t):
                return f"{what} differs in {int((a != t).sum())} of {a.numel()} places"
            continue
        if not torch.isfinite(a).all():
            return f"{what} is not finite"
        error, par = (float((x.double() - t).abs().amax()) if t.numel() else 0.0 for x in (a, e))
        largest = float(t.abs().amax()) if t.numel() else 0.0
        bound = slack * par + 4 * torch.finfo(a.dtype).eps * largest
        if error > bound:
            return f"{what} is off by {error:.1e}, allowed {bound:.1e}"
    return ""


def judge(problem: Problem) -> dict[str, Callable[[], str]]:
    """For each rival that is there, a function that calls it once and says why it is wrong, or "".

    What a rival raises goes through: it has failed, which is not the same as being wrong.
    """
    check = problem.check or _triangle(problem)
    return {
        name: lambda name=name, rival=rival: check(name, step(rival, problem.inputs))
        for name, rival in problem.rivals.items()
        if not isinstance(rival, Absent)
    }


def _triangle(problem: Problem) -> Callable[[str, Sequence[Tensor]], str]:
    """The check against the reference, in the dtype measured and in float64."""
    reference = problem.rivals.get(REFERENCE)
    if reference is None or isinstance(reference, Absent):
        raise ValueError(f"a problem without `check` needs a rival called {REFERENCE!r}")
    truth = _truth(problem, reference)
    eager = step(reference, problem.inputs)

    def check(name: str, made: Sequence[Tensor]) -> str:
        slack = SLACK_OURS if name.startswith(OURS) else SLACK_OTHERS
        return why_wrong(made, eager, truth, slack=slack)

    return check


def glance(outputs: Sequence[Tensor], reference: Sequence[Tensor] | None) -> str:
    """Why outputs at a shape too large for float64 cannot be right; "" when nothing shows.

    They must be finite, and where the reference got through, each row must be the reference's to
    eight times the root of the precision of the coarser dtype of the two.  As a share of the row,
    or of a usual one where the row is shorter: the reference itself is rounded.
    """
    for i, x in enumerate(outputs):
        what = f"gradient {i}" if i else "value"
        if not x.is_floating_point():
            continue
        if not torch.isfinite(x).all():
            return f"{what} is not finite at this shape"
        if reference is None or (i and x.numel() == 1):  # a scale's gradient cancels
            continue
        mine, theirs = (torch.atleast_1d(y.float()) for y in (x, reference[i]))
        eps = max(torch.finfo(y.dtype).eps for y in (x, reference[i]))
        norms = theirs.norm(dim=-1)
        usual = norms.square().mean().sqrt()
        off = (mine - theirs).norm(dim=-1) / norms.maximum(usual).clamp_min(1e-30)
        if float(off.amax()) > 8 * math.sqrt(eps):
            at = tuple(int(n) for n in torch.unravel_index(off.argmax(), off.shape))
            where = f" in row {', '.join(map(str, at))}" if at else ""
            share = float(off.amax())
            return f"{what} is {share:.2g} of the reference's away from it{where} at this shape"
    return ""


def _truth(problem: Problem, reference: Rival) -> list[Tensor]:
    if problem.truth is not None:
        return outputs(problem.truth())
    return step(reference, tuple(map(_double, problem.inputs)))


def _double(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        return x
    return x.detach().double().requires_grad_(x.requires_grad)
