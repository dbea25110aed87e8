"""What a run is told: its sections, read from a recipe, a YAML file and overrides.

`schema` holds every key, `load` reads them, `keys` knows their names alone, `errors` says what is
wrong.  The schema, and with it torch, is imported when a configuration is checked, not before: help
and misspelt keys answer at once.
"""

from typing import TYPE_CHECKING, Any

from .errors import ConfigError as ConfigError
from .load import dump as dump
from .load import from_mapping as from_mapping
from .load import load as load
from .load import recipes as recipes
from .load import resolve as resolve

if TYPE_CHECKING:
    from .schema import RunConfig as RunConfig
    from .schema import described as described
    from .schema import differences as differences


def __getattr__(name: str) -> Any:
    if name not in ("RunConfig", "described", "differences"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import schema

    return getattr(schema, name)
