"""Labeled images from a formula: attractors of random iterated function systems (IFS).

A class is an IFS code: n affine maps x -> A_k x + b_k, with A_k = R(t) diag(s1, +-s2) R(u).  An
instance perturbs the numbers of its code, and takes its own colors and pose: it stands at any
angle, so that pixels alone say little of the class (20 classes at 48 pixels: raw kNN 40 %).  The
attractor is drawn by the chaos game: points that take a random map at each step, many at once.

    s1 >= s2,  sum_k (s1 + 2 s2) ~ U((5 + n) / 2, (6 + n) / 2)     gives full, detailed shapes

Codes whose attractor covers too little of its frame, or nearly all of it, are drawn again.

Everything is a pure function of (seed, class, instance, size), by numpy's generators.
Sources: Kataoka et al. 2020, arXiv:2101.08515 (classes and instances from IFS codes, filling rate);
Anderson and Farrell 2022, arXiv:2110.03091, section 3 (the sum above).
"""

import fcntl
import logging
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from fastssl.data.errors import DataError
from fastssl.data.sources.base import Source, SourceOptions
from fastssl.data.sources.folder import scan_folder
from fastssl.data.synthetic.generated import Generated, padded

log = logging.getLogger(__name__)

_CHAINS, _BURN_IN = 2048, 12
_GRID, _FILLED = 32, (0.22, 0.80)  # the part of a _GRID x _GRID frame that a class must touch


class Code(NamedTuple):
    """An IFS of n maps: its polar parts and shifts, each with n rows."""

    angles: np.ndarray  # (n, 2) radians
    scales: np.ndarray  # (n, 2) singular values, in (0, 1)
    signs: np.ndarray  # (n,) -1 where the map mirrors
    shifts: np.ndarray  # (n, 2)

    def maps(self) -> tuple[np.ndarray, np.ndarray]:
        """A (n, 2, 2) and the probability (n,) of each map, by its area."""
        cos, sin = np.cos(self.angles), np.sin(self.angles)
        turn = np.stack([cos, -sin, sin, cos], -1).reshape(-1, 2, 2, 2)  # map, which, row, column
        spread = self.scales * np.stack([np.ones_like(self.signs), self.signs], -1)
        areas = self.scales.prod(-1) + 1e-2  # a map that flattens must still be visited
        return turn[:, 0] * spread[:, None] @ turn[:, 1], areas / areas.sum()


