"""Any source of images written as WebDataset shards, which read fast from any disk or store.

OUT/train-000000.tar ...   and OUT/val-... in folders train/ and val/ where the source comes split
OUT/*.idx, *.labels        each shard's index (tars.py) and labels (records.py)
OUT/manifest.json          counts, class names, each shard's checksum, and what was left out, why

Images stay the bytes that they are.  The same images make the same bytes: members have no times and
no owners.  All is written aside and renamed when complete.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import tarfile
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from fastssl.data.errors import BadItem, DataError
from fastssl.data.sources.base import EncodedSource, Source
from fastssl.data.sources.decode import SUFFIXES, decode_bytes
from fastssl.data.sources.records import SUFFIX, Label, labels_text
from fastssl.data.sources.tars import BLOCK, Component, Sample, index_text
from fastssl.data.sources.webdataset import MANIFEST

FORMAT = 1
_MAGIC = (
    *((b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png"), (b"GIF8", "gif"), (b"BM", "bmp")),
    *((b"II*\0", "tif"), (b"MM\0*", "tif"), (b"\0\0\0\x0cjP", "jp2")),
)


class PackError(DataError):
    """The shards could not be written."""


@dataclass(frozen=True)
class PackOptions:
    """shard_bytes: a shard's size, at most, unless one image is larger.

    max_side: images whose shorter side is longer, in pixels, become JPEGs where it is that.
    check: decode every image and leave out those that cannot be, as max_side does in any case.
    overwrite: replace what an earlier pack wrote there.
    workers: threads that read and decode.
    """

    shard_bytes: int = 256 * 2**20
    max_side: int | None = None
    check: bool = True
    overwrite: bool = False
    workers: int = min(8, os.cpu_count() or 1)

    def __post_init__(self):
        for name in ("shard_bytes", "max_side", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DataError(f"{name} {value} is not positive: give 1 or more")


class _Image(NamedTuple):
    extension: str
    data: bytes


def _extension(data: bytes, name: str) -> str:
    """By the bytes, since names can be wrong; by the name where they are not known."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    found = next((ext for magic, ext in _MAGIC if data.startswith(magic)), None)
    suffix = os.path.splitext(name)[1].lower()
    return found or (suffix[1:] if suffix in SUFFIXES else "jpg")


def _saved(pixels: Tensor, kind: str, size: tuple[int, int] | None = None, **options: Any) -> bytes:
    """An encoded image of pixels, uint8 (1 or 3, H, W), at size (W, H) if given."""
    image = Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).numpy())
    if size is not None:
        image = image.resize(size, Image.Resampling.LANCZOS)
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _read(source: Source, i: int, options: PackOptions) -> _Image:
    """Image i as it will be kept.  Raises BadItem."""
    name = source.name(i)
    if isinstance(source, EncodedSource):
        data = source.encoded(i)
        if not (options.check or options.max_side):
            return _Image(_extension(data, name), data)
        pixels = decode_bytes(data, name)
    else:
        data, pixels = None, source.item(i)
        if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[0] not in (1, 3):
            got = f"{pixels.dtype} {list(pixels.shape)}"
            raise PackError(f"{name!r} is no image but {got}: pack takes sources of images")
    H, W = pixels.shape[1:]
    side = options.max_side
    if side is not None and min(H, W) > side:
        size = (max(1, round(W * side / min(H, W))), max(1, round(H * side / min(H, W))))
        return _Image("jpg", _saved(pixels, "JPEG", size, quality=90))
    if data is None:
        return _Image("png", _saved(pixels, "PNG"))
    return _Image(_extension(data, name), data)


def _in_order(
    source: Source, options: PackOptions, pool: ThreadPoolExecutor
) -> Iterator[tuple[int, _Image | BadItem]]:
    """Every image or what is wrong with it, in order, a few read ahead."""

    def read(i: int) -> _Image | BadItem:
        try:
            return _read(source, i, options)
        except BadItem as error:
            return error

    ahead: deque[tuple[int, Future]] = deque()
    try:
        for i in range(len(source)):
            ahead.append((i, pool.submit(read, i)))
            if len(ahead) > 2 * options.workers:
                number, future = ahead.popleft()
                yield number, future.result()
        while ahead:
            number, future = ahead.popleft()
            yield number, future.result()
    finally:
        for _, future in ahead:
            future.cancel()


def _key(i: int, name: str) -> str:
    """A member's name without its extension: sorted as the images are, plain, and short."""
    stem = os.path.splitext(name)[0]
    return f"{i:08d}-{re.sub(r'[^A-Za-z0-9]+', '_', stem)[-60:].strip('_')}"


class _Shard:
    """One tar file being written."""

    def __init__(self, path: Path):
        self.path, self.size = path, 0
        self.samples: list[Sample] = []
        self.labels: list[Label] = []
        self._hash = hashlib.sha256()
        self._file: IO[bytes] = open(path, "wb")

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    def add(self, key: str, image: _Image, label: int | None) -> None:
        members = [(image.extension, image.data)]
        members += [] if label is None else [("cls", str(label).encode())]
        sample = []
        for extension, data in members:
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size = len(data)
            self._write(info.tobuf(tarfile.USTAR_FORMAT))
            sample.append(Component(extension, self.size, len(data), info.name))
            self._write(data + bytes(-len(data) % BLOCK))
        self.samples.append(sample)
        self.labels.append(label)

    def end(self) -> dict[str, Any]:
        """Close it, write what lies beside it, and tell of it."""
        self._write(bytes(2 * BLOCK))
        self.close()
        self.path.with_suffix(".idx").write_bytes(index_text(self.samples))
        if any(label is not None for label in self.labels):
            Path(f"{self.path}{SUFFIX}").write_bytes(labels_text(self.labels, self.size))
        told = {"name": self.path.name, "samples": len(self.samples), "bytes": self.size}
        return told | {"sha256": self._hash.hexdigest()}

    def close(self) -> None:
        self._file.close()


