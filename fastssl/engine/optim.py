"""Optimizers by name, with correct weight-decay groups.

    build_optimizer(model, OptimConfig(name="lars", lr=0.3, weight_decay=1e-6))

Names are those of timm.optim ("adamw" is torch's AdamW, "sgd" has Nesterov momentum, "momentum"
has not), but for "lars" and "lamb", which are ours: right under every ZeRO stage.
"""

import difflib
import inspect
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from fastssl.schedules.config import CosineSchedule, Moves, Moving, Schedule, Within, at

from .groups import GroupConfig, parameter_groups
from .layerwise import LAMB, LARS, bind_fragments

# Those that treat every element alike, so that slices of tensors change nothing.  Not here:
# norms or means of a tensor (muon, adafactor, novograd, the cautious "c..." ones, timm's LARS
# family), a projection (adamp, sgdp), and adagrad, which DeepSpeed rebuilds without its groups.
ELEMENTWISE = frozenset(
    "adabelief adadelta adam adamax adamc adamw adamwlegacy adan adanw adopt adoptc adoptw "
    "fusedadam fusedadamw fusedsgd laprop lapropc lion lionc madgrad madgradw momentum nadam "
    "nadamc nadamlegacy nadamw nesterov nesterovw radabelief radam radamlegacy radamw rmsprop "
    "rmsproptf rmsproptfc rmsproptfw sgd sgdc sgdw".split()
)
_OURS = {"lars": ("momentum", "eps", "trust_coefficient"), "lamb": ("betas", "eps")}


class OptimConfig(Moves):
    """How parameters are updated.  An option left null is the optimizer's own default."""

    name: str = Field(
        default="adamw", description="lars, lamb, or a name of timm.optim (adamw, sgd ...)."
    )
    lr: float = Field(
        default=1e-3, gt=0, description="Peak learning rate, for the whole batch size."
    )
    lr_batch: int | None = Field(
        default=None, ge=1, description="Batch size that lr was chosen for: another one is said."
    )
    weight_decay: Annotated[Moving, Within(0)] = Field(
        default=0.05, description="Not applied to biases, norms, tokens and position embeddings."
    )
    layer_decay: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="A layer of the encoder learns by so much less than the one above it.",
    )
    betas: tuple[float, ...] | None = Field(
        default=None, description="Averaging rates (Adam's kind)."
    )
    momentum: float | None = Field(default=None, ge=0, lt=1, description="Momentum (SGD's kind).")
    eps: float | None = Field(default=None, ge=0, description="Added to a denominator.")
    trust_coefficient: float | None = Field(
        default=None,
        gt=0,
        description="lars: a layer's step relative to its norm, 0.001 by default.",
    )
    implementation: Literal["auto", "torch", "apex", "deepspeed"] = Field(
        default="auto",
        description="Whose code steps: auto is torch's, fused where it has that (adam, adamw, sgd, "
        "momentum); of adam and adamw also apex's FusedAdam, DeepSpeed's FusedAdam on CUDA and its "
        "CPUAdam elsewhere.",
    )
    clip: float = Field(
        default=0.0, ge=0, description="Gradients' norm is clipped to this; 0: never."
    )
    clip_each: float = Field(
        default=0.0, ge=0, description="Each parameter's gradient norm, before clip; 0: never."
    )
    groups: tuple[GroupConfig, ...] = Field(
        default=(), description="Parameters with rates, decay or clipping of their own, by name."
    )
    schedule: Schedule = CosineSchedule(warmup=0.1)

    @model_validator(mode="after")
    def _options_fit_the_name(self) -> "OptimConfig":
        options = self.options()
        if self.name in ELEMENTWISE and not options:
            return self  # spares every importer of the run's schema the import of timm
        takes = _options(self.name)
        for option, value in options.items():
            if option not in takes:
                raise ValueError(
                    f"optim.{option}={value} means nothing to {self.name}, which takes "
                    f"{', '.join(takes) or 'no such option'}"
                )
        if self.betas is not None and len(self.betas) != self._beta_count():
            raise ValueError(
                f"optim.betas of {self.name} are {self._beta_count()} numbers, got {self.betas}"
            )
        if not all(0 <= beta < 1 for beta in self.betas or ()):
            raise ValueError(f"optim.betas must lie in [0, 1), got {self.betas}")
        return self

    @model_validator(mode="after")
    def _somebody_implements_it(self) -> "OptimConfig":
        if self.implementation in ("apex", "deepspeed") and self.name not in ("adam", "adamw"):
            raise ValueError(
                f"optim.implementation={self.implementation} is for adam and adamw, and optim.name "
                f"is {self.name}: auto or torch"
            )
        return self

    @model_validator(mode="after")
    def _rates_are_not_negative(self) -> "OptimConfig":
        if not self.schedule.counts_steps:
            for hundredth in range(101):
                if (factor := self.schedule.at(hundredth / 100)) < 0:
                    raise ValueError(
                        f"optim.schedule={self.schedule.name} is {factor:g} at {hundredth} % of "
                        "the run, and a learning rate may not be negative"
                    )
        return self

    def _beta_count(self) -> int:
        return 2 if self.name in _OURS else _timm().get_optimizer_info(self.name).num_betas

    def set_rates(self, groups: list[dict[str, Any]], lr: float, progress: float) -> None:
        """Give parameter groups their learning rates, and their decay at `progress` of the run."""
        decay = at(self.weight_decay, progress)
        for group in groups:
            group["lr"] = lr * group["lr_scale"]
            own = group["decay_by"]
            if own is not None:
                group["weight_decay"] = at(self.groups[own].weight_decay or 0.0, progress)
            elif group["adapt"]:
                group["weight_decay"] = decay

    def options(self) -> dict[str, Any]:
        """The options that were set, as keyword arguments of the optimizer."""
        names = ("betas", "momentum", "eps", "trust_coefficient")
        return {n: getattr(self, n) for n in names if getattr(self, n) is not None}