def _chaos_game(code: Code, points: int, rng: np.random.Generator) -> np.ndarray:
    """At least `points` points of the attractor, (3, P): x, y and a color from the maps taken."""
    a, p = code.maps()
    n = len(p)
    table = np.concatenate([a.reshape(n, 4), code.shifts], 1).astype(np.float32).T.copy()
    hues = (np.arange(n, dtype=np.float32) + 0.5) / n
    steps = -(-points // _CHAINS)
    draws = rng.random((_BURN_IN + steps, _CHAINS), dtype=np.float32)
    edges = np.cumsum(p)[:-1].astype(np.float32)
    taken = np.searchsorted(edges, draws.ravel()).reshape(draws.shape)
    x, y, c = np.zeros((3, _CHAINS), np.float32)
    out = np.empty((3, steps, _CHAINS), np.float32)
    for t, k in enumerate(taken):
        m = table[:, k]
        x, y = m[0] * x + m[1] * y + m[4], m[2] * x + m[3] * y + m[5]
        c = 0.5 * (c + hues[k])
        if t >= _BURN_IN:
            out[:, t - _BURN_IN] = x, y, c
    return out.reshape(3, -1)


def _to_frame(xy: np.ndarray, size: int, turn: float = 0.0, zoom: float = 1.0) -> np.ndarray:
    """Pixel numbers (P,) of points (2, P) in a size x size frame that they fill, less a margin."""
    cos, sin = np.cos(turn, dtype=np.float32), np.sin(turn, dtype=np.float32)
    x, y = cos * xy[0] - sin * xy[1], sin * xy[0] + cos * xy[1]
    lows, highs = (x.min(), y.min()), (x.max(), y.max())
    extent = max(highs[0] - lows[0], highs[1] - lows[1], np.float32(1e-6))
    scale = np.float32(0.96 * size * zoom) / extent
    pixels = []
    for v, low, high in zip((x, y), lows, highs, strict=True):
        placed = (v - (low + high) / 2) * scale + np.float32(size / 2)
        pixels.append(placed.astype(np.int32).clip(0, size - 1))
    return pixels[1] * size + pixels[0]


def _draw_code(rng: np.random.Generator) -> Code:
    n = int(rng.integers(2, 6))
    target = rng.uniform((5 + n) / 2, (6 + n) / 2)
    while True:
        scales = -np.sort(-rng.random((n, 2)), axis=1)
        scales *= target / (scales @ [1.0, 2.0]).sum()
        if scales.max() < 0.97:
            break
    angles = rng.uniform(-np.pi, np.pi, (n, 2))
    signs = np.where(rng.random(n) < 0.5, -1.0, 1.0)
    return Code(angles, scales, signs, rng.uniform(-1, 1, (n, 2)))


@lru_cache(maxsize=4096)
def class_code(seed: int, label: int) -> Code:
    """A class's code: the first drawn that fills its frame well.  Other classes play no part."""
    rng = np.random.default_rng([seed, 0, label])
    while True:
        code = _draw_code(rng)
        xy = _chaos_game(code, 4 * _CHAINS, rng)[:2]
        filled = len(np.unique(_to_frame(xy, _GRID))) / _GRID**2
        if _FILLED[0] <= filled <= _FILLED[1]:
            return code


def _perturb(code: Code, rng: np.random.Generator) -> Code:
    def near(values: np.ndarray, reach: float) -> np.ndarray:
        return values + rng.uniform(-reach, reach, values.shape)

    scales = (code.scales * near(np.ones_like(code.scales), 0.06)).clip(0.02, 0.97)
    return Code(near(code.angles, 0.06), scales, code.signs, near(code.shifts, 0.06))


def fractal(seed: int, label: int, instance: int, size: int) -> Tensor:
    """One image, uint8 (3, size, size): an instance of class `label`.

    >>> fractal(0, 1, 2, 16).shape
    torch.Size([3, 16, 16])
    """
    rng = np.random.default_rng([seed, 1, label, instance])
    code = _perturb(class_code(seed, label), rng)
    turn, zoom = rng.uniform(-np.pi, np.pi), rng.uniform(0.7, 1.2)
    phase, swing = rng.random(3), rng.uniform(0.3, 0.9, 3)  # of the palette's three cosines
    ground = rng.uniform(0, 0.2, 3)
    points = _chaos_game(code, min(max(6 * size * size, 8192), 400_000), rng)
    at = _to_frame(points[:2], size, turn, zoom)
    hits = np.bincount(at, minlength=size * size)
    hue = np.bincount(at, points[2], minlength=size * size) / np.maximum(hits, 1)
    light = np.log1p(hits) / np.log1p(np.quantile(hits[hits > 0], 0.95))
    light = np.where(hits > 0, 0.25 + 0.75 * light.clip(0, 1), 0)[:, None]
    paint = 0.62 + 0.38 * np.cos(2 * np.pi * (swing * hue[:, None] + phase))
    pixels = ((ground + light * (paint - ground)) * 255).round().clip(0, 255).astype(np.uint8)
    return torch.from_numpy(pixels.reshape(size, size, 3)).permute(2, 0, 1).contiguous()


class FractalsSource(SourceOptions):
    """Generated images of iterated function systems."""

    name: Literal["fractals"] = Field(default="fractals", description="which source this is")
    classes: int = Field(default=10, ge=1, le=100_000, description="how many classes")
    per_class: int = Field(default=100, ge=1, le=100_000, description="images of each class")
    size: int = Field(default=64, ge=8, le=1024, description="height and width, pixels")
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="which fractals; the split has the run's seed"
    )
    cache: Path | None = Field(
        default=None,
        description="folder to keep them in as JPEG; without it they are drawn at each use",
    )

    def layout(self) -> tuple[tuple[str, ...], int]:
        return tuple(padded(k, self.classes) for k in range(self.classes)), 3

    def draw(self, label: int, instance: int) -> Tensor:
        return fractal(self.seed, label, instance, self.size)

    def open(self) -> tuple[Source, ...]:
        if self.cache is None:
            return (FractalImages(self),)
        folder = cache_fractals(self, self.cache)
        (whole,) = scan_folder(folder)
        if len(whole) != self.classes * self.per_class:
            raise DataError(f"the fractals' cache {str(folder)!r} lost images: delete that folder")
        return (whole,)


class FractalImages(Generated):
    """Fractals drawn when asked for, named as the files of a cache are."""

    def __init__(self, cfg: FractalsSource):
        super().__init__(cfg, np.arange(cfg.classes * cfg.per_class))

    def name(self, i: int) -> str:
        return f"{super().name(i)}.jpg"


def cache_fractals(cfg: FractalsSource, cache: Path) -> Path:
    """The folder of `cfg`'s images, written once below `cache`: class folders of JPEG files.

    It is renamed when complete, so that a killed run leaves no half of it; of several processes
    one writes, behind a lock, and the others wait.
    Raises DataError when it cannot be written.
    """
    name = f"fractals-{cfg.classes}x{cfg.per_class}-{cfg.size}px-seed{cfg.seed}"
    target = cache.expanduser() / name
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target.parent / f".{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_dir():
                _draw_all(cfg, target)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"cannot write the fractals' cache {str(target)!r}: {reason}") from error
    return target


def _draw_all(cfg: FractalsSource, target: Path) -> None:
    """Every image of `cfg`, written aside and renamed; what a killed process left goes first."""
    log.info("writing %d fractals to %s", cfg.classes * cfg.per_class, target)
    aside = target.with_name(f".{target.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    images = FractalImages(cfg)
    try:
        for i in range(len(images)):
            path = aside / images.name(i)
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = images.item(i).permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(path, quality=95, subsampling=0)
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
