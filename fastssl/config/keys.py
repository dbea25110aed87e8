"""The names of all keys, kept apart from the schema: a misspelt one is refused without torch.

    python -c "from fastssl.config.keys import write; write()"     after a key has come or gone

keys.json: {"optim": [its keys], "method": {"simclr": [its keys], ...}, ...}, "" for the run itself.
"""

import difflib
import json
import re
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from .errors import ConfigError, closest

FILE = Path(__file__).with_suffix(".json")
UNNAMED = {"optim.schedule": "cosine"}  # what a section is that has no name


@lru_cache
def known_keys() -> dict[str, Any]:
    """The contents of keys.json."""
    return json.loads(FILE.read_text())


def tagged() -> dict[str, dict[str, list[str]]]:
    """Of the sections that are one of several: name -> keys."""
    return {path: keys for path, keys in known_keys().items() if isinstance(keys, dict)}


def check_keys(mapping: dict[str, Any], path: str = "", shown: str = "") -> None:
    """Raise ConfigError for an unknown key or name anywhere in a run's mapping.

    path: of the section in keys.json; shown: as the user sees it, with places in lists.
    """
    names, shown = known_keys()[path], shown or path
    if isinstance(names, dict):
        name = mapping.get("name", UNNAMED.get(path))
        if name is None:
            return  # the schema says that it is missing
        if name not in names:
            raise ConfigError(
                f"{shown}.name={name!r} is not one of {', '.join(map(repr, names))}"
                f"{closest(str(name), names)}"
            )
        names = names[name]
    for key, value in mapping.items():
        at, seen = (f"{place}.{key}".lstrip(".") for place in (path, shown))
        if key not in names:
            hint = f"{closest(str(key), names)}; there are: {', '.join(names)}"
            raise ConfigError(f"unknown key {seen}={value!r}{hint}")
        parts = {f"{seen}.{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {}
        for place, part in (parts or {seen: value}).items():
            if isinstance(part, dict) and at in known_keys():
                check_keys(part, at, place)


def check_model(mapping: dict[str, Any]) -> None:
    """Raise ConfigError for a model.name that occurs nowhere in timm's models or ours.

    Read from their source, since importing timm takes seconds; what passes, timm looks up itself.
    """
    model = mapping.get("model")
    name = model.get("name") if isinstance(model, dict) else None
    if isinstance(name, str) and (problem := _no_model(name)):
        raise ConfigError(problem)


@lru_cache
def _no_model(name: str) -> str:
    """Why timm and we have no model of that name, or nothing."""
    timm = find_spec("timm")
    if timm is None or timm.origin is None:
        return ""
    folders = Path(timm.origin).parent / "models", Path(__file__).parents[1] / "models"
    text = "".join(path.read_text() for folder in folders for path in sorted(folder.glob("*.py")))
    if re.search(rf"\b{re.escape(name.partition('.')[0])}\b", text):
        return ""
    known = re.findall(r"@register_model\s+def (\w+)", text)
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return f"model.name={name!r} is not a timm model{hint}"


def names_of(model: Any, path: str = "") -> dict[str, Any]:
    """The names of the keys of a section and of those in it, as keys.json has them."""
    found: dict[str, Any] = {path: list(model.model_fields)}
    for name, field in model.model_fields.items():
        at, sections = f"{path}.{name}".lstrip("."), _sections(field.annotation)
        if len(sections) == 1:
            found |= names_of(sections[0], at)
        elif sections:
            found[at] = {s.model_fields["name"].default: list(s.model_fields) for s in sections}
    return found


def _sections(annotation: Any) -> list[Any]:
    if hasattr(annotation, "model_fields"):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]


def write() -> None:
    """Bring keys.json up to date with the schema."""
    from .schema import RunConfig

    FILE.write_text(json.dumps(names_of(RunConfig), indent=1) + "\n")
