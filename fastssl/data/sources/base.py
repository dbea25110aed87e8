"""What every source of data is: a sequence of items with names, and labels where it has them."""

import os
from copy import copy
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np
from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from fastssl.data.errors import DataError
from fastssl.section import Section


class Source(Protocol):
    """What a loader needs of a set of items.  It must survive pickling: workers hold a copy.

    An item is an image, uint8 or float32 (channels, H, W); a clip, uint8 (channels, T, H, W); a
    signal, float32 (channels, W); a cloud, float32 (points, channels); or a table's row, float32
    (channels,).  A source of float32 images says so by an attribute `floats`, True.
    """

    @property
    def channels(self) -> int: ...

    @property
    def classes(self) -> tuple[str, ...] | None: ...

    @property
    def labels(self) -> Tensor | None:
        """(N,) int64, numbers of `classes`; None where there are no labels."""
        ...

    def __len__(self) -> int: ...

    def item(self, i: int) -> Tensor:
        """Item i.  Raises BadItem."""
        ...

    def name(self, i: int) -> str:
        """A name that a person can find item i by."""
        ...

    def select(self, indices: np.ndarray) -> "Source":
        """The items at `indices` (int64), in that order, as a source of their own."""
        ...


@runtime_checkable
class EncodedSource(Source, Protocol):
    """A source whose images are kept as files or records, so that others may decode them.

    `isinstance(source, EncodedSource)` tells whether a source is one.
    """

    def encoded(self, i: int) -> bytes:
        """The bytes of image i as stored: a whole JPEG, PNG, ... of which `item(i)` is the pixels.

        Raises BadItem for one that cannot be read; the bytes themselves are not looked at.
        """
        ...


class Split(NamedTuple):
    train: Source
    test: Source


class Items:
    """What most sources have: attributes with an entry for each item, and a selection of those.

    per_item: the names of these attributes; any may be None but the first, which has all items.
    """

    per_item: ClassVar[tuple[str, ...]] = ("names", "labels")
    names: Any  # of the items, unless a subclass defines `name`

    def __len__(self) -> int:
        return len(getattr(self, self.per_item[0]))

    def name(self, i: int) -> str:
        """A name that a person can find item i by."""
        return self.names[i]

    def select(self, indices: np.ndarray) -> Self:
        """The items at `indices` (int64), in that order, as a source of their own."""
        chosen = copy(self)
        for name in self.per_item:
            entries = getattr(self, name)
            if entries is not None:
                setattr(chosen, name, entries[indices])
        return chosen


class SourceOptions(Section):
    """Base of the sources' options.  A subclass has `name`, a Literal with itself as default, and
    opens itself."""

    if TYPE_CHECKING:
        name: Any

    test_fraction: float = Field(
        default=0.2, ge=0, lt=1, description="part of each class held out for evaluation"
    )

    def open(self) -> tuple[Source, ...]:
        """All items as one source; or the train and the test part, where they come apart.

        Raises DataError, saying what to do, for data that cannot be used.
        """
        raise TypeError(f"{type(self).__name__} does not define open()")


def needed(package: str, source: str) -> Any:
    """The package that a source cannot do without.  Raises DataError, saying how to install it."""
    try:
        return import_module(package)
    except ImportError as error:
        message = f"the source {source} needs a package: pip install {package}"
        raise DataError(message) from error


def absolute(path: Path) -> Path:
    """The absolute path, so that a saved config can be read from any folder.

    The home of an unknown user (`~nobody`) is not expanded: opening the path says it is missing.
    """
    return Path(os.path.expanduser(path)).absolute()
