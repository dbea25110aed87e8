"""What a JPEG file says of itself before its pixels: enough to leave it to a fast decoder.

A file that is plain in every respect decodes to the same bytes by any libjpeg-turbo.  What is not
plain (CMYK, turned by its EXIF block, cut short, more than 8 bits, arithmetic coding) is for
images.decode_bytes, which knows what to do with it, or how to refuse it.
Source: ITU-T T.81, annex B; Exif 2.3, section 4.6.2; Adobe technical note 5116 (APP14).
"""

import re
from struct import error as StructError
from struct import unpack_from

_SOF = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive; all with Huffman codes
_OTHER_SOF = set(range(0xC3, 0xD0)) - {0xC4, 0xC8, 0xCC}
_ALONE = {0x01, *range(0xD0, 0xD8)}  # markers without a length
_ORIENTATION = 0x0112
_ADOBE_YCC = 1
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # within a scan: no stuffed byte, no restart


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) in pixels of a plain, whole JPEG file; None for everything else.

    Plain: 8 bits, Huffman-coded, grey or YCbCr, upright.  Whole: it ends as a JPEG file ends, and
    no marker stands in its one scan, which Pillow refuses and DALI reads over; other damage shows
    in decoding alone.

    >>> plain_jpeg_size(b"GIF89a") is None
    True
    """
    try:
        return _size(data) if data[:2] == b"\xff\xd8" and _ends(data) else None
    except (StructError, IndexError):  # a header that runs out of the file
        return None


def _ends(data: bytes) -> bool:
    """Whether the end-of-image marker is there, but for some padding."""
    return data[-64:].rstrip(b"\0\r\n").endswith(b"\xff\xd9")


def _size(data: bytes) -> tuple[int, int] | None:
    at, size, progressive = 2, None, False
    while True:
        while data[at] == 0xFF and data[at + 1] == 0xFF:  # fill bytes
            at += 1
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        at += 2
        if marker in _ALONE:
            continue
        if marker == 0xDA:  # the scan begins
            return size if progressive or _one_scan(data, at) else None
        if marker in _OTHER_SOF or marker == 0xD9:
            return None
        (length,) = unpack_from(">H", data, at)
        if length < 2:
            return None
        if marker in _SOF:
            bits, height, width, components = unpack_from(">BHHB", data, at + 2)
            if bits != 8 or components not in (1, 3) or height == 0 or width == 0:
                return None
            size, progressive = (height, width), marker == 0xC2
        elif marker == 0xE1 and _turned(data[at + 2 : at + length]):
            return None
        elif marker == 0xEE and _other_colours(data[at + 2 : at + length]):
            return None
        at += length


def _one_scan(data: bytes, at: int) -> bool:
    """Whether the scan goes on to the end of the image.  A progressive file has many."""
    scan = data[at:]
    if scan.count(b"\xff") == scan.count(b"\xff\0") + 1:  # the end's alone, in a tenth of the time
        return True
    found = _MARKER.search(scan)
    return found is not None and found[0] == b"\xff\xd9"


def _turned(segment: bytes) -> bool:
    """Whether an APP1 segment is an EXIF or XMP block that turns the image, or might."""
    if segment.startswith(b"http://ns.adobe.com/"):  # Pillow asks it where EXIF says nothing
        return b"tiff:Orientation" in segment
    if segment[:6] != b"Exif\0\0":
        return False
    order = {b"II": "<", b"MM": ">"}.get(segment[6:8])
    if order is None:
        return True
    (first,) = unpack_from(order + "I", segment, 10)
    (count,) = unpack_from(order + "H", segment, 6 + first)
    for entry in range(count):
        tag, _, _, value = unpack_from(order + "HHIH", segment, 6 + first + 2 + 12 * entry)
        if tag == _ORIENTATION:
            return value != 1
    return False


def _other_colours(segment: bytes) -> bool:
    """Whether Adobe's APP14 segment names another colour transform than YCbCr."""
    return segment[:5] == b"Adobe" and len(segment) > 11 and segment[11] != _ADOBE_YCC
