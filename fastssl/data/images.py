"""Decoding one image file, of any mode Pillow reads, to uint8 (3, H, W).

Colour is what a viewer would show: EXIF orientation applied, transparency over white, CMYK and
palettes converted, 16-bit grey scaled to 8, and float images stretched unless they are in [0, 1].
"""

import errno
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .errors import BadItem

SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .bmp .webp .tif .tiff .gif .ppm .pgm .pbm .pnm .tga .jp2".split()
)
_ORIENTATION = 0x0112  # the EXIF tag
# What fails for want of files, memory or a disk says nothing of the image.
_MACHINE = (errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOMEM, errno.ESTALE)


def _of_the_machine(error: Exception) -> bool:
    code = error.errno if isinstance(error, OSError) else None
    return isinstance(error, MemoryError) or code in _MACHINE


def _deep_to_8_bit(image: Image.Image) -> Image.Image:
    """Grey images of more than 8 bits, which Pillow's own conversion clips to white."""
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
        if _of_the_machine(error):
            raise
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _deep_to_8_bit(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _decode(path: Path) -> Tensor:
    with Image.open(path) as image:
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and image.width * image.height > limit:
            size = f"{image.width} x {image.height}"
            raise ValueError(f"{size} pixels are above Pillow's limit of {limit} (a bomb?)")
        image.load()
        pixels = np.array(_to_rgb(_upright(image)))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def decode(path: Path, name: str) -> Tensor:
    """The pixels of an image file, uint8 (3, H, W); its first frame if it has several.

    Raises BadItem(name, reason) for whatever cannot be read as an image.  A failure of
    the machine (no memory or file handle left, a disk's I/O error) is raised as it is.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the limit is checked above, odd metadata is harmless
            return _decode(path)
    except Exception as error:  # decoders raise whatever the bytes lead them to
        if _of_the_machine(error):
            raise
        what = str(error).replace(str(path), "the file") or type(error).__name__
        raise BadItem(name, " ".join(what.split())) from error
