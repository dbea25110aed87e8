"""Sources whose items come from a formula.

Item i is instance i % per_class of class i // per_class, and a pure function of (seed, class,
instance): nothing is stored, and every process draws it alike.
"""

from typing import Any

import numpy as np
import torch
from pydantic import Field

from fastssl.data.sources.base import Items, Source, SourceOptions


class GeneratedOptions(SourceOptions):
    """What all generated sources are told.  A subclass says how to `draw` an item."""

    per_class: int = Field(default=100, ge=1, le=100_000, description="items of each class")
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="which items; the split has the run's seed"
    )

    def layout(self) -> tuple[tuple[str, ...], Any]:
        """The names of the classes, and an item's number of channels, or those of its streams."""
        raise TypeError(f"{type(self).__name__} does not define layout()")

    def draw(self, label: int, instance: int) -> Any:
        """Instance `instance` of class `label`."""
        raise TypeError(f"{type(self).__name__} does not define draw(label, instance)")

    def open(self) -> tuple[Source, ...]:
        return (Generated(self, np.arange(len(self.layout()[0]) * self.per_class)),)


class Generated(Items):
    """The items `members` (int64) of `options`, drawn when asked for."""

    per_item = ("members", "labels")

    def __init__(self, options: Any, members: np.ndarray):
        self.options, self.members = options, members
        self.classes, self.channels = options.layout()
        self.labels = torch.from_numpy(members // options.per_class)

    def item(self, i: int) -> Any:
        label, instance = divmod(int(self.members[i]), self.options.per_class)
        return self.options.draw(label, instance)

    def name(self, i: int) -> str:
        label, instance = divmod(int(self.members[i]), self.options.per_class)
        return f"{self.classes[label]}/{padded(instance, self.options.per_class)}"


def padded(k: int, count: int) -> str:
    """Number k of `count` from 0 on, all as long as the last."""
    return f"{k:0{len(str(count - 1))}d}"
