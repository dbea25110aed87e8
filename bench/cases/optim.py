"""One optimizer step on the parameters of a vision transformer of width W and depth L.

Parameters and gradients are float32.  Weights decay and adapt; norms, biases, the class token and
positions do neither.  Every call steps further with the gradients it is given, so the gate computes
as many steps in float64 as the rival has taken.  Least bytes: parameters, gradients and state read,
parameters and state written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.bench.cases.rivals import Late, Rivals, has_packages, library
from fastssl.bench.measure.gate import SLACK_OTHERS, SLACK_OURS, why_wrong
from fastssl.bench.registry import OURS, REFERENCE, Absent, Problem, Rival, Shape, case, shapes_of

_LR, _DECAY, _MOMENTUM, _TRUST, _BETAS, _EPS = 0.1, 0.1, 0.9, 0.02, (0.9, 0.95), 1e-8
_APEX = "build apex from NVIDIA's source (the one on PyPI is another)"
_register = partial(
    case,
    shapes=shapes_of(
        "W L", quick=[(96, 4)], cpu=[(384, 12)], cuda=[(384, 12), (768, 12), (1024, 24)]
    ),
    dtypes=("float32",),
    gate_shape={"W": 64, "L": 2},
)


def _sizes(width: int, depth: int) -> dict[str, tuple[int, ...]]:
    """Parameters by name of a ViT of 16-pixel patches at 224 pixels, without a classifier."""
    W = width
    sizes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, W),
        "pos_embed": (1, 197, W),
        "patch_weight": (W, 3, 16, 16),
        "patch_bias": (W,),
        "norm_weight": (W,),
        "norm_bias": (W,),
    }
    for i in range(depth):
        products = {"qkv": (3 * W, W), "proj": (W, W), "fc1": (4 * W, W), "fc2": (W, 4 * W)}
        for name, size in products.items():
            sizes |= {f"{i}_{name}_weight": size, f"{i}_{name}_bias": size[:1]}
        for norm in ("norm1", "norm2"):
            sizes |= {f"{i}_{norm}_weight": (W,), f"{i}_{norm}_bias": (W,)}
    return sizes


def _plain(name: str) -> bool:
    """Whether a parameter neither decays nor adapts."""
    return name in ("cls_token", "pos_embed") or not name.endswith("weight") or "norm" in name


class _Stepped:
    """A model's parameters under an optimizer; a call sets their gradients and steps.

    make(model) -> the optimizer.  It returns the parameters, and counts its steps.
    """

    def __init__(self, start: dict[str, Tensor], make: Callable[[nn.Module], Any]) -> None:
        self.model = nn.Module()
        for name, x in start.items():
            self.model.register_parameter(name, nn.Parameter(x.clone()))
        self.optimizer, self.steps = make(self.model), 0

    def __call__(self, *grads: Tensor) -> list[Tensor]:
        params: list[Tensor] = list(self.model.parameters())
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        self.optimizer.step()
        self.steps += 1
        return params


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """The parameters that decay and adapt, and those that do neither."""
    named = list(model.named_parameters())
    return [
        {"params": [p for name, p in named if not _plain(name)], "weight_decay": _DECAY},
        {"params": [p for name, p in named if _plain(name)], "weight_decay": 0.0},
    ]


Rule = Callable[[Tensor, Tensor, list[Tensor], int, bool], tuple[Tensor, list[Tensor]]]


class _AsWritten:
    """`rule` for one parameter after another: (w, g, state, step, adapts) -> w, state."""

    def __init__(self, rule: Rule, start: dict[str, Tensor]) -> None:
        self.rule, self.params, self.steps = rule, dict(start), 0
        self.state: dict[str, list[Tensor]] = {
            name: [torch.zeros_like(w), torch.zeros_like(w)] for name, w in start.items()
        }

    def __call__(self, *grads: Tensor) -> list[Tensor]:
        self.steps += 1
        for (name, w), grad in zip(list(self.params.items()), grads, strict=True):
            new = self.rule(w, grad, self.state[name], self.steps, not _plain(name))
            self.params[name], self.state[name] = new
        return list(self.params.values())


def _ratio(top: Tensor, bottom: Tensor, whole: Tensor) -> Tensor:
    """top / bottom, and 1 where a norm is 0."""
    return torch.where((top > 0) & (bottom > 0), whole, torch.ones_like(whole))


def lars_rule(w: Tensor, g: Tensor, state: list[Tensor], step: int, adapts: bool):
    """You et al. 2017, arXiv:1708.03888: momentum on the gradient brought to its layer's scale."""
    decay = _DECAY if adapts else 0.0
    update = g + decay * w
    if adapts:
        size, slope = w.norm(), g.norm()
        update = update * _ratio(size, slope, _TRUST * size / (slope + decay * size + _EPS))
    momentum = _MOMENTUM * state[0] + update
    return w - _LR * momentum, [momentum]


