"""Volumes: generated ones whose class is the arrangement of solids.

A volume shows one arrangement, turned, stretched, placed and painted at random, on a wavy ground
with noise.  A point x is inside where its distance to the surface is negative, in the solid's own
coordinates, the volume's sides being 1:

    ball     |x| - r                          pair, three    the least over two or three balls
    shell    ||x| - r| - w                    core           the least of a shell and a ball in it
    ring     |(|(x, y)| - r, z)| - w          links          the least of two rings through another
    rod      |x - its nearest point on a segment| - w

Solids are as often brighter than the ground as darker: shape alone tells the class.
Axes of a volume (C, D, H, W): D depth, H down, W to the right.
"""

import math
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fastssl.data.synthetic.generated import GeneratedOptions

SOLIDS = ("ball", "shell", "ring", "rod", "pair", "three", "core", "links")


def _ball(x: np.ndarray, r: float, at: tuple[float, float, float] = (0, 0, 0)) -> np.ndarray:
    return np.linalg.norm(x - np.array(at), axis=-1) - r


def _shell(x: np.ndarray, r: float) -> np.ndarray:
    return np.abs(_ball(x, r)) - 0.04


def _ring(x: np.ndarray, r: float) -> np.ndarray:
    return np.hypot(np.hypot(x[..., 0], x[..., 1]) - r, x[..., 2]) - 0.06


def distance(solid: str, x: np.ndarray) -> np.ndarray:
    """Signed distance (...) of the places x (..., 3) to the surface of `solid`, in its own frame.

    >>> [bool(distance(solid, np.zeros(3)) < 0) for solid in ("ball", "shell")]
    [True, False]
    """
    if solid == "ball":
        return _ball(x, 0.22)
    if solid == "shell":
        return _shell(x, 0.24)
    if solid == "ring":
        return _ring(x, 0.24)
    if solid == "rod":
        return (
            np.linalg.norm(x - np.array([0, 0, 1]) * x[..., 2:].clip(-0.26, 0.26), axis=-1) - 0.07
        )
    if solid == "core":
        return np.minimum(_shell(x, 0.26), _ball(x, 0.1))
    if solid == "links":
        aside = np.array([0.08, 0, 0])
        return np.minimum(_ring(x + aside, 0.17), _ring((x - aside)[..., [0, 2, 1]], 0.17))
    turns = np.arange(n := 2 if solid == "pair" else 3) * 2 * np.pi / n
    balls = [_ball(x, 0.11, (0.19 * math.cos(a), 0.19 * math.sin(a), 0)) for a in turns]
    return np.minimum.reduce(balls)


def _rotation(rng: np.random.Generator) -> np.ndarray:
    """(3, 3), uniform over all rotations: of a uniform quaternion (Shoemake 1992)."""
    w, x, y, z = (q := rng.standard_normal(4)) / np.linalg.norm(q)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def volume(seed: int, label: int, instance: int, shape: tuple[int, int]) -> Tensor:
    """One volume, uint8 (C, side, side, side) with shape = (C, side), of arrangement `label`.

    >>> volume(0, 1, 2, (1, 16)).shape
    torch.Size([1, 16, 16, 16])
    """
    channels, side = shape
    rng = np.random.default_rng([seed, 5, label, instance])
    at = np.indices((side,) * 3).astype(np.float32).transpose(1, 2, 3, 0) / side + 0.5 / side - 0.5
    own = (at - rng.uniform(-0.12, 0.12, 3)) @ _rotation(rng) / rng.uniform(0.85, 1.15, 3)
    inside = (0.5 - distance(SOLIDS[label], own) * side).clip(0, 1)  # a voxel wide
    ground, solid = (_waves(at, rng) for _ in range(2))
    low, high = rng.uniform(0.1, 0.4, channels), rng.uniform(0.6, 0.9, channels)
    if rng.random() < 0.5:  # as often dark on bright
        low, high = high, low
    values = [
        a + 0.2 * ground + inside * (b - a + 0.2 * (solid - ground))
        for a, b in zip(low, high, strict=True)
    ]
    noisy = np.stack(values) + 0.03 * rng.standard_normal((channels, *inside.shape))
    return torch.from_numpy((noisy * 255).round().clip(0, 255).astype(np.uint8))


def _waves(at: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A plane wave in [-1/2, 1/2] of one to three cycles a side."""
    along = rng.standard_normal(3)
    along *= rng.uniform(1, 3) / np.linalg.norm(along)
    return 0.5 * np.sin(2 * np.pi * (at @ along + rng.random()))


class VolumesSource(GeneratedOptions):
    """Generated volumes of solids."""

    name: Literal["volumes"] = Field(default="volumes", description="which source this is")
    classes: int = Field(default=8, ge=1, le=len(SOLIDS), description="how many arrangements")
    size: int = Field(default=32, ge=8, le=256, description="depth, height and width, voxels")
    channels: Literal[1, 3] = Field(default=1, description="numbers a voxel")

    def layout(self) -> tuple[tuple[str, ...], int]:
        return SOLIDS[: self.classes], self.channels

    def draw(self, label: int, instance: int) -> Tensor:
        return volume(self.seed, label, instance, (self.channels, self.size))
