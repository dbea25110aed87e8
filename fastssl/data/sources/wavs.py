"""Signals from .wav files: PCM of 8, 16, 24 or 32 bits by the standard library, floats by scipy.

Samples are brought to [-1, 1) and channels averaged to one.  Files of other rates than the one
asked for are resampled by a polyphase filter: a view of W samples lasts equally long in each.
"""

import warnings
import wave
from functools import partial
from math import gcd
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

_MOST_RATE = 10**6  # a filter from or to more would fill the memory


def _samples(data: bytes, width: int) -> np.ndarray:
    """PCM of `width` bytes a sample as float64 in [-1, 1): 8 bits are unsigned, others signed."""
    if width == 1:
        return np.frombuffer(data, np.uint8) / 128.0 - 1
    if width == 3:  # the high bytes of an int32, whose low byte is 0
        triples = np.frombuffer(data, np.uint8).reshape(-1, 3)
        words = np.zeros((len(triples), 4), np.uint8)
        words[:, 1:] = triples
        return words.reshape(-1).view("<i4") / 2.0**31
    return np.frombuffer(data, f"<i{width}") / 2.0 ** (8 * width - 1)


def _resampled(x: np.ndarray, have: int, want: int) -> np.ndarray:
    from scipy.signal import resample_poly  # a second to import, for this case alone

    common = gcd(have, want)
    return resample_poly(x, want // common, have // common)


def _floats(path: Path) -> tuple[np.ndarray, int]:
    """Samples (n, channels) and rate of a file that the standard library does not know."""
    from scipy.io import wavfile  # half a second to import, for this case alone

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pieces that are no sound
        rate, x = wavfile.read(path)
    if x.dtype.kind == "u":
        x = x / 128.0 - 1
    elif x.dtype.kind == "i":
        x = x / 2.0 ** (8 * x.itemsize - 1)
    if not np.isfinite(x).all():
        raise ValueError("samples that are not finite")
    return x.reshape(len(x), -1), rate


def _pcm(path: Path) -> tuple[np.ndarray, int]:
    with wave.open(str(path), "rb") as file:
        channels, width, rate = file.getnchannels(), file.getsampwidth(), file.getframerate()
        if width not in (1, 2, 3, 4):
            raise ValueError(f"{8 * width} bits a sample: want 8, 16, 24 or 32")
        data = file.readframes(file.getnframes())
    frame = channels * width
    return _samples(data[: len(data) // frame * frame], width).reshape(-1, channels), rate


def _decode(path: Path, rate: int | None) -> np.ndarray:
    try:
        x, have = _pcm(path)
    except wave.Error as error:
        if "unknown format" not in str(error):
            raise
        x, have = _floats(path)
    if not 1 <= have <= _MOST_RATE:
        raise ValueError(f"a rate of {have} samples a second")
    if len(x) == 0:
        raise ValueError("no samples")
    x = x.mean(1, dtype=np.float64)
    return x if rate in (None, have) else _resampled(x, have, rate)  # type: ignore[arg-type]


def decode_wav(path: Path, name: str, rate: int | None = None) -> Tensor:
    """The signal of a .wav file, float32 (1, W), at `rate` samples a second or as it is.

    Raises BadItem(name, reason) for whatever cannot be read; a failure of the machine is raised as
    it is.
    """
    try:
        return torch.from_numpy(_decode(path, rate).astype(np.float32))[None]
    except Exception as error:  # a damaged header leads the reader anywhere
        if of_the_machine(error):
            raise
        what = str(error).replace(str(path), "the file") or type(error).__name__
        raise BadItem(name, " ".join(what.split())) from error


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
