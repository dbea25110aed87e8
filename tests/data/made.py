"""Files of each format, made for the tests."""

import io
import struct
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c


def encoded(k: int = 0, kind: str = "PNG", size: tuple[int, int] = (6, 5), **options) -> bytes:
    """A flat image whose red is k."""
    file = io.BytesIO()
    Image.new("RGB", size, (k, 0, 0)).save(file, kind, **options)
    return file.getvalue()


def noise(kind: str, side: int = 16, **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def tar(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def shard(path: Path, first: int, count: int, labels: bool = True) -> Path:
    """Samples first, ..., of key 000k: a PNG whose red is k, and the label k % 3."""
    members = []
    for k in range(first, first + count):
        members.append((f"{k:04d}.png", encoded(k)))
        if labels:
            members.append((f"{k:04d}.cls", str(k % 3).encode()))
    return tar(path, members)


def _varint(n: int) -> bytes:
    n, out = n % 2**64, b""
    while n > 127:
        n, out = n >> 7, out + bytes([n & 127 | 128])
    return out + bytes([n])


def field(number: int, data: bytes) -> bytes:
    """A protobuf field of bytes."""
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def example(features: dict[str, bytes | str | int | float], packed: bool = True) -> bytes:
    """A serialized tf.train.Example."""
    entries = b""
    for key, value in features.items():
        if isinstance(value, float):
            values = field(2, field(1, struct.pack("<f", value)))
        elif isinstance(value, int):
            values = field(3, field(1, _varint(value)) if packed else b"\x08" + _varint(value))
        else:
            values = field(1, field(1, value if isinstance(value, bytes) else value.encode()))
        entries += field(1, field(1, key.encode()) + field(2, values))
    return field(1, entries)


def record(data: bytes) -> bytes:
    head = struct.pack("<Q", len(data))
    crcs = [struct.pack("<I", masked_crc32c(part)) for part in (head, data)]
    return head + crcs[0] + data + crcs[1]


def tfrecord(path: Path, first: int, count: int) -> Path:
    """Records first, ...: a PNG whose red is k, and the label k % 3."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = (
        {"image/format": "png", "image/encoded": encoded(k), "image/class/label": k % 3}
        for k in range(first, first + count)
    )
    path.write_bytes(b"".join(record(example(row)) for row in rows))
    return path


def reds(source) -> list[int]:
    return [int(source.item(i)[0, 0, 0]) for i in range(len(source))]


def names(source) -> list[str]:
    return [source.name(i) for i in range(len(source))]
