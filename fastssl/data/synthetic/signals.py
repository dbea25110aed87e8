"""Signals: generated waveforms of ten kinds.

A waveform is a sum over harmonics h of a tone with phase phi(t), or filtered noise; t in samples:

    tone, rise, fall    sum_h a_h sin(h phi),  phi' = 2 pi f(t): constant, or a glide of 1-2 octaves
    tremolo, vibrato    the tone times 1 + d sin(2 pi m t), or with f(t) = f (1 + d sin(2 pi m t))
    pulses, bursts      a click, or a decaying tone, once in eight periods
    saw                 the phase itself, mod 1
    pink, brown         white noise filtered in frequency by k^-1/2, k^-1

with pitch f log-uniform over two octaves, and random phase, timbre, modulation, gain, and noise of
5 to 20 dB below the signal.  Two signals of a kind have hardly a sample in common.
"""

from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fastssl.data.synthetic.generated import GeneratedOptions

WAVES = (
    *("tone", "rise", "fall", "tremolo", "vibrato", "pulses", "bursts", "saw", "pink", "brown"),
)


def _noise(length: int, slope: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise whose power falls as frequency ** -(2 slope)."""
    spectrum = np.fft.rfft(rng.standard_normal(length))
    return np.fft.irfft(spectrum / np.maximum(np.arange(len(spectrum)), 1) ** slope, length)


def _pitch(kind: str, length: int, rng: np.random.Generator) -> np.ndarray:
    """Cycles a sample at each of `length` samples."""
    t = np.arange(length) / length
    pitch = 0.01 * 4 ** rng.random() * np.ones(length)
    octaves, sign = rng.uniform(1, 2), {"rise": 1, "fall": -1}.get(kind, 0)
    depth, waves, phase = rng.uniform(0.1, 0.3), rng.uniform(4, 10), rng.uniform(0, 2 * np.pi)
    if kind == "vibrato":
        pitch *= 1 + depth * np.sin(2 * np.pi * waves * t + phase)
    return pitch * 2 ** (sign * octaves * (t - 0.5))


def _clean(kind: str, length: int, rng: np.random.Generator) -> np.ndarray:
    if kind in ("pink", "brown"):
        return _noise(length, 0.5 if kind == "pink" else 1.0, rng)
    cycles = np.cumsum(_pitch(kind, length, rng)) + rng.random()
    if kind == "saw":
        return 2 * (cycles % 1) - 1
    beat = (cycles / 8) % 1  # one in eight periods
    if kind == "pulses":
        return np.exp(-0.5 * ((beat - 0.5) / 0.02) ** 2)
    harmonics = np.arange(1, 5)
    weights = rng.uniform(0, 1, 4) / harmonics
    weights[0] = 1
    phases = 2 * np.pi * (np.outer(harmonics, cycles) + rng.random(4)[:, None])
    tone = weights @ np.sin(phases)
    if kind == "bursts":
        return tone * np.exp(-6 * beat)
    if kind == "tremolo":
        t, waves = np.arange(length) / length, rng.uniform(4, 10)
        tone = tone * (1 + rng.uniform(0.7, 1) * np.sin(2 * np.pi * (waves * t + rng.random())))
    return tone


def signal(seed: int, label: int, instance: int, length: int) -> Tensor:
    """One waveform, float32 (1, length): an instance of kind `label`.

    >>> signal(0, 1, 2, 100).shape
    torch.Size([1, 100])
    """
    rng = np.random.default_rng([seed, 3, label, instance])
    clean = _clean(WAVES[label], length, rng)
    clean = clean / max(clean.std(), 1e-12)
    noisy = clean + 10 ** (-rng.uniform(5, 20) / 20) * rng.standard_normal(length)
    wave = np.exp(rng.uniform(-1, 1)) * noisy
    return torch.from_numpy(wave.astype(np.float32))[None]


class SignalsSource(GeneratedOptions):
    """Generated waveforms."""

    name: Literal["signals"] = Field(default="signals", description="which source this is")
    classes: int = Field(default=len(WAVES), ge=1, le=len(WAVES), description="how many kinds")
    length: int = Field(default=1024, ge=16, le=2**24, description="samples of each")

    def layout(self) -> tuple[tuple[str, ...], int]:
        return WAVES[: self.classes], 1

    def draw(self, label: int, instance: int) -> Tensor:
        return signal(self.seed, label, instance, self.length)
