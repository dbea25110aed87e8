"""The names of all keys, kept apart from the schema: a misspelt one is refused without torch.

    python -c "from fastssl.config.keys import write; write()"     after a key has come or gone

keys.json: {"optim": [its keys], "method": {"simclr": [its keys], ...}, ...}, "" for the run itself,
"data.streams.*" for each section of a mapping by names of one's own.
"""

import difflib
import json
import re
import sys
from functools import lru_cache
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args, get_origin

from .errors import ConfigError, about_stream, closest
from .streams import by_stream

FILE = Path(__file__).with_suffix(".json")
UNNAMED = {"optim.schedule": "cosine"}  # what a section is that has no name


# The sections that are one of several: of what kind, and where the registry is, which others add to
REGISTRIES = {
    "method": ("method", "fastssl.methods", "METHODS"),
    "data.source": ("source", "fastssl.data.datasets", "SOURCES"),
    "data.batch_ops": ("batch_op", "fastssl.data.batch.ops", "BATCH_OPS"),
    "optim.schedule": ("schedule", "fastssl.schedules.config", "SCHEDULES"),
    "optim.weight_decay": ("schedule", "fastssl.schedules.config", "SCHEDULES"),
    "optim.groups.weight_decay": ("schedule", "fastssl.schedules.config", "SCHEDULES"),
}


@lru_cache
def known_keys() -> dict[str, Any]:
    """The contents of keys.json."""
    return json.loads(FILE.read_text())


def tagged() -> dict[str, dict[str, list[str]]]:
    """Of the sections that are one of several: name -> keys."""
    from .models import KINDS

    several = {path: keys for path, keys in known_keys().items() if isinstance(keys, dict)}
    several["model"] = {kind: [] for kind in KINDS}
    return several


