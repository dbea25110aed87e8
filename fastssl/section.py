"""The base of everything that is configured: frozen, its keys all known, its numbers finite."""

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """Refuses unknown keys, infinite numbers, and yes or no where a number is meant."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _yes_is_no_number(cls, values: Any) -> Any:
        """YAML reads yes and on as true, which pydantic would take for 1."""
        for name, value in values.items() if isinstance(values, dict) else ():
            kinds = _types(cls.model_fields[name].annotation) if name in cls.model_fields else set()
            parts = value if isinstance(value, (list, tuple)) else [value]
            yes_or_no = any(isinstance(part, bool) for part in parts)
            if yes_or_no and bool not in kinds and kinds & {int, float}:
                reason = PydanticCustomError("a_number", "a number is wanted, not yes or no")
                error: Any = {"type": reason, "loc": (name,), "input": value}
                raise ValidationError.from_exception_data(cls.__name__, [error])
        return values


def _types(annotation: Any) -> set[Any]:
    inner = [_types(part) for part in get_args(annotation)]
    return set().union(*inner) if inner else {annotation}
