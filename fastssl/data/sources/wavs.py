"""Signals from .wav files, whole numbers or floats of any width, read by scipy.

Samples are brought to [-1, 1) and channels averaged to one.  Files of other rates than the one
asked for are resampled by a polyphase filter: a view of W samples lasts equally long in each.
"""

import warnings
from functools import partial
from io import BytesIO
from math import gcd
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from fastssl.data.errors import BadItem
from fastssl.data.sources.base import Source, SourceOptions, absolute
from fastssl.data.sources.decode import of_the_machine, read_bytes
from fastssl.data.sources.folder import Format, scan_folder

_MOST_RATE = 10**6  # a filter from or to more would fill the memory


def _resampled(x: np.ndarray, have: int, want: int) -> np.ndarray:
    from scipy.signal import resample_poly  # a second to import, for this case alone

    common = gcd(have, want)
    return resample_poly(x, want // common, have // common)


def _whole_frames(data: bytes) -> bytes:
    """A file that may be cut short, up to its last whole frame: scipy wants no part of one."""
    at = data.find(b"data") + 8
    frame, size = (int.from_bytes(data[i:j], "little") for i, j in ((32, 34), (at - 4, at)))
    spare = (len(data) - at) % frame if frame and at + size > len(data) else 0
    return data[: len(data) - spare]


def _decode(data: bytes, rate: int | None) -> np.ndarray:
    from scipy.io import wavfile  # half a second to import, for this source alone

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pieces that are no sound
        have, x = wavfile.read(BytesIO(_whole_frames(data)))
    if not 1 <= have <= _MOST_RATE:
        raise ValueError(f"a rate of {have} samples a second")
    if len(x) == 0:
        raise ValueError("no samples")
    if not np.isfinite(x).all():
        raise ValueError("samples that are not finite")
    if x.dtype.kind == "u":
        x = x / 128.0 - 1
    elif x.dtype.kind == "i":  # those of 24 bits are the high ones of 32
        x = x / 2.0 ** (8 * x.itemsize - 1)
    x = x.reshape(len(x), -1).mean(1, dtype=np.float64)
    return x if rate in (None, have) else _resampled(x, have, rate)  # type: ignore[arg-type]


def decode_wav(path: Path, name: str, rate: int | None = None) -> Tensor:
    """The signal of a .wav file, float32 (1, W), at `rate` samples a second or as it is.

    Raises BadItem(name, reason) for whatever cannot be read; a failure of the machine is raised as
    it is.
    """
    data = read_bytes(path, name)
    try:
        return torch.from_numpy(_decode(data, rate).astype(np.float32))[None]
    except Exception as error:  # a damaged header leads the reader anywhere
        if of_the_machine(error):
            raise
        raise BadItem(name, " ".join(str(error).split()) or type(error).__name__) from error


class WavsSource(SourceOptions):
    """.wav files below a folder."""

    name: Literal["wavs"] = Field(default="wavs", description="which source this is")
    path: Annotated[Path, AfterValidator(absolute)] = Field(
        description="class folders, or files alone; train/ and val/ (or test/) in it are the split"
    )
    flat: bool = Field(default=False, description="take every file below path, without labels")
    rate: int | None = Field(
        default=None,
        ge=1,
        le=_MOST_RATE,
        description="samples a second to resample to; None: as it is",
    )

    def open(self) -> tuple[Source, ...]:
        decode = partial(decode_wav, rate=self.rate)
        kind = Format("WAV file", frozenset({".wav", ".wave"}), 1, decode)
        return tuple(scan_folder(self.path, flat=self.flat, kind=kind))