def check_optimizer(name: str, zero_stage: int) -> None:
    """Raise ValueError for an unknown name and for one that this ZeRO stage would make wrong.

    Stages 1-3 hand the optimizer flat slices instead of tensors, also on a single rank.  That is
    nothing to what works element by element, and lars and lamb are told where the tensors are.
    All others need stage 0: Muon would run as plain AdamW on the slices (DeepSpeed's own Muon
    fails at stage 3), timm's LARS family and the cautious optimizers would take norms and means
    of slices.

    >>> check_optimizer("adamw", 3)
    >>> check_optimizer("muon", 1)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: optim.name=muon needs whole tensors, and ZeRO stage 1 cuts them: ...
    """
    if name in ELEMENTWISE:
        return
    _options(name)
    if zero_stage > 0 and name not in _OURS:
        raise ValueError(
            f"optim.name={name} needs whole tensors, and ZeRO stage {zero_stage} cuts them: use "
            "engine.zero_stage=0, or an optimizer such as adamw, lion, sgd, lars or lamb"
        )


def build_optimizer(
    model: nn.Module,
    cfg: OptimConfig,
    *,
    device: torch.device | None = None,
    offloaded: bool = False,
) -> torch.optim.Optimizer:
    """The optimizer of `cfg` over `model`'s parameter groups, at its peak learning rate.

    device: where it will step, by default where the parameters are; offloaded: on the CPU.
    Under DeepSpeed call `after_initialize` as well, and set each group's lr before each step.
    Raises ValueError where the implementation asked for is not there.
    """
    groups = parameter_groups(model, cfg.weight_decay, cfg.layer_decay, cfg.groups)
    if cfg.name == "lars":
        return LARS(groups, cfg.lr, **cfg.options())
    if cfg.name == "lamb":
        return LAMB(groups, cfg.lr, **cfg.options())
    parameter: nn.Parameter = groups[0]["params"][0]
    device = device or parameter.device
    if cfg.implementation in ("apex", "deepspeed"):
        kind, extra = _implementation(cfg.implementation, cfg.name, device, offloaded)
        return kind(groups, lr=cfg.lr, **extra | cfg.options())
    made = _timm().get_optimizer_info(cfg.name).opt_class
    fuses = made.__module__.startswith("torch.") and device.type in ("cpu", "cuda")
    extra = {"fused": True} if fuses and "fused" in inspect.signature(made).parameters else {}
    return _timm().create_optimizer_v2(groups, cfg.name, lr=cfg.lr, **extra | cfg.options())


def implementation_of(optimizer: torch.optim.Optimizer) -> str:
    """Whose code it is, in a few words.

    >>> parameters = [torch.zeros(1, requires_grad=True)]
    >>> implementation_of(torch.optim.AdamW(parameters, fused=True))
    'AdamW of torch, fused'
    """
    whose = type(optimizer).__module__.partition(".")[0]
    fused = ", fused" if optimizer.defaults.get("fused") else ""
    return f"{type(optimizer).__name__} of {whose}{fused}"


def _implementation(
    whose: str, name: str, device: torch.device, offloaded: bool
) -> tuple[Any, dict[str, Any]]:
    """The class of apex or DeepSpeed for adam and adamw, and what makes it that.

    ValueError where it is not there, or cannot step on the device.
    """
    on_cpu = "DeepSpeedCPUAdam" if offloaded or device.type == "cpu" else "FusedAdam"
    module, kind = {
        "apex": ("apex.optimizers", "FusedAdam"),
        "deepspeed": ("deepspeed.ops.adam", on_cpu),
    }[whose]
    named = f"optim.implementation={whose}"
    if kind == "FusedAdam" and (offloaded or device.type != "cuda"):
        place = "an offloaded optimizer" if offloaded else f"device={device.type}"
        raise ValueError(f"{named} steps on CUDA alone, and this is {place}: auto or torch")
    try:
        found = getattr(import_module(module), kind)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{named} needs {module}.{kind}, which is not installed") from error
    decoupled = "adamw_mode" if kind == "DeepSpeedCPUAdam" else "adam_w_mode"
    # Their defaults are not torch's.
    return found, {decoupled: name == "adamw", "betas": (0.9, 0.999), "eps": 1e-8}


def after_initialize(ds_engine: Any) -> None:
    """Make a fresh DeepSpeed engine's optimizer step as it would without one; collective.

    Binds LARS and LAMB to their parameters.  In bf16 at stage 0 DeepSpeed has already stepped
    once on zero gradients, to allocate state: that decayed the float32 masters and counted as
    a step, so it is undone; and it would look at one gradient after another.
    """
    optimizer, wrapper = ds_engine.basic_optimizer, ds_engine.optimizer
    if ds_engine.zero_optimization_stage() == 0 and wrapper is not optimizer:
        optimizer.state.clear()
        for group in optimizer.param_groups:
            group.pop("step", None)
        wrapper.refresh_fp32_params()
        wrapper.overflow_checker.has_overflow_serial = _any_not_finite
    bind_fragments(ds_engine)


def _any_not_finite(params: Sequence[Any]) -> bool:
    """Whether a gradient has an infinity or a NaN: one wait, where DeepSpeed has one for each."""
    grads = [p.grad for p in params if p.grad is not None]
    if not grads:
        return False
    return not torch.stack(torch._foreach_norm(grads, float("inf"))).isfinite().all()


def _options(name: str) -> tuple[str, ...]:
    """Which of the options of OptimConfig `name` takes; ValueError when there is no such name."""
    if name in _OURS:
        return _OURS[name]
    known = _timm().list_optimizers()
    if name not in known:
        close = difflib.get_close_matches(name, [*_OURS, *known], n=1)
        hint = f"did you mean {close[0]}?" if close else "see timm.optim.list_optimizers()"
        raise ValueError(f"optim.name={name} is no optimizer of timm or fastssl; {hint}")
    info = _timm().get_optimizer_info(name)
    if info.second_order:
        raise ValueError(f"optim.name={name} needs second derivatives, which the engine has not")
    has = {"betas": info.has_betas, "momentum": info.has_momentum, "eps": info.has_eps}
    return tuple(option for option, given in has.items() if given)


def _timm() -> Any:
    import timm.optim  # takes seconds, and importing a config should not

    return timm.optim
