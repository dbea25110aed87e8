"""JPEG headers: what is plain may go to any decoder, and nothing else does."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastssl.data.errors import BadItem
from fastssl.data.render.jpeg import plain_jpeg_size
from fastssl.data.sources.decode import decode_bytes
from tests.data.photos import jpeg, photo

PIXELS = photo(0, 37, 50)
PLAIN = jpeg(PIXELS)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"progressive": True},
        {"subsampling": 0},
        {"subsampling": 1},
        {"subsampling": 2, "quality": 30},
        {"optimize": True, "comment": b"with a comment"},
        {"restart_marker_blocks": 3},
        {"icc_profile": b"a color profile" * 5000},
        {"dpi": (72, 72)},
    ],
    ids=str,
)
def test_plain_files_tell_their_size(options):
    assert plain_jpeg_size(jpeg(PIXELS, **options)) == (37, 50)


def test_gray_is_plain():
    assert plain_jpeg_size(jpeg(PIXELS[..., 0])) == (37, 50)


def test_padding_behind_the_end_is_no_harm():
    assert plain_jpeg_size(PLAIN + b"\0" * 7 + b"\n") == (37, 50)


def exif(orientation: int, order: str) -> bytes:
    tags = Image.Exif()
    tags.endian = order
    tags[0x010F] = "a maker"
    tags[0x0112] = orientation
    return tags.tobytes()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_images_are_not_plain(orientation, order):
    got = plain_jpeg_size(jpeg(PIXELS, exif=exif(orientation, order)))
    assert got == ((37, 50) if orientation == 1 else None)


def test_exif_without_orientation_is_plain():
    tags = Image.Exif()
    tags[0x010F] = "a maker"
    assert plain_jpeg_size(jpeg(PIXELS, exif=tags.tobytes())) == (37, 50)


def test_other_colors_and_formats_are_not_plain():
    file = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 4), np.uint8), "CMYK").save(file, "JPEG")
    assert plain_jpeg_size(file.getvalue()) is None
    assert plain_jpeg_size(jpeg(PIXELS, keep_rgb=True)) is None  # Adobe's transform 0
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG")
    assert plain_jpeg_size(file.getvalue()) is None
    twelve = PLAIN.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c")
    assert twelve != PLAIN and plain_jpeg_size(twelve) is None
    arithmetic = PLAIN.replace(b"\xff\xc0\x00\x11", b"\xff\xc9\x00\x11")
    assert arithmetic != PLAIN and plain_jpeg_size(arithmetic) is None


def test_a_bomb_is_not_plain(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 37 * 50 - 1)
    assert plain_jpeg_size(PLAIN) is None


def test_cut_files_are_not_plain():
    assert all(plain_jpeg_size(PLAIN[:n]) is None for n in range(len(PLAIN)))


@given(st.binary(max_size=300))
def test_anything_is_answered(data):
    size = plain_jpeg_size(b"\xff\xd8" + data + b"\xff\xd9")
    assert size is None or min(size) > 0


@given(st.integers(2, len(PLAIN) - 1), st.integers(0, 255))
def test_a_changed_byte_is_answered(at, value):
    changed = PLAIN[:at] + bytes([value]) + PLAIN[at + 1 :]
    size = plain_jpeg_size(changed)
    assert size is None or (0 < size[0] < 65536 and 0 < size[1] < 65536)


def test_an_image_that_xmp_turns_is_not_plain():
    """Fault 9: DALI left it lying."""
    packet = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    turned = jpeg(PIXELS, xmp=packet)
    assert plain_jpeg_size(turned) is None
    assert plain_jpeg_size(jpeg(PIXELS, xmp=b"<x:xmpmeta/>")) == (37, 50)
    assert decode_bytes(turned, "x").shape == (3, 50, 37)


def test_a_scrambled_scan_is_not_plain():
    """Fault 9: DALI reads over markers within a scan, which Pillow refuses."""
    draw, refused = np.random.default_rng(0), 0
    for options in ({}, {"quality": 95}, {"restart_marker_blocks": 3}):
        data = jpeg(PIXELS, **options)
        start = data.index(b"\xff\xda") + 12
        for _ in range(60):
            scrambled = bytearray(data)
            for at in draw.integers(start, len(data) - 2, 30):
                scrambled[at] = draw.integers(256)
            try:
                decode_bytes(bytes(scrambled), "x")
            except BadItem:
                refused += 1
                assert plain_jpeg_size(bytes(scrambled)) is None
    assert refused > 10
