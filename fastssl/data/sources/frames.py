"""Clips as folders of numbered frames: CLASS/.../CLIP/0001.jpg ..., or CLIP/0001.jpg ... alone."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from fastssl.data.errors import BadItem, DataError
from fastssl.data.sources.base import Items, Source, SourceOptions, absolute
from fastssl.data.sources.decode import MOST_BYTES, SUFFIXES, decode, of_the_machine
from fastssl.data.sources.folder import split_folders, walk
from fastssl.data.sources.names import Names, printable

_DIGITS = re.compile(r"(\d+)")


def _by_number(name: str) -> list[str | int]:
    """A key by which frame 10 comes after frame 9."""
    return [int(part) if part.isdecimal() else part for part in _DIGITS.split(name)]


@dataclass(eq=False)
class FrameFolders(Items):
    """Folders of frames below `root`, read when asked for.  `labels` is None without classes.

    stride, most: one in so many frames is read, and of these the middle ones, at most so many.
    """

    root: Path
    names: Names
    stride: int
    most: int
    labels: Tensor | None = None
    classes: tuple[str, ...] | None = None
    channels = 3

    def _frames(self, name: str) -> list[str]:
        try:
            found = os.listdir(self.root / name)
        except OSError as error:
            if of_the_machine(error):
                raise
            raise BadItem(name, error.strerror or type(error).__name__) from error
        frames = [f for f in found if os.path.splitext(f)[1].lower() in SUFFIXES and f[0] != "."]
        if not frames:
            raise BadItem(name, "no frame in its folder")
        frames = sorted(frames, key=lambda frame: (_by_number(frame), frame))[:: self.stride]
        first = max(0, len(frames) - self.most) // 2
        return frames[first : first + self.most]

    def item(self, i: int) -> Tensor:
        """Clip i, uint8 (3, T, H, W).  Raises BadItem naming the frame."""
        name, clip = self.name(i), None
        frames = self._frames(name)
        for t, frame in enumerate(frames):
            title = f"{name}/{frame}"
            pixels = decode(self.root / name / frame, title)
            if clip is None:
                if pixels.numel() * len(frames) >= MOST_BYTES:
                    size = f"{len(frames)} frames of {pixels.shape[2]} x {pixels.shape[1]} pixels"
                    raise BadItem(name, f"{size} are too many: lower max_frames")
                clip = pixels.new_empty(3, len(frames), *pixels.shape[1:])
            if pixels.shape[1:] != clip.shape[2:]:
                (H, W), (first_H, first_W) = pixels.shape[1:], clip.shape[2:]
                raise BadItem(title, f"{W} x {H} pixels, but the first has {first_W} x {first_H}")
            clip[:, t] = pixels
        assert clip is not None
        return clip


def _scan(root: Path, part: Path) -> tuple[list[str], list[str | None]]:
    """The folders with frames below `part`, from the root, and the class of each."""
    found = dict.fromkeys(os.path.dirname(path) for path in walk(part, SUFFIXES))
    if not found:
        raise DataError(f"no frame in folder {str(part)!r}: put some there, a folder for each clip")
    if os.fspath(part) in found:
        raise DataError(f"frames lie in {str(part)!r} itself: give the folder above the clips'")
    inner = [os.path.relpath(path, part).split(os.sep) for path in found]
    classes = [parts[0] if len(parts) > 1 else None for parts in inner]
    return [os.path.relpath(path, root) for path in found], classes


class FramesSource(SourceOptions):
    """Folders of frames, each a clip."""

    name: Literal["frames"] = Field(default="frames", description="which source this is")
    path: Annotated[Path, AfterValidator(absolute)] = Field(
        description="CLASS/CLIP/frames, or CLIP/frames; train/ and val/ in it are the split"
    )
    flat: bool = Field(default=False, description="take every clip below path, without labels")
    stride: int = Field(default=1, ge=1, le=1000, description="one in so many frames is read")
    max_frames: int = Field(
        default=64, ge=1, le=4096, description="of a clip, at most so many, from its middle"
    )

    def open(self) -> tuple[Source, ...]:
        root, parts = split_folders(self.path, "clips")
        found = [_scan(root, part) for part in parts]
        every = [k for _, classes in found for k in classes]
        if not self.flat and None in every and set(every) != {None}:
            raise DataError(
                f"{str(root)!r} has clips beside its class folders: move them into one, or set "
                "flat=true to use every clip unlabeled"
            )
        plain = self.flat or None in every
        classes = None if plain else tuple(sorted({str(k) for k in every}))
        number = {name: k for k, name in enumerate(classes or ())}
        sources = []
        for names, own in found:
            labels = None if plain else torch.tensor([number[str(k)] for k in own])
            known = (root, Names(names), self.stride, self.max_frames)
            printed = classes and tuple(map(printable, classes))
            sources.append(FrameFolders(*known, labels, printed))
        return tuple(sources)
