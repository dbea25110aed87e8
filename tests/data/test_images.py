"""Decoding: every mode as a viewer would show it, every broken file named."""

import errno
import warnings
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.data.errors import BadItem
from fastssl.data.sources import decode as room
from fastssl.data.sources.decode import decode, decode_bytes, read_bytes

RNG = np.random.default_rng(0)
RGB = np.kron(RNG.integers(0, 256, (3, 4, 3)), np.ones((8, 8, 1))).astype(np.uint8)  # 24 x 32


def read(path):
    return decode(path, path.name).permute(1, 2, 0).numpy()


def saved(tmp_path, picture, name, **options):
    picture.save(tmp_path / name, **options)
    return tmp_path / name


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp", "ppm", "gif"])
def test_lossless_formats(tmp_path, suffix):
    pixels = RGB if suffix != "gif" else np.where(RGB > 127, 255, 0).astype(np.uint8)
    options = {"lossless": True} if suffix == "webp" else {}
    path = saved(tmp_path, Image.fromarray(pixels), f"a.{suffix}", **options)
    assert (read(path) == pixels).all()


def test_jpeg_and_cmyk_jpeg(tmp_path):
    flat = Image.new("RGB", (16, 16), (200, 40, 90))
    plain = saved(tmp_path, flat, "a.jpg", quality=95)
    cmyk = saved(tmp_path, flat.convert("CMYK"), "b.jpg", quality=95)
    for path in (plain, cmyk):
        assert np.abs(read(path).astype(int) - (200, 40, 90)).max() <= 3


def test_transparency_goes_over_white(tmp_path):
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (10, 20, 30, 255)
    pixels[1, 1] = (0, 0, 0, 128)
    got = read(saved(tmp_path, Image.fromarray(pixels), "a.png"))
    assert got[0, 0].tolist() == [10, 20, 30] and got[0, 1].tolist() == [255] * 3
    assert np.abs(got[1, 1].astype(int) - 127).max() <= 1
    gray = read(saved(tmp_path, Image.fromarray(pixels).convert("LA"), "b.png"))
    assert gray[0, 1].tolist() == [255] * 3


def test_palette_with_and_without_transparency(tmp_path):
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putdata([0, 1])
    plain = read(saved(tmp_path, picture, "a.png"))
    assert plain[0].tolist() == [[255, 0, 0], [0, 0, 255]]
    clear = read(saved(tmp_path, picture, "b.png", transparency=b"\xff\x00"))
    assert clear[0].tolist() == [[255, 0, 0], [255, 255, 255]]


def test_sixteen_bit_is_scaled_not_clipped(tmp_path):
    deep = np.array([[0, 257 * 100, 65535]], np.uint16)
    for name in ("a.png", "a.tif"):
        got = read(saved(tmp_path, Image.fromarray(deep), name))
        assert got[0, :, 0].tolist() == [0, 100, 255] and (got == got[..., :1]).all()
    wide = Image.fromarray(deep.astype(np.int32))
    assert read(saved(tmp_path, wide, "b.tif"))[0, :, 1].tolist() == [0, 100, 255]


def test_float_images(tmp_path):
    for values in ([0.0, 0.4, 1.0], [-2.0, 0.0, 3.0], [-0.5, -0.1, 0.5], [0.0, 40.0, 100.0]):
        path = saved(tmp_path, Image.fromarray(np.array([values], np.float32)), "a.tif")
        assert read(path)[0, :, 0].tolist() == [0, 102, 255]


def test_float_images_within_0_and_1_keep_their_gray(tmp_path):
    path = saved(tmp_path, Image.fromarray(np.array([[0.2, 0.4]], np.float32)), "a.tif")
    assert read(path)[0, :, 0].tolist() == [51, 102]


def test_bilevel_and_gray_become_three_channels(tmp_path):
    gray = Image.fromarray(RGB[..., 0])
    assert (read(saved(tmp_path, gray, "a.png")) == RGB[..., :1]).all()
    bits = read(saved(tmp_path, gray.convert("1"), "b.png"))
    assert bits.shape == RGB.shape and set(np.unique(bits)) <= {0, 255}


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned a quarter to the right
    path = saved(tmp_path, Image.fromarray(RGB), "a.png", exif=exif)
    assert (read(path) == np.rot90(RGB, -1)).all()


def test_damaged_exif_leaves_the_pixels(tmp_path):
    path = saved(tmp_path, Image.fromarray(RGB), "a.png", exif=b"Exif\x00\x00garbage")
    assert (read(path) == RGB).all()


def test_first_frame_of_several(tmp_path):
    frames = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    path = saved(tmp_path, frames[0], "a.tif", save_all=True, append_images=frames[1:])
    assert (read(path) == RGB).all()


def _truncated(path):
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8)).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:-400])


def _not_finite(path):
    Image.fromarray(np.array([[0.0, np.nan]], np.float32)).save(path, "TIFF")


