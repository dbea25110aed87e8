"""What a JPEG file says of itself before its pixels: enough to leave it to a fast decoder.

A file that is plain in every respect decodes to the same bytes by any libjpeg-turbo.  What is not
plain (CMYK, turned by its EXIF block, cut short, more than 8 bits, arithmetic coding) is for
sources/decode.py, which knows what to do with it, or how to refuse it.
Source: ITU-T T.81, annex B; Adobe technical note 5116 (APP14).
"""

import re
import warnings
from io import BytesIO
from struct import pack

from PIL import Image

_ORIENTATION = 0x0112
_ADOBE_YCC = 1
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # within a scan: no stuffed byte, no restart
_OTHER_FRAME = rb"\xff[\xc3\xc5-\xc7\xc9-\xcb\xcd-\xcf]\x00.\x08"  # lossless, or arithmetic codes


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) in pixels of a plain, whole JPEG file; None for everything else.

    Plain: 8 bits, Huffman-coded, gray or YCbCr, upright.  Whole: it ends as a JPEG file ends, and
    no marker stands in its one scan, which Pillow refuses and DALI reads over; other damage shows
    in decoding alone.

    >>> plain_jpeg_size(b"GIF89a") is None
    True
    """
    if data[:2] != b"\xff\xd8" or not data[-64:].rstrip(b"\0\r\n").endswith(b"\xff\xd9"):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of a bomb, which is decode_bytes's to refuse
            with Image.open(BytesIO(data), formats=["JPEG"]) as image:
                return image.size[::-1] if _is_plain(image, data) else None
    except Exception:  # a damaged header leads the reader anywhere
        return None


def _is_plain(image: Image.Image, data: bytes) -> bool:
    (W, H), scan = image.size, image.fp.tell()  # type: ignore[attr-defined]
    other = re.search(_OTHER_FRAME + re.escape(pack(">HH", H, W)), data[:scan], re.DOTALL)
    return (
        image.mode in ("L", "RGB")
        and image.info.get("adobe_transform", _ADOBE_YCC) == _ADOBE_YCC
        and image.getexif().get(_ORIENTATION, 1) == 1
        and other is None
        and ("progressive" in image.info or _one_scan(data, scan))
    )


def _one_scan(data: bytes, at: int) -> bool:
    """Whether the scan goes on to the end of the image.  A progressive file has many."""
    scan = data[at:]
    if scan.count(b"\xff") == scan.count(b"\xff\0") + 1:  # the end's alone, in a tenth of the time
        return True
    found = _MARKER.search(scan)
    return found is not None and found[0] == b"\xff\xd9"
