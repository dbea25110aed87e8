"""What the view specs of clips, volumes, signals, clouds and rows share; image.py has images'."""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from typing_extensions import Self

from fastssl.data.views.image import rename_fields, unknown


class ItemViews(BaseModel):
    """`count` views of an item, each drawn by the same law from its own key."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    kind: ClassVar[str]
    named: ClassVar[str]  # the preset
    sized: ClassVar[str] = "size"  # the field that is the preset's size; "": it has none

    count: int = Field(default=1, ge=1, le=64, description="how many views of each item")

    @classmethod
    def preset(cls, size: int, **overrides: Any) -> Self:
        """The views of `size` (pixels, samples, points), with any other field set anew.

        Raises ValueError for an override that is no field, naming the closest, or out of bounds.
        """
        overrides = rename_fields(overrides)
        valid = [field for field in cls.model_fields if field != cls.sized]
        for key in overrides:
            if key not in valid:
                raise unknown(f"override of preset {cls.named!r}", key, valid)
        return cls.model_validate(({cls.sized: size} if cls.sized else {}) | overrides)

    def with_fields(self, **fields: Any) -> Self:
        """The same spec with these fields."""
        return type(self).model_validate({**self.model_dump(), **fields})

    def apply(self, item: Tensor, seed: int) -> list[Tensor]:
        """The views of one item, a pure function of it and of seed, a non-negative integer.

        Raises ValueError for an item of another shape or dtype.
        """
        self.check(item)
        return [self.view(item, (seed << 16) | v) for v in range(self.count)]

    def shown(self, view: Tensor) -> Tensor:
        """Views (n, ...) as pictures show them: as they are."""
        return view

    def check(self, item: Tensor) -> None:
        """Raise ValueError for an item of another shape or dtype."""
        raise TypeError(f"{type(self).__name__} does not define check(item)")

    def view(self, item: Tensor, key: int) -> Tensor:
        """One view of an item, drawn from `key`."""
        raise TypeError(f"{type(self).__name__} does not define view(item, key)")