def _adam(w: Tensor, g: Tensor, state: list[Tensor], step: int, decay: float):
    """Adam's update with decoupled decay, and its two averages."""
    b1, b2 = _BETAS
    m, v = b1 * state[0] + (1 - b1) * g, b2 * state[1] + (1 - b2) * g * g
    update = (m / (1 - b1**step)) / ((v / (1 - b2**step)).sqrt() + _EPS)
    return update + decay * w, [m, v]


def lamb_rule(w: Tensor, g: Tensor, state: list[Tensor], step: int, adapts: bool):
    """You et al. 2020, arXiv:1904.00962, algorithm 2, phi the identity."""
    update, state = _adam(w, g, state, step, _DECAY if adapts else 0.0)
    if adapts:
        size, length = w.norm(), update.norm()
        update = update * _ratio(size, length, size / length)
    return w - _LR * update, state


def adamw_rule(w: Tensor, g: Tensor, state: list[Tensor], step: int, adapts: bool):
    """Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2."""
    update, state = _adam(w, g, state, step, _DECAY if adapts else 0.0)
    return w - _LR * update, state


@dataclass(frozen=True)
class _Step:
    """An optimizer's step: its rule, what it costs an element in flops, tensors of state it keeps.

    rivals: by name, (module, what makes the optimizer from the module and parameter groups[,
    remedy where the module is not installed]).
    """

    rule: Rule
    flops: int
    state: int
    ours: dict[str, Any]  # of OptimConfig
    rivals: dict[str, tuple]


def _problem(shape: Shape, device: torch.device, step: _Step) -> Problem:
    sizes = _sizes(shape["W"], shape["L"])
    start = {name: 0.1 * torch.randn(size, device=device) for name, size in sizes.items()}
    grads = tuple(0.01 * torch.randn(size, device=device) for size in sizes.values())
    rivals: Rivals = {OURS: Absent("pip install 'fastssl-torch[train]'")}
    if has_packages("timm", "pydantic"):
        rivals[OURS] = Late(lambda: _Stepped(start, partial(_ours, step.ours)))
    rivals[REFERENCE] = Late(lambda: _AsWritten(step.rule, start))
    for name, (module, build, *remedy) in step.rivals.items():
        rival = library(module, partial(_theirs, start, build))
        rivals[name] = Absent(*remedy) if remedy and isinstance(rival, Absent) else rival
    count = sum(g.numel() for g in grads)
    return Problem(
        inputs=grads,
        rivals=rivals,
        flops={"run": float(step.flops * count)},
        bytes_moved={"run": 4.0 * count * (3 + 2 * step.state)},
        items=(count, "parameters"),
        check=_same_steps(step.rule, start, grads, rivals),
    )


def _ours(options: dict[str, Any], model: nn.Module) -> Any:
    """The optimizer as the engine builds it."""
    from fastssl.engine.optim import OptimConfig, build_optimizer

    return build_optimizer(model, OptimConfig(lr=_LR, weight_decay=_DECAY, **options))


