"""How the files of one stream are read: in color, as gray, or as numbers in units of their own.

color    uint8 (3, H, W), as decode.py does
gray     uint8 (1, H, W): its luma, of 16-bit files the upper byte
values   float32 (C, H, W), as they are: of images with one number a pixel (8, 16 or 32 bits, or
         floats), such as depths in millimeters, and of .npy files (H, W) or (C, H, W)
"""

from collections.abc import Mapping
from io import BytesIO
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastssl.data.errors import BadItem, DataError
from fastssl.data.sources.base import EncodedSource
from fastssl.data.sources.decode import decode_bytes, of_the_machine

Read = Literal["color", "gray", "values"]
_NPY = b"\x93NUMPY"
_DEEP = ("I", "F")  # what the modes of images of more than 8 bits begin with
_LOOKED_AT = 16  # files, for a first one that can be read


def decode_gray(data: bytes, name: str) -> Tensor:
    """The luma of an encoded image, uint8 (1, H, W).  Raises BadItem."""
    if data.startswith(_NPY):
        raise BadItem(name, "a .npy file is read as values, not as gray")
    pixels = decode_bytes(data, name)
    if torch.equal(pixels[0], pixels[1]) and torch.equal(pixels[0], pixels[2]):
        return pixels[:1].clone()
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    return (pixels * weights).sum(0, keepdim=True).round().to(torch.uint8)


def _numbers(image: Image.Image) -> Tensor:
    if image.mode not in ("1", "L") and not image.mode.startswith(_DEEP):
        raise ValueError(f"a pixel of mode {image.mode} is not one number: read it as color")
    return torch.from_numpy(np.array(image, np.float32))[None]


def _array(data: bytes) -> Tensor:
    x = np.lib.format.read_array(BytesIO(data), allow_pickle=False)
    x = x[None] if x.ndim == 2 else x
    if x.dtype.kind not in "uif" or x.ndim != 3 or 0 in x.shape or x.shape[0] > x.shape[2]:
        raise ValueError(f"an array {x.dtype} {list(x.shape)}, want numbers (H, W) or (C, H, W)")
    with np.errstate(over="ignore"):  # what is too large is not finite then
        return torch.from_numpy(np.ascontiguousarray(x, np.float32))


def decode_values(data: bytes, name: str) -> Tensor:
    """The numbers of an image or of a .npy file, float32 (C, H, W).  Raises BadItem."""
    if data.startswith(_NPY):
        try:
            found = _array(data)
        except Exception as error:  # a damaged header leads the reader anywhere
            if of_the_machine(error):
                raise
            raise BadItem(name, " ".join(str(error).split())) from error
    else:
        found = decode_bytes(data, name, _numbers)
    if not torch.isfinite(found).all():
        raise BadItem(name, "values that are not finite")
    return found


class ReadAs:
    """Encoded images, decoded otherwise than in color."""

    def __init__(self, files: EncodedSource, how: Read, channels: int):
        self.files, self.how, self.channels, self.floats = files, how, channels, how == "values"
        self.labels, self.classes = files.labels, files.classes

    def __len__(self) -> int:
        return len(self.files)

    def name(self, i: int) -> str:
        return self.files.name(i)

    def item(self, i: int) -> Tensor:
        """Image i.  Raises BadItem, also where it has other channels than the first."""
        decode = decode_values if self.how == "values" else decode_gray
        found = decode(self.files.encoded(i), self.name(i))
        if len(found) != self.channels:
            what = f"{len(found)} channels, and the first file has {self.channels}"
            raise BadItem(self.name(i), what)
        return found

    def select(self, indices: np.ndarray) -> "ReadAs":
        return type(self)(self.files.select(indices), self.how, self.channels)  # type: ignore


class Grays(ReadAs):
    """Gray images, whose files others may decode."""

    def encoded(self, i: int) -> bytes:
        """File i as it is.  Raises BadItem."""
        return self.files.encoded(i)


def read_as(files: EncodedSource, how: Read, stream: str) -> EncodedSource | ReadAs:
    """The images of a stream, decoded as `how` says.

    Raises DataError where none of the first can be, and where color would lose what files of more
    than 8 bits, or of numbers, hold.
    """
    if how == "gray":
        return Grays(files, how, 1)
    bad: list[BadItem] = []
    for i in range(min(len(files), _LOOKED_AT)):
        try:
            data = files.encoded(i)
            if how == "values":
                return ReadAs(files, how, len(decode_values(data, files.name(i))))
            mode = "F" if data.startswith(_NPY) else _mode(data)
            if not mode:  # its item will say why
                continue
            if mode.startswith(_DEEP):
                raise DataError(
                    f"{files.name(i)!r} of stream {stream!r} holds more than 8 bits a pixel: set "
                    f"data.source.read.{stream} to values (its own numbers, float32), or to gray"
                )
            return files
        except BadItem as error:
            bad.append(error)
    if how == "values" and bad:
        raise DataError(
            f"stream {stream!r} cannot be read as values ({bad[0].name}: {bad[0].reason}): mend "
            f"its files, or set data.source.read.{stream} to color or gray"
        )
    return files


def _mode(data: bytes) -> str:
    """The mode of an image that Pillow reads; nothing of what it does not."""
    try:
        with Image.open(BytesIO(data)) as image:
            return image.mode
    except Exception as error:
        if of_the_machine(error):
            raise
        return ""


def check_read(read: Mapping[str, Read], streams: Mapping[str, object]) -> None:
    """Raise DataError for a stream in `read` that there is not."""
    for name in read:
        if name not in streams:
            known = ", ".join(streams) or "none"
            raise DataError(f"data.source.read has {name!r}, and the streams are {known}")
