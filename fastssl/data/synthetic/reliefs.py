"""Reliefs: a surface lit from a random direction as one stream, its height as the other.

A surface's class is its law: the same law, with other numbers, gives its every instance.  With u, v
in [-1/2, 1/2) over the sides, turned and moved, and k cycles a side,

    waves    sin(2 pi k u)                     rings    sin(2 pi k r)
    checks   sin(2 pi k u) sin(2 pi k v)       domes    the highest of a few round bumps
    pits     minus that                        steps    a few terraces along u
    ridges   |sin(2 pi k u)|                   rough    a sum of waves of all directions

"image", uint8 (3, size, size): Lambert's law, albedo * (ambient + max(0, n . l)), n the normal of
the height, l a direction of light of its own, albedo a random color; so where a slope is bright or
dark says nothing of the law.  "depth", uint8 (1, size, size): the height, 0 to 255.
"""

import math
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fastssl.data.synthetic.generated import Generated, GeneratedOptions

LAWS = ("waves", "rings", "checks", "domes", "pits", "steps", "ridges", "rough")


def height(law: str, u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The height (H, W), in [0, 1], of a surface at (u, v) by `law`.

    >>> u, v = np.meshgrid(np.linspace(-0.5, 0.5, 8), np.linspace(-0.5, 0.5, 8))
    >>> h = height("rings", u, v, np.random.default_rng(0))
    >>> h.shape, bool(np.allclose(h, h[::-1, ::-1]))
    ((8, 8), True)
    """
    cycles, phase = rng.uniform(1.5, 4.0), rng.uniform(0, 2 * np.pi)
    wave = np.sin(2 * np.pi * cycles * u + phase)
    if law == "waves":
        return 0.5 + 0.5 * wave
    if law == "rings":
        return 0.5 + 0.5 * np.sin(2 * np.pi * cycles * np.hypot(u, v) + phase)
    if law == "checks":
        return 0.5 + 0.5 * wave * np.sin(2 * np.pi * cycles * v + phase)
    if law == "ridges":
        return np.abs(wave)
    if law == "steps":
        return np.round((u + 0.75) * 2 * cycles).clip(0, 4 * cycles) / (3 * cycles)
    if law == "rough":
        turns, strengths = rng.uniform(0, 2 * np.pi, (2, 8)), rng.uniform(0.2, 1.0, 8)
        total = sum(
            s * np.sin(2 * np.pi * 1.3 * k * (u * math.cos(a) + v * math.sin(a)) + b)
            for k, (a, b, s) in enumerate(zip(*turns, strengths, strict=True), 1)
        )
        return 0.5 + 0.5 * total / strengths.sum()
    at = rng.uniform(-0.55, 0.55, (7, 2))
    radius = rng.uniform(0.12, 0.24, 7)
    far = [np.hypot(u - x, v - y) / r for (x, y), r in zip(at, radius, strict=True)]
    domes = np.maximum.reduce([np.sqrt((1 - d * d).clip(0)) for d in far])
    return domes if law == "domes" else 1 - domes


def relief(seed: int, label: int, instance: int, size: int) -> dict[str, Tensor]:
    """One surface of law `label`: {"image": uint8 (3, size, size), "depth": uint8 (1, size, size)}.

    >>> {name: tuple(x.shape) for name, x in relief(0, 1, 2, 16).items()}
    {'image': (3, 16, 16), 'depth': (1, 16, 16)}
    """
    rng = np.random.default_rng([seed, 7, label, instance])
    side = (np.arange(size) + 0.5) / size - 0.5
    x, y = np.meshgrid(side, side)
    turn, (right, down) = rng.uniform(0, 2 * np.pi), rng.uniform(-0.15, 0.15, 2)
    x, y = x - right, y - down
    u, v = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
    h = height(LAWS[label], u, v, rng).clip(0, 1)
    steep = rng.uniform(0.1, 0.2) * size
    dy, dx = np.gradient(h * steep)
    normal = np.stack([-dx, -dy, np.ones_like(h)]) / np.sqrt(1 + dx * dx + dy * dy)
    around, up = rng.uniform(0, 2 * np.pi), rng.uniform(0.4, 1.1)
    light = [math.cos(around) * math.cos(up), math.sin(around) * math.cos(up), math.sin(up)]
    shade = 0.25 + 0.75 * np.tensordot(light, normal, 1).clip(0)
    image = rng.uniform(0.4, 1.0, (3, 1, 1)) * shade + 0.02 * rng.standard_normal((3, size, size))
    made = {"image": image, "depth": h[None]}
    return {
        name: torch.from_numpy((255 * pixels).round().clip(0, 255).astype(np.uint8))
        for name, pixels in made.items()
    }


class Reliefs(Generated):
    """The items of generated reliefs."""

    streams = ("image", "depth")


class ReliefsSource(GeneratedOptions):
    """Generated surfaces, each seen twice: lit, and by its height."""

    name: Literal["reliefs"] = Field(default="reliefs", description="which source this is")
    classes: int = Field(default=8, ge=1, le=len(LAWS), description="how many laws of a surface")
    size: int = Field(default=48, ge=8, le=512, description="height and width, pixels")

    def layout(self) -> tuple[tuple[str, ...], dict[str, int]]:
        return LAWS[: self.classes], {"image": 3, "depth": 1}

    def open(self) -> tuple[Any, ...]:
        return (Reliefs(self, np.arange(self.classes * self.per_class)),)

    def draw(self, label: int, instance: int) -> dict[str, Tensor]:
        return relief(self.seed, label, instance, self.size)
