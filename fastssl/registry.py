"""Choices by name that anyone can add to: methods, sources, views, models, schedules.

    METHODS = Registry("method", "method.name")
    METHODS.add("simclr", "fastssl.methods.simclr:SimCLR", SimCLRConfig)

A name stands for an object, or for the "module:object" to import once it is asked for, and for the
section of a configuration that describes its keys, where it has one.  A name that nobody has added
is looked up among the entry points of the registry's group, "fastssl.methods" for methods, whose
module is then imported and adds it.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

T = TypeVar("T")


class PluginError(ValueError):
    """A plugin that cannot be used: one sentence that says which, and why."""

    exit_code, on_every_rank = 2, True


@dataclass(frozen=True)
class Entry:
    """A name's object, or where to import it from; its section; and the module that added it."""

    made: Any
    config: type[BaseModel] | None
    module: str

    @property
    def is_ours(self) -> bool:
        return self.module.split(".")[0] == "fastssl"


class Registry(Mapping[str, T], Generic[T]):
    """kind: what a name is of, in the singular.  key: of a configuration, as errors name it."""

    __eq__ = object.__eq__  # one that has equal names is another
    __hash__: Any = object.__hash__

    def __init__(self, kind: str, key: str):
        self.kind, self.key, self.group = kind, key, f"fastssl.{kind}s"
        self.entries: dict[str, Entry] = {}

    def add(
        self, name: str, made: Any, config: type[BaseModel] | None = None, module: str = ""
    ) -> None:
        """Add a name.  module: that adds it, where it is not the object's own.

        Raises PluginError where another module has added it before.
        """
        own = made.partition(":")[0] if isinstance(made, str) else made.__module__
        entry, before = Entry(made, config, module or own), self.entries.get(name)
        module = entry.module
        if before is not None and before.module != module:
            raise PluginError(
                f"two {self.kind}s are named {name!r}, of {before.module} and of {module}: "
                "rename one"
            )
        self.entries[name] = entry

    def entry(self, name: str) -> Entry:
        """Raises KeyError for a name that is neither added nor an entry point, and PluginError for
        an entry point that cannot be imported, or whose name two packages have."""
        if name not in self.entries:
            found = list(entry_points(group=self.group, name=name))
            if not found:
                raise KeyError(name)
            if len({point.value for point in found}) > 1:
                values = " and ".join(point.value for point in found)
                raise PluginError(f"two installed {self.kind}s are named {name!r}: {values}")
            import_plugin(found[0].module)
            if name not in self.entries:
                raise PluginError(
                    f"the entry point {self.group}: {name} = {found[0].value} adds no {self.kind} "
                    "of that name"
                )
        return self.entries[name]

    def names(self) -> list[str]:
        """All names, those of entry points too."""
        others = sorted({point.name for point in entry_points(group=self.group)})
        return [*self.entries, *(name for name in others if name not in self.entries)]

    def config(self, name: str) -> type[BaseModel] | None:
        return self.entry(name).config

    def __getitem__(self, name: str) -> T:
        made = self.entry(name).made
        if not isinstance(made, str):
            return made
        module, _, attribute = made.partition(":")
        return getattr(import_module(module), attribute)

    def __contains__(self, name: object) -> bool:
        try:
            return isinstance(name, str) and self.entry(name) is not None
        except KeyError:
            return False

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def unknown(self, name: str) -> str:
        """What is wrong with a name that is not there, with the closest one that is."""
        close = difflib.get_close_matches(str(name), self.names(), n=1, cutoff=0.5)
        hint = f" (did you mean {close[0]}?)" if close else ""
        return f"{self.key}={name!r} is not one of {', '.join(map(repr, self.names()))}{hint}"


@dataclass(frozen=True)
class OneOf:
    """Of a pydantic field: any section of a registry, told apart by its `name`.

        schedule: Annotated[ScheduleConfig, OneOf(SCHEDULES)]

    The registry is read when a value is checked, so that what a plugin has added counts.
    """

    registry: Registry[Any]

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        dump = core_schema.plain_serializer_function_ser_schema(_dump, info_arg=True)
        return core_schema.no_info_plain_validator_function(self.validate, serialization=dump)

    def validate(self, value: Any) -> BaseModel:
        if isinstance(value, BaseModel):
            if any(type(value) is entry.config for entry in self.registry.entries.values()):
                return value
            kind = {"kind": self.registry.kind}
            raise PydanticCustomError("value_error", "it must be a {kind}'s section", kind)
        if not isinstance(value, Mapping):
            raise PydanticCustomError("dict_type", "it must be a mapping of keys")
        if "name" not in value:
            raise PydanticCustomError("union_tag_not_found", "its name is missing")
        name = str(value["name"])
        if name not in self.registry:
            message = f"{self.registry.unknown(name)}"
            raise PydanticCustomError("value_error", "{message}", {"message": message})
        config = self.registry.config(name)
        assert config is not None, f"{name} was added without a section"
        return config.model_validate(value)


def _dump(value: BaseModel, info: core_schema.SerializationInfo) -> dict[str, Any]:
    return value.model_dump(mode=info.mode)


def plugins_of(chosen: Iterable[tuple[Registry[Any], str]]) -> set[str]:
    """The modules outside of this package that have added these names."""
    found = (registry.entries[name] for registry, name in chosen if name in registry)
    return {entry.module for entry in found if not entry.is_ours}


def import_plugin(module: str) -> None:
    """Import a module, which adds to the registries what it brings.  Raises PluginError."""
    if not all(part.isidentifier() for part in module.split(".")):
        raise PluginError(f"plugins: {module!r} is not a module's name, such as my_package.ssl")
    try:
        import_module(module)
    except PluginError:
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            raise PluginError(
                f"there is no plugin {module}: pip install its package, or put the folder it lies "
                "in on PYTHONPATH"
            ) from error
        raise PluginError(f"plugin {module} cannot be imported: {error}") from error
    except Exception as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise PluginError(f"plugin {module} cannot be imported: {said}") from error