def check_keys(mapping: dict[str, Any], path: str = "", shown: str = "") -> None:
    """Raise ConfigError for an unknown key or name anywhere in a run's mapping.

    path: of the section in keys.json; shown: as the user sees it, with places in lists.
    """
    names, shown = known_keys()[path], shown or path
    if isinstance(names, dict):
        name = mapping.get("name", UNNAMED.get(path))
        if name is None:
            return  # the schema says that it is missing
        known = isinstance(name, str) and name in names
        names = names[name] if known else _added_keys(path, shown, str(name))
    if path == "model" == shown:
        _check_models(mapping, names)
    for key, value in mapping.items():
        at, seen = (f"{place}.{key}".lstrip(".") for place in (path, shown))
        if key not in names:
            hint = f"{closest(str(key), names)}; there are: {', '.join(names)}"
            raise ConfigError(f"unknown key {seen}={value!r}{hint}")
        parts = {f"{seen}.{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {}
        if at == "model" and isinstance(value, dict) and by_stream(value, known_keys()[at]):
            parts = {f"{seen}.{stream}": own for stream, own in value.items()}
        for place, part in (parts or {seen: value}).items():
            if isinstance(part, dict) and at in known_keys():
                check_keys(part, at, place)
            for name, own in part.items() if isinstance(part, dict) else ():
                if isinstance(own, dict) and f"{at}.*" in known_keys():
                    check_keys(own, f"{at}.*", f"{place}.{name}")


def _check_models(mapping: dict[str, Any], names: list[str]) -> None:
    """Raise ConfigError where keys of one model and models by stream stand side by side."""
    streams = [
        str(key)
        for key, value in mapping.items()
        if key not in names and isinstance(value, dict) and not closest(str(key), names)
    ]
    others = [key for key in mapping if key not in streams]
    if streams and others:
        if others[0] not in names and not closest(str(others[0]), names):
            value = mapping[others[0]]
            raise ConfigError(
                f"model.{others[0]}={value!r} is no model: give keys, as model.{others[0]}.name"
            )
        raise ConfigError(
            f"model.{others[0]} and model.{streams[0]} are given: model is one, or one for each "
            f"stream, with keys such as model.{streams[0]}.name"
        )


def _added_keys(path: str, shown: str, name: str) -> list[str]:
    """The keys of a section that is none of ours.  Raises ConfigError where nobody has added it."""
    kind, module, attribute = REGISTRIES[path]
    if "fastssl.registry" in sys.modules or entry_points(group=f"fastssl.{kind}s"):
        from fastssl.registry import PluginError

        registry = getattr(import_module(module), attribute)
        try:
            if name in registry:
                return list(registry.config(name).model_fields)
            names = registry.names()
        except PluginError as error:
            raise ConfigError(str(error)) from error
    else:
        names = list(known_keys()[path])
    raise ConfigError(
        f"{shown}.name={name!r} is not one of {', '.join(map(repr, names))}{closest(name, names)}"
    )


def check_model(mapping: dict[str, Any]) -> None:
    """Raise ConfigError for a model.name that occurs nowhere in timm's models or ours.

    Read from their source, since importing timm takes seconds; what passes, timm looks up itself.
    """
    model: Any = mapping.get("model")
    several = by_stream(model, known_keys()["model"])
    for stream, one in (model if several else {"": model}).items():
        name = one.get("name") if isinstance(one, dict) else None
        if isinstance(name, str) and name != "given" and (problem := _no_model(name)):
            raise ConfigError(about_stream(problem, stream) if several else problem)


def _no_model(name: str) -> str:
    """Why timm and we have no model of that name, or nothing."""
    text = _models_text()
    if not text or re.search(rf"\b{re.escape(name.partition('.')[0])}\b", text) or _is_added(name):
        return ""
    known = re.findall(r"@register_model(?:\(.+\))?\s+def (\w+)", text)
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return f"model.name={name!r} is not a timm model{hint}"


@lru_cache
def _models_text() -> str:
    """The source of timm's models and ours; nothing where there is no timm."""
    timm = find_spec("timm")
    if timm is None or timm.origin is None:
        return ""
    folders = Path(timm.origin).parent / "models", Path(__file__).parents[1] / "models"
    return "".join(path.read_text() for folder in folders for path in sorted(folder.glob("*.py")))


def _is_added(name: str) -> bool:
    """Whether a plugin, imported or installed, has a model of that name."""
    if "fastssl.registry" not in sys.modules and not entry_points(group="fastssl.models"):
        return False
    from fastssl.models import MODELS

    return name in MODELS


def names_of(model: Any, path: str = "") -> dict[str, Any]:
    """The names of the keys of a section and of those in it, as keys.json has them."""
    found: dict[str, Any] = {path: list(model.model_fields)}
    for name, field in model.model_fields.items():
        at, (section, registry) = f"{path}.{name}".lstrip("."), _below(field)
        if registry is not None:
            entries = registry.entries.items()
            ours = {one: entry.config for one, entry in entries if entry.is_ours}
            found[at] = {one: list(config.model_fields) for one, config in ours.items()}
        elif section is not None:
            found |= names_of(section, at)
        for part in get_args(field.annotation):  # of a mapping by names of one's own
            if get_origin(field.annotation) is dict and hasattr(part, "model_fields"):
                found |= names_of(part, f"{at}.*")
    return found


def _below(field: Any) -> tuple[Any, Any]:
    """The section that a field holds, or a list of it, or the registry that it is of."""
    notes = [
        *field.metadata,
        *(note for part in get_args(field.annotation) for note in _notes(part)),
    ]
    registry = next((note.registry for note in notes if hasattr(note, "registry")), None)
    parts = (
        field.annotation,
        *(get_args(field.annotation) if get_origin(field.annotation) is tuple else ()),
        *(part for one in get_args(field.annotation) for part in get_args(one)),
    )
    section = next((part for part in parts if hasattr(part, "model_fields")), None)
    return section, registry


def _notes(annotation: Any) -> tuple[Any, ...]:
    return getattr(annotation, "__metadata__", ())


def write() -> None:
    """Bring keys.json up to date with the schema."""
    from .schema import RunConfig

    FILE.write_text(json.dumps(names_of(RunConfig), indent=1) + "\n")