def _theirs(start: dict[str, Tensor], build: Callable[[Any, list], Any], module: Any) -> Rival:
    return _Stepped(start, lambda model: build(module, _groups(model)))


def _same_steps(
    rule: Rule, start: dict[str, Tensor], grads: Sequence[Tensor], rivals: Rivals
) -> Callable[[str, Sequence[Tensor]], str]:
    """The check: parameters after the steps taken, against the formula in float32 and float64."""

    @cache
    def after(steps: int, dtype: torch.dtype) -> list[Tensor]:
        written = _AsWritten(rule, {name: w.to(dtype) for name, w in start.items()})
        wide = [g.to(dtype) for g in grads]
        return [written(*wide) for _ in range(steps)][-1]

    def check(name: str, outputs: Sequence[Tensor]) -> str:
        late: Any = rivals[name]
        steps, slack = late.rival.steps, SLACK_OURS if name == OURS else SLACK_OTHERS
        eager, truth = after(steps, torch.float32), after(steps, torch.float64)
        names = zip(start, outputs, eager, truth, strict=True)
        wrong = ((w, why_wrong([a], [e], [t], slack=slack)) for w, a, e, t in names)
        return next((f"{w}: {why}" for w, why in wrong if why), "")

    return check


@_register("optim-lars", test="tests/engine/test_layerwise.py")
def lars(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """A step of LARS.

    Flops an element: 4 for the two norms, 2 to decay, 1 for the ratio, 2 for the momentum, 2 for
    the step.
    """
    own: dict[str, Any] = {"momentum": _MOMENTUM, "eps": _EPS}
    rivals = {
        "timm": ("timm.optim", lambda m, g: m.Lars(g, _LR, trust_coeff=_TRUST, **own)),
        "lightly": (
            "lightly.utils.lars",
            lambda m, g: m.LARS(g, _LR, trust_coefficient=_TRUST, **own),
        ),
    }
    ours = {"name": "lars", "trust_coefficient": _TRUST, **own}
    return _problem(shape, device, _Step(lars_rule, 11, 1, ours, rivals))


@_register("optim-lamb", test="tests/engine/test_layerwise.py")
def lamb(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """A step of LAMB.

    Flops an element: those of AdamW, 4 for the two norms and 1 for the ratio.
    """
    own: dict[str, Any] = {"betas": _BETAS, "eps": _EPS}
    rivals = {
        "timm": ("timm.optim", lambda m, g: m.Lamb(g, _LR, max_grad_norm=None, **own)),
        "apex": (
            "apex.optimizers",
            lambda m, g: m.FusedLAMB(g, _LR, max_grad_norm=1e30, **own),
            _APEX,
        ),
    }
    return _problem(shape, device, _Step(lamb_rule, 21, 2, {"name": "lamb", **own}, rivals))


@_register("optim-adamw", test="tests/engine/test_optim.py")
def adamw(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """A step of AdamW; ours is torch's, as the engine builds it.

    Flops an element: 3 and 4 for the two averages, 2 to correct them, 3 for root, sum and ratio, 2
    to decay, 2 for the step.
    """
    own: dict[str, Any] = {"betas": _BETAS, "eps": _EPS}
    rivals = {
        "torch foreach": ("torch.optim", lambda m, g: m.AdamW(g, _LR, foreach=True, **own)),
        "torch fused": ("torch.optim", lambda m, g: m.AdamW(g, _LR, fused=True, **own)),
        "timm": ("timm.optim", lambda m, g: m.AdamWLegacy(g, _LR, **own)),
        "apex": ("apex.optimizers", lambda m, g: m.FusedAdam(g, _LR, **own), _APEX),
    }
    return _problem(shape, device, _Step(adamw_rule, 16, 2, {"name": "adamw", **own}, rivals))
