"""Images held as arrays: in memory, or in a .npy file that is read an image at a time."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from fastssl.data.errors import DataError
from fastssl.data.sources.base import Items, Source, SourceOptions, absolute
from fastssl.data.sources.decode import of_the_machine
from fastssl.data.sources.files import Files
from fastssl.data.sources.names import Names
from fastssl.data.sources.records import MOST_CLASSES


class ArrayImages(Items):
    """Images held in memory, uint8 (N, C, H, W)."""

    per_item = ("pixels", "labels", "names")

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor | None,
        classes: tuple[str, ...] | None,
        names: Iterable[str],
    ):
        self.pixels, self.labels, self.classes, self.names = pixels, labels, classes, Names(names)
        self.channels = pixels.shape[1]

    def item(self, i: int) -> Tensor:
        return self.pixels[i]


@dataclass(eq=False)
class StoredArray(Items):
    """Images `at` (int64) of a .npy file of uint8 images, each of `shape` from `start` on, bytes.

    order: which axes of a stored image are its channels, height and width.
    """

    path: Path
    start: int
    shape: tuple[int, ...]
    order: tuple[int, ...]
    at: np.ndarray
    labels: Tensor | None
    classes: tuple[str, ...] | None
    per_item = ("at", "labels")

    def __post_init__(self):
        self.files, self.channels = Files([str(self.path)]), self.shape[self.order[0]]

    def name(self, i: int) -> str:
        return f"{self.path.name}[{int(self.at[i])}]"

    def item(self, i: int) -> Tensor:
        """Image i, uint8 (C, H, W).  Raises BadItem."""
        size = int(np.prod(self.shape))
        data = self.files.record(0, self.start + int(self.at[i]) * size, size, self.name(i))
        image = torch.frombuffer(bytearray(data), dtype=torch.uint8).reshape(self.shape)
        return image.permute(self.order).contiguous()


def _load(path: Path, mode: Literal["r"] | None = None) -> Any:
    """A .npy as an array, mapped for mode "r"; a .npz as a mapping.  Raises DataError."""
    if path.exists() and not path.is_file():
        raise DataError(f"{str(path)!r} is no file: give a .npy or .npz file")
    try:
        return np.load(path, mmap_mode=mode, allow_pickle=False)
    except MemoryError as error:
        raise DataError(
            f"{str(path)!r} does not fit into memory, or is damaged: {error}"
        ) from error
    except Exception as error:  # a damaged header is read by Python's own parser
        if of_the_machine(error):
            raise
        if isinstance(error, OSError):
            raise DataError(f"{str(path)!r} cannot be read ({error.strerror}): mend it") from error
        reason = " ".join(str(error).split())
        raise DataError(f"{str(path)!r} is no whole .npy or .npz file ({reason})") from error


def _member(path: Path, mapping: Any, key: str) -> np.ndarray:
    try:
        return mapping[key]
    except KeyError as error:
        known = ", ".join(mapping.files) or "nothing"
        raise DataError(f"{str(path)!r} has no array {key!r}: it has {known}") from error
    except MemoryError as error:
        what = f"array {key!r} of {str(path)!r}"
        raise DataError(f"{what} does not fit into memory, or is damaged: {error}") from error
    except Exception as error:  # or the decompressor's
        if of_the_machine(error):
            raise
        raise DataError(f"array {key!r} of {str(path)!r} is damaged ({error})") from error


def _order(path: Path, images: np.ndarray, layout: str) -> tuple[int, ...]:
    """The axes channels, height, width among an image's own, with a channel axis added to gray.

    Raises DataError for what are no images.
    """
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or 0 in images.shape:
        got = f"{images.dtype} {list(images.shape)}"
        raise DataError(
            f"{str(path)!r} holds {got}: want uint8 (N, H, W), (N, H, W, C) or (N, C, H, W)"
        )
    if images.ndim == 3:
        return (0, 1, 2)
    first, last = images.shape[1] in (1, 3), images.shape[3] in (1, 3)
    denied = {"auto": not (first or last), "NCHW": last and not first, "NHWC": first and not last}
    if denied[layout]:
        raise DataError(
            f"{str(path)!r} holds {list(images.shape)} as {layout}: want 1 or 3 channels, or for "
            "others a layout, NHWC or NCHW"
        )
    if layout == "auto" and first and last:
        raise DataError(f"{str(path)!r} holds {list(images.shape)}: set layout to NHWC or NCHW")
    return (0, 1, 2) if layout == "NCHW" or (layout == "auto" and first) else (2, 0, 1)


def _labeled(found: np.ndarray, count: int) -> tuple[Tensor, tuple[str, ...]]:
    """Labels (N,) and classes, from whole numbers or texts (N,)."""
    got = f"{found.dtype} {list(found.shape)}"
    if found.shape != (count,) or found.dtype.kind not in "iuU":
        raise DataError(f"the labels are {got}: want whole numbers or texts, ({count},)")
    if found.dtype.kind == "U":
        names, numbers = np.unique(found, return_inverse=True)
        return torch.from_numpy(numbers.astype(np.int64)), tuple(names.tolist())
    low, high = int(found.min()), int(found.max())
    if low < 0 or high >= MOST_CLASSES:
        raise DataError(f"labels go from {low} to {high}: want 0 to {MOST_CLASSES - 1}")
    return torch.from_numpy(found.astype(np.int64)), tuple(map(str, range(high + 1)))


class ArraysSource(SourceOptions):
    """Images in a .npy file, or in a .npz file, which is read into memory."""

    name: Literal["arrays"] = Field(default="arrays", description="which source this is")
    path: Annotated[Path, AfterValidator(absolute)] = Field(
        description=".npy, or .npz: uint8 (N, H, W), (N, H, W, C) or (N, C, H, W), C 1 "
        "or 3, or with a layout any"
    )
    labels: Annotated[Path, AfterValidator(absolute)] | None = Field(
        default=None, description=".npy of labels (N,), whole numbers or texts"
    )
    layout: Literal["auto", "NHWC", "NCHW"] = Field(
        default="auto", description="where the channels are; auto: where the shape leaves no doubt"
    )
    image_key: str = Field(default="images", description="name of the images in a .npz")
    label_key: str = Field(default="labels", description="name of the labels in a .npz, if any")

    def open(self) -> tuple[Source, ...]:
        images, found = _load(self.path, "r"), None
        if not isinstance(images, np.ndarray):
            with images as stored:
                images = _member(self.path, stored, self.image_key)
                if self.label_key in stored.files:
                    found = _member(self.path, stored, self.label_key)
        order = _order(self.path, images, self.layout)
        if self.labels is not None:
            found = _load(self.labels)
        labels, classes = (None, None) if found is None else _labeled(found, len(images))
        shape = images.shape[1:] if images.ndim == 4 else (1, *images.shape[1:])
        if isinstance(images, np.memmap):
            if not images.flags.c_contiguous:
                raise DataError(f"{str(self.path)!r} is in Fortran's order: save it in C's")
            at, start = np.arange(len(images)), int(images.offset)
            return (StoredArray(self.path, start, shape, order, at, labels, classes),)
        pixels = torch.from_numpy(images).reshape(-1, *shape)
        pixels = pixels.permute(0, *(k + 1 for k in order)).contiguous()
        names = [f"{self.path.name}[{i}]" for i in range(len(pixels))]
        return (ArrayImages(pixels, labels, classes, names),)
