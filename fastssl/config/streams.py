"""`model:` is one model, or one for each stream by its name: which of the two a mapping is."""

from collections.abc import Container, Mapping
from typing import Any


def by_stream(value: Any, fields: Container[str]) -> bool:
    """Whether `value` holds sections by the names of streams, and is no section of these fields."""
    if not isinstance(value, Mapping) or not value:
        return False
    kinds = map(type, value.values())
    sections = (issubclass(kind, Mapping) or hasattr(kind, "model_fields") for kind in kinds)
    return all(sections) and not any(key in fields for key in value)
