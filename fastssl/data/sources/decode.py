"""Decoding one image, of any format and mode Pillow reads, to uint8 (3, H, W).

Color is what a viewer would show: EXIF orientation applied, transparency over white, CMYK and
palettes converted, 16-bit gray scaled to 8, and float images stretched unless they are in [0, 1].
"""

import errno
import os
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError, features
from torch import Tensor

from fastssl.data.errors import BadItem
from fastssl.data.sources.base import Items

SUFFIXES = frozenset(
    (
        ".jpg .jpeg .jpe .jfif .png .bmp .webp .tif .tiff .gif .ppm .pgm .pbm .pnm .tga .jp2"
        + " .avif" * bool(features.check("avif"))
    ).split()
)
_ORIENTATION = 0x0112  # the EXIF tag
# What fails for want of files, memory or a server says nothing of the image.  An I/O error is of
# the place where the file lies; a disk that fails everywhere shows as mostly bad items.
_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)
_STRIP = 2**22  # pixels
Convert = Callable[[Image.Image], Tensor]
MOST_BYTES = 2**31  # of a file: above what any image within Pillow's limit of pixels takes


def of_the_machine(error: Exception) -> bool:
    code = error.errno if isinstance(error, OSError) else None
    return isinstance(error, MemoryError) or code in _MACHINE


def _deep_to_8_bit(image: Image.Image) -> Image.Image:
    """Gray images of more than 8 bits, which Pillow's own conversion clips to white."""
    pixels = np.asarray(image, np.float64)
    if image.mode == "F":
        low, high = float(pixels.min()), float(pixels.max())
        if not np.isfinite(high - low):
            raise ValueError("pixels are not finite")
        if low < 0 or high > 1:
            pixels = (pixels - low) / max(high - low, np.finfo(np.float64).tiny)
        pixels = pixels * 255
    else:
        pixels = pixels.clip(0, 65535) / 257
    return Image.fromarray(pixels.round().astype(np.uint8))


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(_ORIENTATION, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except Exception as error:  # a damaged EXIF block says nothing against the pixels
        if of_the_machine(error):
            raise
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _deep_to_8_bit(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _pixels(data: bytes, convert: Convert) -> Tensor:
    with Image.open(BytesIO(data)) as image:
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and image.width * image.height > limit:
            size = f"{image.width} x {image.height}"
            raise ValueError(f"{size} pixels are above Pillow's limit of {limit} (a bomb?)")
        if image.format == "EPS":  # Pillow would run Ghostscript on it
            raise ValueError("PostScript is a program, not pixels")
        image.load()
        return convert(_upright(image))


def _converted(image: Image.Image) -> Tensor:
    """Its pixels, uint8 (3, H, W).  A large one is converted in strips, since each step is a copy;
    one of floats, which are stretched by its extremes, as a whole."""
    image = _deep_to_8_bit(image) if image.mode == "F" else image
    W, H = image.size
    rows = max(_STRIP // W, 1)
    pixels = torch.empty(3, H, W, dtype=torch.uint8)
    for top in range(0, H, rows):
        strip = image if rows >= H else image.crop((0, top, W, min(top + rows, H)))
        pixels[:, top : top + rows] = torch.from_numpy(np.array(_to_rgb(strip))).permute(2, 0, 1)
    return pixels


def _reason(error: Exception) -> str:
    what = error.strerror if isinstance(error, OSError) else None
    return " ".join((what or str(error) or type(error).__name__).split())


def decode_bytes(data: bytes, name: str, convert: Convert = _converted) -> Tensor:
    """The pixels of an encoded image, uint8 (3, H, W), or as `convert` has them of a Pillow image;
    its first frame if it has several.

    Raises BadItem(name, reason) for whatever cannot be read as an image.  A failure of
    the machine (no memory or file handle left, a disk's I/O error) is raised as it is.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the limit is checked above, odd metadata is harmless
            return _pixels(data, convert)
    except UnidentifiedImageError as error:
        raise BadItem(name, f"cannot identify an image in its {len(data)} bytes") from error
    except Exception as error:  # decoders raise whatever the bytes lead them to
        if of_the_machine(error):
            raise
        raise BadItem(name, _reason(error)) from error


def read_bytes(path: Path, name: str) -> bytes:
    """A file as it is.

    Raises BadItem(name, reason) for one that vanished, is no file or may not be read, and for 2 GiB
    and more.  A failure of the machine is raised as it is.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size >= MOST_BYTES:
                raise ValueError(f"{size} bytes are too many for one item")
            return file.read()
    except (OSError, ValueError) as error:  # ValueError: also a name with a null byte
        if of_the_machine(error):
            raise
        raise BadItem(name, _reason(error)) from error


class EncodedItems(Items):
    """Items that are kept as encoded images.  A subclass defines `encoded`."""

    channels = 3

    def encoded(self, i: int) -> bytes:
        """The bytes of image i as stored.  Raises BadItem."""
        raise TypeError(f"{type(self).__name__} does not define encoded(i)")

    def item(self, i: int) -> Tensor:
        """Image i, uint8 (3, H, W).  Raises BadItem."""
        return decode_bytes(self.encoded(i), self.name(i))


def decode(path: Path, name: str) -> Tensor:
    """`decode_bytes` of a file.  Raises BadItem(name, reason), and a failure of the machine."""
    return decode_bytes(read_bytes(path, name), name)
