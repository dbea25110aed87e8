"""Images in a folder: one folder a class, or flat; with its own train/ and val/ or without."""

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
from PIL import Image
from pydantic import AfterValidator, Field
from torch import Tensor

from fastssl.data.errors import DataError
from fastssl.data.sources.base import Items, Source, SourceOptions, absolute
from fastssl.data.sources.decode import SUFFIXES, decode, read_bytes
from fastssl.data.sources.names import Names, printable

log = logging.getLogger(__name__)

_TRAIN_NAMES = ("train", "training")
_TEST_NAMES = ("val", "test", "valid", "validation")
_OTHER_IMAGES = frozenset(".avif .heic .heif .jxl .hif .cr2 .nef .arw .dng".split())


class Format(NamedTuple):
    """A kind of files: what one is called, how it is known, and decode(path, name) -> its item,
    which raises BadItem."""

    what: str
    suffixes: frozenset[str]
    channels: int
    decode: Callable[[Path, str], Tensor]


IMAGE = Format("image", SUFFIXES, 3, decode)


@dataclass(eq=False)
class FolderFiles(Items):
    """Files of one kind, read when asked for.  `labels` is None for a flat folder.

    names: the files' paths, from the folder's root.
    """

    root: Path
    names: Names
    labels: Tensor | None = None
    classes: tuple[str, ...] | None = None
    kind: Format = IMAGE

    @property
    def channels(self) -> int:
        return self.kind.channels

    def item(self, i: int) -> Tensor:
        """Item i, as its kind decodes it.  Raises BadItem."""
        name = self.name(i)
        return self.kind.decode(self.root / name, name)


class FolderImages(FolderFiles):
    """Image files: items are uint8 (3, H, W)."""

    def encoded(self, i: int) -> bytes:
        """File i as it is.  Raises BadItem."""
        name = self.name(i)
        return read_bytes(self.root / name, name)


class FoundFiles(NamedTuple):
    names: list[str]  # relative to the root, sorted within each folder
    folders: list[str | None]  # the class folder of each, None directly in the scanned folder


def _is_image(path: str) -> bool:
    """Whether a file without a suffix begins as an image does."""
    try:
        with Image.open(path):
            return True
    except Exception:  # readers of many formats raise what the bytes lead them to
        return False


def entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return sorted((e for e in found if not e.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise DataError(f"cannot list folder {str(folder)!r} ({reason}): mend it first") from error


def leads_to(entry: os.DirEntry[str], *, folder: bool) -> bool:
    try:
        return entry.is_dir() if folder else entry.is_file()
    except OSError:  # a link to itself
        return False


def walk(
    folder: Path,
    suffixes: frozenset[str],
    others: list[str] | None = None,
    ancestors: tuple[tuple[int, int], ...] = (),
) -> Iterator[str]:
    """Files of these suffixes below a folder, depth first.

    A link back to an ancestor is not followed.  others: where images are looked for, those without
    a suffix are given as well, and those of a kind that is not read are added to this list.
    """
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in ancestors:
        return
    for entry in entries(folder):
        if leads_to(entry, folder=True):
            yield from walk(Path(entry.path), suffixes, others, (*ancestors, here))
            continue
        suffix = os.path.splitext(entry.name)[1].lower()
        if suffix in suffixes or (others is not None and not suffix):
            if leads_to(entry, folder=False) and (suffix or _is_image(entry.path)):
                yield entry.path
        elif others is not None and suffix in _OTHER_IMAGES:
            others.append(entry.path)


def scan_files(root: Path, folder: Path, kind: Format) -> FoundFiles:
    """Raises DataError for a class folder whose images are all of a kind that is not read."""
    others: list[str] | None = [] if kind is IMAGE else None
    depth = len(folder.relative_to(root).parts)

    def class_of(name: str) -> str | None:
        parts = name.split(os.sep)
        return parts[depth] if len(parts) > depth + 1 else None

    names = [os.path.relpath(path, root) for path in walk(folder, kind.suffixes, others)]
    folders = [class_of(name) for name in names]
    lost = [os.path.relpath(path, root) for path in others or ()]
    if lost:
        told = f"{len(lost)} images such as {lost[0]!r} are of a kind that is not read"
        if not {class_of(name) for name in lost} <= set(folders):
            raise DataError(f"{told}: convert them to jpg, png or webp, or remove them")
        log.warning("%s: %s, and left out", folder, told)
    return FoundFiles(names, folders)


def _mixed(path: Path, found: FoundFiles, kind: Format) -> None:
    loose = [name for name, folder in zip(*found, strict=True) if folder is None]
    if loose and len(loose) < len(found.names):
        raise DataError(
            f"{str(path)!r} has {kind.what}s beside its class folders ({len(loose)}, such as "
            f"{loose[0]!r}): move them into one, or set flat=true to use every {kind.what} "
            "unlabeled"
        )


def _build(root: Path, found: list[FoundFiles], flat: bool, kind: Format) -> list[FolderFiles]:
    made = FolderImages if kind is IMAGE else FolderFiles
    folders = [folder for part in found for folder in part.folders]
    if flat or None in folders:
        return [made(root, Names(part.names), kind=kind) for part in found]
    known = sorted({str(folder) for folder in folders})
    number = {name: k for k, name in enumerate(known)}
    classes = tuple(map(printable, known))
    return [
        made(root, Names(p.names), torch.tensor([number[str(f)] for f in p.folders]), classes, kind)
        for p in found
    ]


def _named(folders: list[str], names: tuple[str, ...]) -> str | None:
    """The first of these folders that is called so, in capitals or not."""
    return next((f for name in names for f in folders if f.lower() == name), None)


def split_folders(path: Path, what: str) -> tuple[Path, list[Path]]:
    """The folder itself, absolute, and [it], or [train, test] where it has train/ and one of val,
    test, valid, validation/, in capitals or not.  One of these alone in it is the data.

    Raises DataError for a path that is missing or not a folder.
    """
    path = Path(os.path.abspath(path.expanduser()))
    if not path.exists():
        far = any(part.endswith(":") for part in path.parts)  # s3://bucket/x, as a path
        hint = "; what is remote is read as shards: see fastssl pack" if far else ""
        raise DataError(
            f"folder {str(path)!r} does not exist: give the path of a folder of {what}{hint}"
        )
    if not path.is_dir():
        raise DataError(f"{str(path)!r} is a file: give the folder that holds the {what}")
    folders = [entry.name for entry in entries(path) if leads_to(entry, folder=True)]
    train, test = _named(folders, _TRAIN_NAMES), _named(folders, _TEST_NAMES)
    if train and test:
        others = [f for f in folders if f.lower() not in (*_TRAIN_NAMES, *_TEST_NAMES)]
        if others:
            log.warning("%s: beside %s/ and %s/, %s/ is left out", path, train, test, others[0])
        return path, [path / train, path / test]
    alone = len(folders) == 1 and (train or test)
    return path, [path / alone] if alone else [path]


def scan_folder(path: Path, *, flat: bool = False, kind: Format = IMAGE) -> list[FolderFiles]:
    """[all images], or [train, test] where the folder has train/ and one of val, test, valid/.

    kind: files of another format than images.
    Labels are the first-level folders, sorted by name and numbered over both parts; there are none
    if `flat`, or if images lie directly in both parts.  Hidden files and folders are passed over.
    Raises DataError, saying what to do, for a path that is missing or not a folder, for a folder
    without images, for images both inside and beside class folders, and where one part alone has
    class folders.
    """
    path, parts = split_folders(path, f"{kind.what}s")
    found = [scan_files(path, part, kind) for part in parts]
    return labeled_files(path, parts, found, flat, kind)


def labeled_files(
    path: Path, parts: list[Path], found: list[FoundFiles], flat: bool, kind: Format
) -> list[FolderFiles]:
    """The files of each part with their labels.  Raises DataError as `scan_folder` does."""
    for part, images in zip(parts, found, strict=True):
        if not images.names:
            kinds = "jpg, png, webp, bmp, tif, ..." if kind is IMAGE else ", ".join(kind.suffixes)
            raise DataError(f"no {kind.what} in folder {str(part)!r}: put some there ({kinds})")
        if not flat:
            _mixed(part, images, kind)
    plain = [str(part) for part, images in zip(parts, found, strict=True) if None in images.folders]
    if not flat and 0 < len(plain) < len(parts):
        raise DataError(
            f"{plain[0]!r} has no class folders and the other part has: sort its {kind.what}s into "
            "such folders, give the path of the one with classes alone, or set flat=true to use "
            f"every {kind.what} unlabeled"
        )
    return _build(path, found, flat, kind)


class FolderSource(SourceOptions):
    """Image files below a folder."""

    name: Literal["folder"] = Field(default="folder", description="which source this is")
    path: Annotated[Path, AfterValidator(absolute)] = Field(
        description="class folders, or images alone; train/ and val/ (or test/) in it are the split"
    )
    flat: bool = Field(default=False, description="take every image below path, without labels")

    def open(self) -> tuple[Source, ...]:
        return tuple(scan_folder(self.path, flat=self.flat))
