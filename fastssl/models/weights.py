"""Weights that an encoder starts from: read, fitted to it, and told what became of them.

A ViT's positions and patches are resampled to another image or patch size, as timm does it, and the
first convolution of a model for color is adapted to other channels.
"""

import contextlib
import io
import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import safe_open
from timm.models import adapt_input_conv
from torch import Tensor, nn

from .frozen import set_aside
from .published import backbone_in, check_biases, network_in

Weights = Mapping[str, Tensor]
_SHOWN = 4  # names in a sentence


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of what torch.save wrote of tensors and plain values,
    of several networks in it those of `network_in`; of an .index.json those of its files.

    Raises ValueError, naming the file, for one that is missing or holds no weights.
    """
    if not path.is_file():
        raise ValueError(f"model.weights={path}: there is no such file")
    try:
        found: dict[str, Any] = {}
        for file in _files(path):
            with torch.serialization.safe_globals([Namespace]):  # the options beside the weights
                found |= timm.models.load_state_dict(str(file), use_ema=False)
        found = dict(network_in(found))
        return {str(key): value for key, value in found.items() if isinstance(value, Tensor)}
    except Exception as error:  # of safetensors, zipfile, pickle: each has its own
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"model.weights={path} holds no weights: {first}") from error


def _files(path: Path) -> list[Path]:
    if not path.name.endswith(".index.json"):
        return [path]
    names = json.loads(path.read_text())["weight_map"].values()
    return [path.with_name(name) for name in dict.fromkeys(names)]


def timm_weights(name: str) -> dict[str, Tensor]:
    """timm's pretrained weights of a model, fetched or from the hub's cache.

    Raises ValueError where there are none, or they cannot be fetched.
    """
    cfg = timm.models.get_pretrained_cfg(name)
    if cfg is None or not cfg.has_weights:
        raise ValueError(f"model.weights=timm: timm has no pretrained weights of {name}")
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # of the hub's client, urllib, sockets
        first = (str(error).splitlines() or [type(error).__name__])[0]
        where = f"https://huggingface.co/{cfg.hf_hub_id}" if cfg.hf_hub_id else cfg.url
        raise ValueError(
            f"model.weights=timm: the weights of {name} cannot be fetched ({first}): put the "
            f"model.safetensors of {where} anywhere, and give model.weights=PATH"
        ) from error


def load_weights(model: nn.Module, weights: Weights, source: str, *, partial: bool = False) -> str:
    """Fill `model`, in place, and return a sentence that says with what.

    source: what they are called in sentences.  A classifier's weights may be left over.
    Raises ValueError where a tensor of the model's is not filled or one of `weights` not used,
    unless `partial`; and where nothing fits at all.  Then the model is as it was.
    """
    own = model.state_dict()
    weights, left = backbone_in(weights, own)
    try:
        check_biases(weights, model)
    except ValueError as error:
        raise ValueError(f"model.weights={source}: {error}") from error
    fitted = _fitted(model, weights)
    loaded = {k: v for k, v in fitted.items() if k in own and v.shape == own[k].shape}
    resized = [k for k in loaded if k in weights and weights[k].shape != loaded[k].shape]
    others = [k for k in fitted if k in own and k not in loaded]
    missing = [k for k in own if k not in fitted]
    heads = tuple(f"{head}." for head in _names(model, "classifier"))
    unused = [k for k in fitted if k not in own and not k.startswith(heads or ("head.", "fc."))]
    shapes = [f"{k} {_shape(fitted[k])} for {_shape(own[k])}" for k in others]
    faults = [
        f"{len(names)} {what} ({_list(names)})"
        for names, what in (
            (missing, "of the model's tensors are not in them"),
            (shapes, "have another shape"),
            (unused, "of theirs are not the model's"),
        )
        if names
    ]
    what = f"model.weights={source}"
    if not loaded or faults and not partial:
        mend = "" if not loaded else ", or model.partial=true to take what fits"
        said = "; ".join(faults) or "they are empty"
        raise ValueError(f"{what}: {said}: give those of this model{mend}")
    model.load_state_dict(loaded, strict=False)
    said = [f"{what}: {len(loaded)} of {len(own)} tensors loaded"]
    sizes = [f"{k} {_shape(weights[k])} to {_shape(own[k])}" for k in resized]
    said += [f"resized: {_list(sizes)}"] if sizes else []
    said += [f"{len(left)} of pretraining alone are left out ({_list(left)})"] if left else []
    return "; ".join([*said, *faults])


def load_method(method: nn.Module, networks: Mapping[str, nn.Module], path: str, name: str) -> str:
    """Fill a method, its heads and teacher too, from what another run of it has exported; in place.

    networks: those of its encoders, whose tensors are resampled where they can be; all others must
    fit.  name: of the method.  Returns a sentence that says what became of them.
    Raises ValueError where the file is none of that, of another method, or a tensor does not fit.
    """
    what, file = f"weights={path}", Path(path).expanduser()
    if file.is_dir():
        raise ValueError(
            f"{what} is a directory: give the file that `fastssl export {path} --with-heads` writes"
        )
    try:
        weights, facts = read_weights(file), _facts(file)
    except ValueError as error:
        raise ValueError(str(error).replace("model.weights=", "weights=")) from error
    if "networks" not in facts or facts.get("method") != name:
        of = f"the method {facts['method']}" if "networks" in facts else "an encoder alone"
        raise ValueError(f"{what} is of {of}, and method.name={name}: give one of this method")
    with set_aside(method):
        own = {k: v for k, v in method.state_dict().items() if not k.endswith("_extra_state")}
        for prefix, network in _prefixes(method, networks).items():
            part = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
            others = {k: v for k, v in weights.items() if not k.startswith(prefix)}
            weights = others | {f"{prefix}{k}": v for k, v in _fitted(network, part).items()}
        faults = [
            *(f"{k} is not in it" for k in own if k not in weights),
            *(f"{k} is not in this run's" for k in weights if k not in own),
            *(
                f"{k} is {_shape(x)} in it and {_shape(own[k])} here"
                for k, x in weights.items()
                if k in own and x.shape != own[k].shape
            ),
        ]
        if faults:
            raise ValueError(f"{what}: {_list(faults)}: give the same method and model options")
        method.load_state_dict(weights, strict=False)
    return f"{what}: all {len(own)} tensors of {name} loaded, heads and teacher too"


def _prefixes(method: nn.Module, networks: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """What the method puts before the names of each network's tensors."""
    every = {id(module): name for name, module in method.named_modules()}
    return {f"{every[id(n)]}.": n for n in networks.values() if id(n) in every}


