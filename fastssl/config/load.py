"""Reading a configuration: a recipe or a YAML file, dotted overrides, and what is refused.

    resolve("simclr-digits", ["optim.lr=1e-3", "epochs=5"]) -> RunConfig

What stands in a file or an override is data: `${...}` is text, YAML's aliases are refused, and
nothing is taken from the environment, so that a stranger's run can be opened.
"""

import re
import warnings
from collections.abc import Sequence
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fastssl.data.views.presets import OLD_FIELDS

from .errors import ConfigError, closest, sentence
from .keys import check_keys, check_model, known_keys, tagged
from .streams import by_stream

if TYPE_CHECKING:
    from .schema import RunConfig

SWITCHED = ("method", "model", "teacher", "data.source", "optim.schedule")
_SOURCE = tuple(f"data.source.{key}" for key in ("path", "val", "cache", "image", "label"))
VERBATIM = (
    "name",
    "output",
    "model.name",
    "model.weights",
    "teacher.name",
    "teacher.weights",
    *_SOURCE,
)
# A key's old dotted name, * for any part -> its new one, in the same section
RENAMED: dict[str, str] = {
    old.format(key): old.format(new)
    for old in ("data.overrides.{}", "data.overrides.*.{}")
    for key, new in OLD_FIELDS.items()
}
RENAMED["optim.schedule.final"] = "optim.schedule.end"
RENAMED["evaluate.neighbours"] = "evaluate.neighbors"
RENAMED_VALUES = {  # (key, its old value) -> its new one
    ("data.source.name", "hub"): "hf_datasets",
    ("method.follows", "colour"): "color",
}
MOVED = {  # a key, of sections with this name -> the number and the key of its schedule that it is
    ("method", "data2vec", "momentum_end"): ("momentum", {}, "end"),
    ("method", "data2vec", "until"): ("momentum", {}, "until"),
    ("optim", None, "weight_decay_end"): ("weight_decay", {"name": "cosine"}, "end"),
}


