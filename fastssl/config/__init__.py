"""What a run is told: its sections, read from a recipe, a YAML file and overrides.

`schema` holds every key, `load` reads them, `keys` knows their names alone, `errors` says what is
wrong.  The schema, and with it torch, is imported when a configuration is checked, not before: help
and misspelt keys answer at once.
"""

from typing import TYPE_CHECKING, Any

from .errors import ConfigError
from .load import dump, from_mapping, load, recipes, resolve

if TYPE_CHECKING:
    from .schema import RunConfig, described, differences

__all__ = [
    "ConfigError",
    "RunConfig",
    "described",
    "differences",
    "dump",
    "from_mapping",
    "load",
    "recipes",
    "resolve",
]


def __getattr__(name: str) -> Any:
    if name not in ("RunConfig", "described", "differences"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import schema

    return getattr(schema, name)