def _facts(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, or of the first of several; {} of another."""
    (first, *_) = _files(path)
    if first.suffix != ".safetensors":
        return {}
    with safe_open(first, "pt") as file:
        return file.metadata() or {}


def _fitted(model: nn.Module, weights: Weights) -> dict[str, Tensor]:
    """The weights under the model's names, in its sizes where a tensor can be resampled."""
    module = import_module(type(model).__module__)
    convert = getattr(module, "checkpoint_filter_fn", None)
    found = dict(weights)
    if convert is not None and type(model).__module__.startswith("timm."):
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints what it leaves out
                found = convert(found, model)
        except (KeyError, RuntimeError, ValueError, AttributeError, TypeError):
            found = dict(weights)  # of another architecture: the shapes will say so
    for name in _names(model, "first_conv"):
        key, own = f"{name}.weight", model.state_dict().get(f"{name}.weight")
        given = found.get(key)
        if own is not None and given is not None and given.shape[1] != own.shape[1]:
            if given.shape[1] == 3 and given.shape[2:] == own.shape[2:]:
                found[key] = adapt_input_conv(own.shape[1], given)
    return found


def _names(model: nn.Module, what: str) -> tuple[str, ...]:
    """The modules that timm's configuration of the model names so."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    named = cfg.get(what) or ()
    return (named,) if isinstance(named, str) else tuple(named)


def _shape(x: Tensor) -> str:
    return "x".join(map(str, x.shape)) or "0-d"


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