def recipes() -> dict[str, Path]:
    """The recipes that ship with the package, by name."""
    folder = Path(str(files("fastssl") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def resolve(
    recipe: str, overrides: list[str] | None = None, plugins: Sequence[str] | None = None
) -> "RunConfig":
    """A recipe's name or a YAML file, with `key=value` overrides, checked.

    plugins: modules to import first, beside those that the file names.
    Raises ConfigError, one sentence: an unknown recipe or key (with the closest valid one), a value
    of the wrong type or out of range, a combination that cannot run.
    """
    known = recipes()
    path = known.get(recipe, Path(recipe))
    if not path.is_file():
        hint = closest(recipe, known)
        raise ConfigError(f"no recipe or file {recipe!r}{hint}; there are: {', '.join(known)}")
    mapping = _merged(path, overrides or [])
    if plugins:
        mapping["plugins"] = [*mapping.get("plugins", []), *plugins]
    return from_mapping(mapping)


def overridden(mapping: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A mapping with `key=value` overrides over it.  Raises ConfigError for what does not read."""
    chosen: dict[str, Any] = {}
    for text in overrides:
        try:
            _put(chosen, text)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {text!r} does not read as YAML: {error}") from None
    return _over(mapping, _renamed(chosen))


def load(run: Path) -> "RunConfig":
    """The configuration a run was made with."""
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run} holds no run: there is no {path}")
    mapping = _merged(path, [])
    engine = mapping.get("engine")
    if isinstance(engine, dict) and engine.get("accumulation", 1) != 1:
        engine.setdefault("large_batch", "plain")  # of a run from before there was another way
    try:
        return from_mapping(mapping)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def from_mapping(mapping: dict[str, Any]) -> "RunConfig":
    """A configuration from nested dicts, checked, after importing its plugins.

    Raises ConfigError.
    """
    mapping = _moved(mapping)
    if "plugins" in mapping:
        _import_plugins(mapping["plugins"])
    check_keys(mapping)
    check_model(mapping)
    from pydantic import ValidationError

    from .schema import RunConfig

    try:
        cfg = RunConfig.model_validate(mapping)
        return cfg.model_copy(update={"plugins": cfg.plugins_used()})
    except ValidationError as error:
        raise ConfigError(sentence(error, tagged())) from None


def _import_plugins(names: Any) -> None:
    from fastssl.registry import PluginError, import_plugin

    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"plugins={names!r} must be a list of modules' names: plugins=[my_ssl]")
    try:
        for name in names:
            import_plugin(name)
    except PluginError as error:
        raise ConfigError(str(error)) from error


def dump(cfg: "RunConfig") -> str:
    """YAML that `load` reads back to the same configuration."""
    values = cfg.model_dump(mode="json")
    return yaml.dump(values, Dumper=_Writer, sort_keys=False, allow_unicode=True)


class _Reader(yaml.SafeLoader):
    """YAML as people mean it: 1e-3 is a number, a date a text; no aliases, no key twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases are not read, and there is *{self.peek_event().anchor}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = [key.value for key, _ in node.value]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"{twice} is given twice")
        return super().construct_mapping(node, deep)


class _Writer(yaml.SafeDumper):
    """Quotes what `_Reader` would take for a number."""


for _each in (_Reader, _Writer):
    _each.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rules if not tag.endswith(":timestamp")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _number = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$")
    _each.add_implicit_resolver("tag:yaml.org,2002:float", _number, list("-+.0123456789"))


def _merged(path: Path, overrides: list[str]) -> dict[str, Any]:
    """What a file says, with the overrides over it."""
    try:
        read = yaml.load(path.read_text(encoding="utf-8"), _Reader)
        if not isinstance(read, dict):
            raise ConfigError(f"{path} holds {type(read).__name__}, not a mapping of keys")
        chosen: dict[str, Any] = {}
        for text in overrides:
            _put(chosen, text)
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        if isinstance(error, ConfigError):
            raise
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"{path} with {overrides} does not read as YAML: {first}") from None
    read, chosen = _renamed(read), _renamed(chosen)
    for given in (read, chosen):
        _check_moved(given)
    models = read.get("model") if by_stream(read.get("model"), known_keys()["model"]) else {}
    of_streams = [f"model.{stream}" for stream in models]
    for section in (*SWITCHED, *of_streams):  # another method ... has nothing of the recipe's
        name = _at(chosen, f"{section}.name")
        if name is not None and name != _at(read, f"{section}.name"):
            *above, last = section.split(".")
            holder = _at(read, ".".join(above)) if above else read
            if isinstance(holder, dict):
                holder[last] = {}
    merged = _over(read, chosen)
    rates, own = (tree.get("optim") for tree in (read, chosen))
    own = own if isinstance(own, dict) else {}
    if (
        isinstance(rates, dict) and "lr" in rates and "lr" not in own
    ):  # for this batch it was chosen
        merged["optim"].setdefault("lr_batch", read.get("batch_size"))
    unset = sorted(_unset(merged))
    if unset:
        raise ConfigError(f"{path.stem} leaves {unset[0]} to you: add {unset[0]}=...")
    return merged


def _put(tree: dict[str, Any], override: str) -> None:
    """Write `key=value` into a tree.  A value is YAML, but for the texts in VERBATIM, where a `#`
    or a number is what it looks like."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form key=value")
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"override {override!r}: {section} was given as a value before")
    of_stream = re.fullmatch(r"model\.(?!kwargs\.)[^.]+\.(name|weights)", key)
    tree[last] = text if key in VERBATIM or of_stream else yaml.load(text, _Reader)


def _over(below: Any, above: Any) -> Any:
    """`above` laid over `below`: mappings are merged, all else is replaced.

    A number under a mapping without a name is the start of the schedule that it is of.  Under a
    schedule of another name only the start and the end stay, where that has them.
    """
    number = isinstance(below, int | float) and not isinstance(below, bool)
    if number and isinstance(above, dict) and "name" not in above:
        return {"start": below, **above}
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    if {"start", "name"} <= {*below} and above.get("name", below["name"]) != below["name"]:
        keys = known_keys()["optim.schedule"].get(str(above["name"]), ())
        kept = {"start", "end"} & {*keys} if "start" in keys else ()
        below = {key: value for key, value in below.items() if key in kept}
    return {**below, **{k: _over(below.get(k), v) for k, v in above.items()}}


def _moved(mapping: dict[str, Any]) -> dict[str, Any]:
    """A run's mapping with the keys of MOVED in the schedules that they are of now."""
    for (section, name, old), (number, schedule, key) in MOVED.items():
        keys = mapping.get(section)
        if not isinstance(keys, dict) or old not in keys or name not in (None, keys.get("name")):
            continue
        keys = dict(keys)
        value, before = keys.pop(old), keys.get(number, {})
        if value is not None:
            warnings.warn(f"{section}.{old} is {section}.{number}.{key} now", FutureWarning, 2)
            keys[number] = {**schedule, **_over(before, {key: value})}
        mapping = {**mapping, section: keys}
    return mapping


def _check_moved(tree: dict[str, Any]) -> None:
    """Raise ConfigError where one source gives a key of MOVED, and what it is now."""
    for (section, _, old), (number, _, key) in MOVED.items():
        now = _at(tree, f"{section}.{number}")
        both = isinstance(now, list) or isinstance(now, dict) and key in now
        if both and _at(tree, f"{section}.{old}") is not None:
            new = f"{section}.{number}.{key}"
            raise ConfigError(f"{section}.{old} is the old name of {new}, and both are given")


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _unset(tree: Any, path: str = "") -> list[str]:
    if isinstance(tree, dict):
        return [k for key, v in tree.items() for k in _unset(v, f"{path}.{key}".lstrip("."))]
    return [path] if tree == "???" else []


def _renamed(tree: Any, path: str = "") -> Any:
    """The tree with old keys under their new names; a list's entries are its section's."""
    if isinstance(tree, list):
        return [_renamed(part, path) for part in tree]
    if not isinstance(tree, dict):
        new = RENAMED_VALUES.get((path, tree)) if isinstance(tree, str) else None
        if new is not None:
            warnings.warn(f"{path}={tree} is called {path}={new} now", FutureWarning, stacklevel=2)
        return tree if new is None else new
    found: dict[str, Any] = {}
    for key, value in tree.items():
        at = f"{path}.{key}".lstrip(".")
        new = next((to for old, to in RENAMED.items() if fnmatchcase(at, old)), None)
        if new is not None:
            key = new.rpartition(".")[2]
            new = f"{path}.{key}".lstrip(".")
            if key in tree:
                raise ConfigError(f"{at} is the old name of {new}, and both are given")
            warnings.warn(f"{at} is called {new} now", FutureWarning, stacklevel=2)
        found[key] = _renamed(value, at if new is None else new)
    return found
