"""A torch `Dataset` as a source: images as PIL, arrays or tensors, with or without a label.

What a data set returns      is read as
PIL.Image                    an image in color, uint8 (3, H, W)
uint8 (H, W[, C]) array,     an image, uint8 (C, H, W); of one channel or three
  uint8 (C, H, W) tensor
float (C, H, W) of [0, 1],   the same, in 256 steps
  or an array (H, W[, C])
any other tensor or array    itself: a signal, a cloud, a row, as `fastssl.data.views` names them
(x, ...)                     x: the rest is for others
{"image": x, "depth": y}     streams, each as above; what is no image, array or tensor is left out
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from fastssl.data.errors import BadItem, DataError
from fastssl.data.sources.base import Items, Source, SourceOptions
from fastssl.data.sources.decode import of_the_machine


class DatasetItems(Items):
    """The items of a map-style data set, in its order.

    labels: (N,) numbers or names of classes; None: `dataset.targets` or `labels`, where it has
    them, and else there are none.
    Raises DataError for a data set that is empty, whose first item is not as above, or whose labels
    are not one an item.
    """

    per_item: ClassVar[tuple[str, ...]] = ("at", "labels")

    def __init__(self, dataset: Any, labels: Sequence[Any] | Tensor | None = None):
        try:
            count = len(dataset)
        except TypeError as error:
            raise DataError(
                f"data={type(dataset).__name__} has no length: give a data set with __len__ and "
                "__getitem__"
            ) from error
        if not count:
            raise DataError(f"data={type(dataset).__name__} is empty: give it items")
        self.dataset, self.at = dataset, np.arange(count)
        self.labels, self.classes = _labels(dataset, labels, count)
        first = self._read(0)
        several = isinstance(first, dict)
        self.streams = tuple(first) if several else ()
        self.channels: Any = {k: len(x) for k, x in first.items()} if several else len(first)

    def name(self, i: int) -> str:
        return f"item {int(self.at[i])}"

    def item(self, i: int) -> Any:
        try:
            x = self._read(i)
        except DataError as error:
            raise BadItem(self.name(i), str(error)) from error
        except Exception as error:
            if of_the_machine(error):
                raise
            raise BadItem(self.name(i), f"{type(error).__name__}: {error}") from error
        lost = set(self.streams).difference(x if isinstance(x, dict) else ())
        if lost or isinstance(x, dict) and not self.streams:
            told = ", ".join(self.streams) or "no streams"
            raise BadItem(self.name(i), f"it has other streams than the first item, {told}")
        for name in self.streams or ("",):
            own: Any = x[name] if name else x
            want = self.channels[name] if name else self.channels
            if len(own) != want and own.ndim == 3:
                of = f" of {name}" if name else ""
                what = f"{len(own)} channels{of}, and the first item has {want}"
                raise BadItem(self.name(i), what)
        return x

    def _read(self, i: int) -> Any:
        """Item i, by stream where it is a mapping."""
        place = int(self.at[i])
        found = self.dataset[place]
        x = found[0] if isinstance(found, tuple | list) and len(found) else found
        name = f"item {place} of the data set"
        streams = (
            {str(k): v for k, v in x.items() if _is_stream(v)} if isinstance(x, Mapping) else {}
        )
        if streams:
            return {k: as_item(v, f"{k!r} of {name}") for k, v in streams.items()}
        return as_item(x, name)


def _is_stream(x: Any) -> bool:
    """Whether an entry of a mapping is a stream of its own, and no label or text."""
    return isinstance(x, Image.Image) or isinstance(x, np.ndarray | Tensor) and x.ndim > 0


def as_item(x: Any, name: str) -> Tensor:
    """What a data set returned, as an item of a source.  Raises DataError, saying what it is."""
    if isinstance(x, Image.Image):
        x = np.asarray(x.convert("RGB"))
    if isinstance(x, np.ndarray):
        if x.ndim == 2 and x.dtype == np.uint8:
            x = x[:, :, None]
        if x.ndim == 3 and x.shape[2] in (1, 3):
            x = x.transpose(2, 0, 1)
        try:
            x = torch.from_numpy(np.ascontiguousarray(x))
        except TypeError:
            pass
    if not isinstance(x, Tensor) or not x.ndim or not x.numel():
        shape = f" {tuple(x.shape)}" if isinstance(x, Tensor | np.ndarray) else ""
        raise DataError(
            f"{name} is a {type(x).__name__}{shape}: give an image (PIL, array or tensor), a "
            "tensor with values, or a tuple that begins with one"
        )
    if x.ndim == 3 and x.shape[0] not in (1, 3):
        raise DataError(f"{name} is of shape {tuple(x.shape)}: an image is (C, H, W), C 1 or 3")
    if x.ndim == 3 and x.is_floating_point():
        low, high = x.min().item(), x.max().item()
        if not (low >= 0 and high <= 1):
            raise DataError(
                f"{name} has values from {low:.3g} to {high:.3g}: an image of floats is in [0, 1], "
                "before any normalization"
            )
        x = (255 * x).round().to(torch.uint8)
    return x if x.dtype == torch.uint8 else x.float()


def _labels(
    dataset: Any, given: Sequence[Any] | Tensor | None, count: int
) -> tuple[Tensor | None, tuple[str, ...] | None]:
    """Numbers of classes (N,) int64, and the classes' names."""
    known = getattr(dataset, "targets", getattr(dataset, "labels", None))
    told = known if given is None else given
    if told is None:
        return None, None
    values = np.asarray(told)
    if values.shape != (count,):
        what = "labels" if given is not None else "the data set's targets"
        raise DataError(f"{what} must be one of each of {count} items, got {values.shape}")
    names, numbers = np.unique(values, return_inverse=True)
    classes = getattr(dataset, "classes", None)
    if given is None and classes is not None and values.dtype.kind in "iu":
        return torch.from_numpy(values.astype(np.int64)), tuple(map(str, classes))
    return torch.from_numpy(numbers.astype(np.int64)), tuple(map(str, names))


class GivenSource(SourceOptions):
    """A data set that was given from Python, as an object: nothing in a file can open it again."""

    name: Literal["given"] = Field(default="given", description="which source this is")

    def open(self) -> tuple[Source, ...]:
        raise DataError(
            "data.source.name=given stands for a data set that was given from Python: give it "
            "again, to fastssl.pretrain"
        )
