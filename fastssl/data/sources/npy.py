"""Volumes from .npy files: arrays (D, H, W) or (C, D, H, W) of numbers.

Bytes stay uint8; other numbers become float32, as they are: normalize them by data.overrides.mean
and std.
"""

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from fastssl.data.errors import BadItem
from fastssl.data.sources.base import Source, SourceOptions, absolute
from fastssl.data.sources.decode import of_the_machine
from fastssl.data.sources.folder import Format, scan_folder


def _read(path: Path, channels: int) -> np.ndarray:
    with path.open("rb") as file:
        try:
            x = np.lib.format.read_array(file, allow_pickle=False)
        except MemoryError:
            np.lib.format.open_memmap(path, mode="r")  # ValueError for more than the file has
            raise
    if x.dtype.kind not in "uif":
        raise ValueError(f"an array of {x.dtype}, want integers or floats")
    x = x[None] if x.ndim == 3 else x
    if x.ndim != 4 or len(x) != channels or 0 in x.shape:
        raise ValueError(f"an array of shape {list(x.shape)}, want ({channels}, D, H, W)")
    x = x if x.dtype == np.uint8 else x.astype(np.float32)
    if x.dtype == np.float32 and not np.isfinite(x).all():
        raise ValueError("values that are not finite")
    return np.ascontiguousarray(x)


def decode_npy(path: Path, name: str, channels: int = 1) -> Tensor:
    """The volume of a .npy file, uint8 or float32 (channels, D, H, W).

    Raises BadItem(name, reason) for whatever cannot be read; a failure of the machine is raised as
    it is.
    """
    try:
        return torch.from_numpy(_read(path, channels))
    except Exception as error:  # a damaged header leads the reader anywhere
        if of_the_machine(error):
            raise
        what = str(error).replace(str(path), "the file") or type(error).__name__
        raise BadItem(name, " ".join(what.split())) from error


class NpySource(SourceOptions):
    """.npy files of volumes below a folder."""

    name: Literal["npy"] = Field(default="npy", description="which source this is")
    path: Annotated[Path, AfterValidator(absolute)] = Field(
        description="class folders, or files alone; train/ and val/ (or test/) in it are the split"
    )
    flat: bool = Field(default=False, description="take every file below path, without labels")
    channels: int = Field(default=1, ge=1, le=64, description="numbers a voxel; 1 may be left out")

    def open(self) -> tuple[Source, ...]:
        decode = partial(decode_npy, channels=self.channels)
        kind = Format(".npy file", frozenset({".npy"}), self.channels, decode)
        return tuple(scan_folder(self.path, flat=self.flat, kind=kind))