def _size(image: _Image) -> int:
    """Of a sample's part of a tar file, at most; bytes."""
    return 4 * BLOCK + len(image.data)


class _Writer:
    """The shards of one part, one after another."""

    def __init__(self, folder: Path, stem: str, limit: int):
        self.folder, self.stem, self.limit = folder, stem, limit
        self.shards: list[dict[str, Any]] = []
        self.shard: _Shard | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, key: str, image: _Image, label: int | None) -> None:
        if self.shard is not None and self.shard.size + _size(image) > self.limit:
            self.end()
        if self.shard is None:
            self.shard = _Shard(self.folder / f"{self.stem}-{len(self.shards):06d}.tar")
        self.shard.add(key, image, label)

    def end(self) -> None:
        if self.shard is not None:
            self.shards.append(self.shard.end())
            self.shard = None

    def close(self) -> None:
        if self.shard is not None:
            with suppress(OSError):
                self.shard.close()


@contextmanager
def _told(out: Path) -> Iterator[None]:
    """A failure to write as one sentence."""
    try:
        yield
    except OSError as error:
        raise PackError(
            f"cannot write {str(out)!r} ({error.strerror or error}): make room, or mend the place; "
            "nothing of it is left there"
        ) from error


def _part(
    source: Source, writer: _Writer, options: PackOptions, out: Path, watch: Callable[[int], None]
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Write one part; what the manifest says of it, and what was left out."""
    skipped: list[dict[str, str]] = []
    labels = None if source.labels is None else source.labels.numpy()
    with ThreadPoolExecutor(options.workers) as pool:
        try:
            for i, image in _in_order(source, options, pool):
                watch(1)
                if isinstance(image, BadItem):
                    skipped.append({"name": image.name, "reason": image.reason})
                    continue
                label = None if labels is None else int(labels[i])
                with _told(out):
                    writer.add(_key(i, source.name(i)), image, label)
            with _told(out):
                writer.end()
        finally:
            writer.close()
    told = {key: sum(shard[key] for shard in writer.shards) for key in ("samples", "bytes")}
    return told | {"shards": writer.shards}, skipped


def _check_target(out: Path, overwrite: bool) -> None:
    """Raises PackError where something is there that may not be replaced."""
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir():
        raise PackError(f"{str(out)!r} is there and no folder: give another place")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise PackError(f"{str(out)!r} is not empty: give another place, or --overwrite")
    if not (out / MANIFEST).is_file():
        raise PackError(f"{str(out)!r} holds what pack did not write: empty it yourself")


@contextmanager
def _aside(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write to, which takes the place of `out` in the end, or goes away."""
    _check_target(out, overwrite)
    aside, old = (out.with_name(f".{out.name}.{what}") for what in ("partial", "replaced"))
    with _told(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = open(out.with_name(f".{out.name}.lock"), "w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise PackError(f"{str(out)!r} is being written by another process: wait") from error
        try:
            with _told(out):
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir()
            yield aside
            with _told(out):
                shutil.rmtree(old, ignore_errors=True)
                if out.is_dir():
                    out.rename(old)
                aside.rename(out)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            if old.is_dir() and not out.exists():
                old.rename(out)  # it could not be replaced
            shutil.rmtree(old, ignore_errors=True)


def pack(
    parts: Sequence[Source],
    out: Path,
    options: PackOptions | None = None,
    watch: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Write a source's parts, (all,) or (train, val), as shards below `out`; returns the manifest.

    watch(count) is told of every image that is done with.
    Images that cannot be read are left out, and named in the manifest.
    Raises PackError when `out` may not or cannot be written, DataError where no image is readable;
    then nothing of it is left, and what was there stays.
    """
    options = options or PackOptions()
    out = Path(os.path.realpath(out.expanduser()))
    names = ("data",) if len(parts) == 1 else ("train", "val")
    classes = parts[0].classes and list(parts[0].classes)
    manifest: dict[str, Any] = {"format": FORMAT, "classes": classes, "parts": {}}
    skipped: list[dict[str, str]] = []
    with warnings.catch_warnings(), _aside(out, options.overwrite) as aside:
        warnings.simplefilter("ignore")  # threads would undo each other's filters
        for name, source in zip(names, parts, strict=True):
            with _told(out):
                folder = aside if len(parts) == 1 else aside / name
                writer = _Writer(folder, name, options.shard_bytes)
            told, left_out = _part(source, writer, options, out, watch)
            manifest["parts"][name] = told
            skipped += left_out
            if not told["samples"]:
                why = (
                    f", such as {left_out[0]['name']}: {left_out[0]['reason']}" if left_out else ""
                )
                raise PackError(f"none of {len(source)} images of {name} can be read{why}")
        manifest["skipped"] = skipped
        with _told(out):
            (aside / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest
