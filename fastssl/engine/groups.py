"""Which parameters are stepped alike: by kind, by layer, and by rules over their names.

    optim.groups:
    - {match: encoder.patch_embed.*, lr_scale: 0.2}
    - {match: "*.last_layer.*", freeze_epochs: 1}

A rule's pattern is met by a parameter's name in the method, and by `encoder.` with its name in the
encoder, wherever the method keeps that.  What a rule leaves null it says nothing of; where several
rules of one parameter give a key, the last of them holds.
"""

import difflib
import fnmatch
from typing import Annotated, Any, NamedTuple

from pydantic import Field, model_validator
from torch import nn

from fastssl.schedules.config import Moves, Moving, Within, at


class GroupConfig(Moves):
    """What some parameters have of their own."""

    match: str = Field(
        min_length=1,
        description="Of parameters' names, as encoder.blocks.*: * is any text, ? a character.",
    )
    lr_scale: float | None = Field(
        default=None, gt=0, description="Multiplies their learning rate, beside layer_decay."
    )
    weight_decay: Annotated[Moving, Within(0)] | None = Field(
        default=None, description="Theirs, for biases and norms among them as well."
    )
    freeze_epochs: float | None = Field(
        default=None, ge=0, description="They do not move in the first so many epochs."
    )
    clip: float | None = Field(
        default=None, ge=0, description="Their gradients' joint norm is clipped to this; 0: never."
    )

    @model_validator(mode="after")
    def _says_something(self) -> "GroupConfig":
        if not self.given:
            keys = ", ".join(name for name in type(self).model_fields if name != "match")
            raise ValueError(f"match={self.match!r} has nothing of its own: give one of {keys}")
        return self

    @property
    def given(self) -> list[str]:
        """The keys that it gives."""
        keys = (name for name in type(self).model_fields if name != "match")
        return [name for name in keys if getattr(self, name) is not None]


Rules = tuple[GroupConfig, ...]


class Own(NamedTuple):
    """What the rules give one parameter: of each key the rule's place, or None."""

    lr_scale: int | None = None
    weight_decay: int | None = None
    freeze_epochs: int | None = None
    clip: int | None = None


def own_rules(model: nn.Module, rules: Rules) -> dict[int, Own]:
    """What the rules give each trainable parameter, by its id().

    Raises ValueError for a rule that meets no parameter, none that is trained, or changes nothing.
    """
    names: dict[int, list[str]] = {id(p): [name] for name, p in model.named_parameters()}
    encoder = getattr(model, "encoder", None)
    for name, p in encoder.named_parameters() if isinstance(encoder, nn.Module) else ():
        names[id(p)].append(f"encoder.{name}")
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    found: dict[int, dict[str, int]] = {key: {} for key in names if key in trained}
    for place, rule in enumerate(rules):
        met = [key for key in names if any(_fits(rule, name) for name in names[key])]
        said = f"optim.groups.{place}.match={rule.match!r}"
        if not met:
            every = list(dict.fromkeys(name for both in names.values() for name in both))
            close = difflib.get_close_matches(rule.match, every, n=3, cutoff=0.0)
            raise ValueError(f"{said} meets no parameter; the closest names are {', '.join(close)}")
        if not trained & set(met):
            raise ValueError(f"{said} meets frozen parameters alone")
        for key in trained & set(met):
            found[key] |= dict.fromkeys(rule.given, place)
    for place, rule in enumerate(rules):
        if not any(place in own.values() for own in found.values()):
            raise ValueError(
                f"optim.groups.{place}.match={rule.match!r} changes nothing: later rules give all "
                "that it gives"
            )
    return {key: Own(**own) for key, own in found.items()}


def _fits(rule: GroupConfig, name: str) -> bool:
    return fnmatch.fnmatchcase(name, rule.match)


def parameter_groups(
    model: nn.Module, weight_decay: Moving, layer_decay: float = 1.0, rules: Rules = ()
) -> list[dict[str, Any]]:
    """Groups for an optimizer: parameters that decay, and those that neither decay nor adapt.

    The latter are biases and all of one dimension (norms), cls, mask and register tokens, position
    embeddings, and what a submodule's `no_weight_decay()` names (timm's convention; wildcards
    allowed).  layer_decay: below 1, two groups for each layer of model.encoder, as timm counts
    them, with `lr_scale` layer_decay ** (layers above it); what is not the encoder's has scale 1.
    rules: give groups of their own, with their lr_scale on top of that, the place of the rule that
    sets their weight decay as `decay_by`, and the epochs that they are `frozen_for`.
    `adapt` is read by LARS and LAMB.  Frozen parameters are in no group and an empty group is left
    out, as DeepSpeed asks.  Raises ValueError when nothing is trainable, for layer_decay with an
    encoder whose layers timm does not know, and as `own_rules` does.
    """
    spared = []
    for prefix, module in model.named_modules():
        names = getattr(module, "no_weight_decay", None)
        if callable(names):
            spared += [f"{prefix}.{name}" if prefix else name for name in names()]  # type: ignore
    scales = _layer_scales(model, layer_decay) if layer_decay < 1 else {}
    owns = own_rules(model, rules)
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        own, adapts = owns[id(param)], not _is_plain(name, param, spared)
        scale, frozen, decay = scales.get(id(param), 1.0), 0.0, weight_decay if adapts else 0.0
        if own.lr_scale is not None:
            scale *= rules[own.lr_scale].lr_scale or 1.0
        if own.freeze_epochs is not None:
            frozen = rules[own.freeze_epochs].freeze_epochs or 0.0
        if own.weight_decay is not None:
            decay = rules[own.weight_decay].weight_decay or 0.0
        key = (-scale, not adapts, -1 if own.weight_decay is None else own.weight_decay, frozen)
        group = groups.setdefault(
            key, {"weight_decay": at(decay, 0.0), "adapt": adapts, "params": []}
        )
        group["params"].append(param)
        group |= {"lr_scale": scale, "decay_by": own.weight_decay, "frozen_for": frozen}
    if not groups:
        raise ValueError(f"{type(model).__name__} has no trainable parameter")
    return [groups[key] for key in sorted(groups)]


def _layer_scales(model: Any, layer_decay: float) -> dict[int, float]:
    """The scale of each parameter of the trained networks, by its id()."""
    networks = model.networks() if hasattr(model, "networks") else {"encoder": model.encoder}
    scales: dict[int, float] = {}
    for encoder in networks.values():
        if any(param.requires_grad for param in encoder.parameters()):
            scales |= _scales_of(encoder, layer_decay)
    return scales


def _scales_of(encoder: nn.Module, layer_decay: float) -> dict[int, float]:
    from timm.models import group_parameters

    if not hasattr(encoder, "group_matcher"):
        raise ValueError(
            f"optim.layer_decay={layer_decay} wants an encoder whose layers timm knows "
            f"(group_matcher), which {type(encoder).__name__} is not"
        )
    matcher = encoder.group_matcher(coarse=False)  # type: ignore[operator]
    layers: Any = group_parameters(encoder, matcher, reverse=True)
    last = max(layers.values())
    named = dict(encoder.named_parameters())
    return {id(named[name]): layer_decay ** (last - k) for name, k in layers.items()}


def _is_plain(name: str, param: nn.Parameter, spared: list[str]) -> bool:
    leaf = name.rpartition(".")[2]
    return (
        param.ndim <= 1
        or leaf == "bias"
        or any(word in leaf for word in ("_token", "pos_embed", "position"))
        or any(fnmatch.fnmatchcase(name, pattern) for pattern in spared)
    )
