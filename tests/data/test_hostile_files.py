"""Files as the world has them, in a folder and in a shard: each an image or a bad item, named."""

import multiprocessing
import os
import resource
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.data.errors import BadItem
from fastssl.data.sources.decode import decode, decode_bytes
from fastssl.data.sources.folder import scan_folder
from fastssl.data.sources.webdataset import WebDatasetSource
from tests.data.made import encoded, noise, tar


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side: int = 60_000) -> bytes:
    """A PNG that claims side x side pixels in a few hundred bytes."""
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(100_000))
    chunks = [(b"IHDR", head), (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def frames(kind: str) -> bytes:
    """An animation whose first frame is red, and whose others are blue."""
    first, *others = (Image.new("RGB", (6, 5), c) for c in ("red", "blue", "blue"))
    options = {"lossless": True} if kind == "WEBP" else {}
    return saved(first, kind, save_all=True, append_images=others, duration=50, **options)


def palette(**options) -> bytes:
    image = Image.new("P", (6, 5), 1)
    image.putpalette([0, 0, 0, 200, 40, 90])
    return saved(image, "PNG", **options)


def turned() -> bytes:
    """Six wide and five high, and to be shown turned a quarter."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(Image.new("RGB", (6, 5), (200, 40, 90)), "JPEG", exif=exif, quality=95)


FLAT = Image.new("RGB", (6, 5), (200, 40, 90))
DEEP = Image.fromarray(np.full((5, 6), 257 * 100, np.uint16))
# name: (bytes, height, width, color of the first pixel or None)
GOOD = {
    "plain.png": (saved(FLAT, "PNG"), 5, 6, (200, 40, 90)),
    "cmyk.jpg": (saved(FLAT.convert("CMYK"), "JPEG", quality=95), 5, 6, (200, 40, 90)),
    "gray.jpg": (saved(FLAT.convert("L"), "JPEG"), 5, 6, (93, 93, 93)),
    "deep.png": (saved(DEEP, "PNG"), 5, 6, (100, 100, 100)),
    "palette.png": (palette(), 5, 6, (200, 40, 90)),
    "clear palette.png": (palette(transparency=1), 5, 6, (255, 255, 255)),
    "rgba.png": (saved(Image.new("RGBA", (6, 5), (9, 9, 9, 0)), "PNG"), 5, 6, (255, 255, 255)),
    "gray alpha.png": (saved(Image.new("LA", (6, 5), (7, 255)), "PNG"), 5, 6, (7, 7, 7)),
    "bilevel.png": (saved(Image.new("1", (6, 5), 1), "PNG"), 5, 6, (255, 255, 255)),
    "moving.gif": (frames("GIF"), 5, 6, (255, 0, 0)),
    "moving.png": (frames("PNG"), 5, 6, (255, 0, 0)),
    "moving.webp": (frames("WEBP"), 5, 6, (255, 0, 0)),
    "pages.tif": (frames("TIFF"), 5, 6, (255, 0, 0)),
    "one.png": (encoded(9, size=(1, 1)), 1, 1, (9, 0, 0)),
    "thin.png": (encoded(9, size=(20_000, 10)), 10, 20_000, (9, 0, 0)),
    "png in truth.jpg": (encoded(9), 5, 6, (9, 0, 0)),
    "turned.jpg": (turned(), 6, 5, (200, 40, 90)),
    "ü 猫\nnext line.png": (encoded(9), 5, 6, (9, 0, 0)),
    "trailing.png": (encoded(9) + b"junk" * 100, 5, 6, (9, 0, 0)),
}
BAD = {
    "cut.jpg": (noise("JPEG", 64)[:-900], "truncated"),
    "cut.png": (noise("PNG", 64)[:-900], "truncated"),
    "cut in the header.jpg": (noise("JPEG")[:30], "."),
    "zero.jpg": (b"", "cannot identify an image in its 0 bytes"),
    "zeros.png": (bytes(5000), "cannot identify an image in its 5000 bytes"),
    "text.jpg": (b"<html>404 Not Found</html>", "cannot identify"),
    "header.png": (b"\x89PNG\r\n\x1a\n" + bytes(100), "cannot identify"),
    "damaged.png": (encoded(9)[:40] + b"\xff" * 20 + encoded(9)[60:], "."),
    "bomb.png": (bomb(), "above Pillow's limit|decompression bomb"),
    "small bomb.png": (bomb(12_000), "above Pillow's limit"),  # within twice the limit
    "program.png": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        "PostScript",
    ),
}


def in_a_folder(path, name, data):
    (path / name).write_bytes(data)
    (whole,) = scan_folder(path)
    return whole, name


def in_a_shard(path, name, data):
    tar(path / "a.tar", [(name, data)])
    (whole,) = WebDatasetSource(path=str(path)).open()
    return whole, "a.tar/" + os.path.splitext(name)[0]


PLACES = {"folder": in_a_folder, "shard": in_a_shard}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", GOOD)
def test_an_odd_image_is_an_image(tmp_path, place, name):
    data, H, W, color = GOOD[name]
    source, title = PLACES[place](tmp_path, name, data)
    pixels = source.item(0)
    assert source.name(0) == title and source.encoded(0) == data
    assert pixels.shape == (3, H, W) and pixels.dtype == torch.uint8
    assert (pixels[:, 0, 0].int() - torch.tensor(color)).abs().max() <= 3


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", BAD)
def test_a_broken_image_is_a_bad_item(tmp_path, place, name):
    data, words = BAD[name]
    source, title = PLACES[place](tmp_path, name, data)
    with pytest.raises(BadItem, match=words) as error:
        source.item(0)
    assert error.value.name == title and error.value.reason and "\n" not in error.value.reason
    assert str(tmp_path) not in error.value.reason and "0x" not in error.value.reason


def _decoded_in_little_memory(path, queue):
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 2**28
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        decode(path, "a.png")
    except BadItem as error:
        queue.put(str(error))
    except MemoryError:
        queue.put("no memory")


def test_a_bomb_takes_no_memory(tmp_path):
    """Of a process that may have 256 MiB more than it has when it begins."""
    (tmp_path / "a.png").write_bytes(bomb())
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=_decoded_in_little_memory, args=(tmp_path / "a.png", queue))
    process.start()
    process.join(300)
    assert process.exitcode == 0
    said = queue.get()
    assert said.startswith("a.png: ") and "3600000000 pixels" in said


def test_a_file_that_vanishes_or_becomes_another_after_the_scan(tmp_path):
    for name in ("a.png", "b.png", "c.png", "d.png"):
        (tmp_path / name).write_bytes(encoded(9))
    (whole,) = scan_folder(tmp_path)
    (tmp_path / "a.png").unlink()
    (tmp_path / "b.png").unlink()
    (tmp_path / "b.png").mkdir()
    (tmp_path / "c.png").unlink()
    (tmp_path / "c.png").symlink_to("c.png")
    (tmp_path / "d.png").write_bytes(b"")
    reasons = ("No such file", "Is a directory", "Too many levels of symbolic links", "0 bytes")
    for i, reason in enumerate(reasons):
        for read in (whole.item, whole.encoded):
            if i == 3 and read == whole.encoded:
                assert read(i) == b""  # nobody has looked at it
                continue
            with pytest.raises(BadItem, match=f"^{'abcd'[i]}.png: .*{reason}"):
                read(i)


def test_a_folder_that_vanishes_during_the_scan_of_links(tmp_path):
    """Links in circles, to nothing and to themselves: the rest is found."""
    (tmp_path / "x/y").mkdir(parents=True)
    (tmp_path / "x/y/a.png").write_bytes(encoded(1))
    (tmp_path / "x/y/round").symlink_to(tmp_path / "x")
    (tmp_path / "x/self").symlink_to("self")
    (tmp_path / "x/gone.png").symlink_to("nowhere.png")
    (whole,) = scan_folder(tmp_path)
    assert [whole.name(i) for i in range(len(whole))] == ["x/y/a.png"]


def test_many_decoders_leave_no_warning(tmp_path, recwarn):
    for data, *_ in GOOD.values():
        decode_bytes(data, "a")
    assert not recwarn.list