BROKEN = {
    "empty": (lambda p: p.write_bytes(b""), "cannot identify"),
    "text": (lambda p: p.write_text("no picture"), "cannot identify"),
    "truncated": (_truncated, "truncated"),
    "missing": (lambda p: None, "No such file"),
    "folder": (lambda p: p.mkdir(), "directory"),
    "not finite": (_not_finite, "not finite"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_file_is_named_with_its_reason(tmp_path, kind):
    make, words = BROKEN[kind]
    path = tmp_path / "a b é.jpg"
    make(path)
    with pytest.raises(BadItem) as error:
        decode(path, "class/a b é.jpg")
    assert error.value.name == "class/a b é.jpg" and words in error.value.reason
    assert str(tmp_path) not in error.value.reason


def failing(error):
    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.mark.parametrize(
    "error",
    [
        *(OSError(getattr(errno, n), n) for n in ("EMFILE", "ENFILE", "ENOMEM", "ESTALE")),
        MemoryError(),
    ],
    ids=repr,
)
def test_a_failing_machine_is_not_a_bad_image(tmp_path, monkeypatch, error):
    path = saved(tmp_path, Image.fromarray(RGB), "a.png")
    for name in ("open", "Image.getexif"):
        with monkeypatch.context() as patch:
            patch.setattr(f"PIL.Image.{name}", failing(error))
            with pytest.raises(type(error)) as seen:
                read(path)
            assert seen.value is error


@pytest.mark.parametrize("code", ["EMFILE", "ENFILE", "ENOMEM", "ESTALE"])
def test_a_failing_disk_is_not_a_bad_file(tmp_path, monkeypatch, code):
    path = saved(tmp_path, Image.fromarray(RGB), "a.png")
    monkeypatch.setattr("builtins.open", failing(OSError(getattr(errno, code), code)))
    with pytest.raises(OSError, match=code):
        read(path)


def test_bytes_and_files_are_read_alike(tmp_path):
    path = saved(tmp_path, Image.fromarray(RGB), "a.png")
    assert torch.equal(decode_bytes(path.read_bytes(), "a"), decode(path, "a"))
    with pytest.raises(BadItem, match="^a: cannot identify an image in its 9 bytes$"):
        decode_bytes(b"no pixels", "a")
    with pytest.raises(BadItem, match="PostScript is a program"):
        decode_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "a")
    with pytest.raises(BadItem, match="null byte"):
        read_bytes(tmp_path / "a\0b", "a")


def test_a_file_of_gigabytes_is_not_read(tmp_path):
    with open(tmp_path / "a.tif", "wb") as file:
        file.truncate(2**31)  # sparse
    with pytest.raises(BadItem, match="2147483648 bytes are too many"):
        decode(tmp_path / "a.tif", "a.tif")


def test_a_file_one_may_not_read_is_bad(tmp_path, monkeypatch):
    path = saved(tmp_path, Image.fromarray(RGB), "a.png")
    monkeypatch.setattr("builtins.open", failing(PermissionError(errno.EACCES, "not yours")))
    with pytest.raises(BadItem, match="not yours"):
        read(path)


@pytest.mark.parametrize("limit", [700, 300])  # 24 x 32 = 768: above the limit, above twice it
def test_decompression_bomb_is_bad_and_silent(tmp_path, monkeypatch, limit):
    path = saved(tmp_path, Image.fromarray(RGB), "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(BadItem, match="limit|bomb"):
            read(path)
    assert not seen
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert (read(path) == RGB).all()


def test_a_large_image_is_converted_in_strips(monkeypatch):
    """Fault 42: each step of a conversion was a copy of the whole: 2.7 GB for 9,400 x 9,400."""
    seen, to_rgb = [], room._to_rgb

    def look(image):
        seen.append(image.width * image.height)
        return to_rgb(image)

    monkeypatch.setattr(room, "_to_rgb", look)
    pixels = np.random.default_rng(0).integers(0, 256, (37, 20, 4), np.uint8)
    gray = pixels[..., 0].astype(np.uint16) * 257
    for array in (
        pixels,
        pixels[..., :3],
        pixels[..., 0],
        pixels[..., :2],
        gray,
        pixels[..., 0] / 9,
    ):
        mode = "LA" if array.shape[-1] == 2 else None
        image = Image.fromarray(array.astype(np.float32) if array.dtype == float else array, mode)
        file = BytesIO()
        image.save(file, "TIFF" if image.mode == "F" else "PNG")
        monkeypatch.setattr(room, "_STRIP", 2**22)
        whole = decode_bytes(file.getvalue(), "x")
        monkeypatch.setattr(room, "_STRIP", 100)
        seen.clear()
        assert torch.equal(decode_bytes(file.getvalue(), "x"), whole)
        assert seen and max(seen) <= 100
