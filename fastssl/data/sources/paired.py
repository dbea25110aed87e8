"""Paired folders: image/, depth/, ..., a folder a stream, whose files of one name belong together.

A name is a file's path below its stream's folder, without the suffix: image/cat/7.jpg goes with
depth/cat/7.png.  Class folders and train/ and val/ are as `folder` has them:

    PATH[/train]/STREAM[/CLASS]/NAME.SUFFIX
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from fastssl.data.errors import DataError
from fastssl.data.sources.base import SourceOptions, absolute
from fastssl.data.sources.decode import SUFFIXES, decode
from fastssl.data.sources.folder import (
    IMAGE,
    Format,
    FoundFiles,
    entries,
    labeled_files,
    leads_to,
    scan_files,
    split_folders,
)
from fastssl.data.sources.reading import Read, check_read, read_as
from fastssl.data.streams import Joined

_FILES = Format("image", SUFFIXES | {".npy"}, 3, decode)
_NAMED = 3  # names that an error gives


def _keys(root: Path, folder: Path, found: FoundFiles) -> dict[str, int]:
    """The place of each file by its name.  Raises DataError for two of one name."""
    below = os.path.relpath(folder, root)
    places: dict[str, int] = {}
    for i, path in enumerate(found.names):
        key = os.path.splitext(os.path.relpath(path, below))[0]
        if key in places:
            first = found.names[places[key]]
            raise DataError(f"{first!r} and {path!r} are files of one name: remove one of them")
        places[key] = i
    return places


def unmatched(counts: dict[str, dict[str, int]], where: str) -> None:
    """Raise DataError for names that some streams have and others not, of `counts` by stream."""
    streams = list(counts)
    every = [key for key in counts[streams[0]]]
    every += [key for name in streams[1:] for key in counts[name] if key not in counts[streams[0]]]
    lost = {
        key: [name for name in streams if key not in counts[name]]
        for key in every
        if not all(key in own for own in counts.values())
    }
    if lost:
        some = [f"{key!r} not in {', '.join(absent)}" for key, absent in [*lost.items()][:_NAMED]]
        raise DataError(
            f"{len(lost)} names of {where!r} are not in every stream ({'; '.join(some)}"
            f"{' ...' * (len(lost) > _NAMED)}): add their files, or remove the others"
        )


def _part(root: Path, part: Path, names: tuple[str, ...]) -> dict[str, FoundFiles]:
    """The files of each stream of a part, in one order."""
    found = {name: scan_files(root, part / name, _FILES) for name in names}
    for name, own in found.items():
        if not own.names:
            raise DataError(f"no image and no .npy file in {str(part / name)!r}: put some there")
    places = {name: _keys(root, part / name, own) for name, own in found.items()}
    unmatched(places, str(part))
    order = list(places[names[0]])
    at = {name: [own[key] for key in order] for name, own in places.items()}
    return {
        name: FoundFiles([own.names[i] for i in at[name]], [own.folders[i] for i in at[name]])
        for name, own in found.items()
    }


def _streams(parts: list[Path], given: tuple[str, ...]) -> tuple[str, ...]:
    """The folders that are streams, those given or all.  Raises DataError where one is missing."""
    there = [
        [entry.name for entry in entries(part) if leads_to(entry, folder=True)] for part in parts
    ]
    names = given or tuple(there[0])
    for part, own in zip(parts, there, strict=True):
        lost = [name for name in names if name not in own]
        if lost or not names:
            raise DataError(
                f"{str(part)!r} has no folder{f' {lost[0]!r}' if lost else ''}: it has "
                f"{', '.join(own) or 'none'}; a stream is a folder, as image/ and depth/"
            )
    return names


def scan_paired(
    path: Path, folders: tuple[str, ...], read: dict[str, Read], *, flat: bool
) -> list[Joined]:
    """[all items], or [train, test], of paired folders.

    Raises DataError, saying what to do, as `scan_folder`, and for names that are not in every
    stream, of which it counts all and gives some.
    """
    root, parts = split_folders(path, "folders, one a stream")
    names = _streams(parts, folders)
    check_read(read, dict.fromkeys(names))
    found = [_part(root, part, names) for part in parts]
    made: dict[str, list[Any]] = {}
    for name in names:
        own = [streams[name] for streams in found]
        files = labeled_files(root, [part / name for part in parts], own, flat, IMAGE)
        made[name] = [read_as(some, read.get(name, "color"), name) for some in files]  # type: ignore
    return [Joined({name: made[name][k] for name in names}) for k in range(len(parts))]


class PairedSource(SourceOptions):
    """Folders of files, one a stream, matched by name."""

    name: Literal["paired"] = Field(default="paired", description="which source this is")
    path: Annotated[Path, AfterValidator(absolute)] = Field(
        description="the streams' folders; or train/ and val/ (or test/), with these in each"
    )
    folders: tuple[str, ...] = Field(
        default=(), description="the folders that are streams; none named: all"
    )
    read: dict[str, Read] = Field(
        default={}, description="by stream: color, gray, or values (float32, units of their own)"
    )
    flat: bool = Field(default=False, description="take every file, without labels")

    def open(self) -> tuple[Any, ...]:
        return tuple(scan_paired(self.path, self.folders, self.read, flat=self.flat))
