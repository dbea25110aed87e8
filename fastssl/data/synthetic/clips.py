"""Clips: generated ones whose class is a motion.

A clip shows a lobed, striped shape on a wavy ground, all drawn at random:

    radius of the shape at angle a       r (1 + sum_k c_k cos(k a + p_k)),  k = 2 .. 5
    place and angle at time u in [0, 1]  start + path(u), start and angle uniform, on a torus

The ground moves along, as if the camera did, and the shape re-enters where it left: no single
frame says anything of the class, which is the path alone, one of MOTIONS, with a random speed.
Frames have additive Gaussian noise.
"""

from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fastssl.data.synthetic.generated import GeneratedOptions

MOTIONS = (
    *("right", "left", "down", "up", "clockwise", "anticlockwise", "accelerate", "brake"),
    *("orbit clockwise", "orbit anticlockwise", "swing", "still"),
)
_DIRECTIONS = {"right": (1.0, 0.0), "left": (-1.0, 0.0), "down": (0.0, 1.0), "up": (0.0, -1.0)}


def path(motion: str, u: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Shift (T, 2) in sides of the frame, x to the right and y down, and turn (T,) in radians,
    clockwise, at the times u (T,) in [0, 1]: both 0 at time 0."""
    speed, heading, periods = rng.uniform(0.5, 1.0), rng.uniform(0, 2 * np.pi), rng.uniform(1, 2)
    along = np.array([np.cos(heading), np.sin(heading)])
    shift, turn = np.zeros((len(u), 2)), np.zeros(len(u))
    if motion in _DIRECTIONS:
        shift = speed * u[:, None] * np.array(_DIRECTIONS[motion])
    elif motion in ("clockwise", "anticlockwise"):
        turn = (1 if motion == "clockwise" else -1) * 2 * np.pi * speed * u
    elif motion in ("accelerate", "brake"):
        way = u**3 if motion == "accelerate" else 1 - (1 - u) ** 3
        shift = speed * way[:, None] * along
    elif motion.startswith("orbit"):
        sign = 1 if motion == "orbit clockwise" else -1
        angle = heading + sign * 2 * np.pi * speed * u
        shift = 0.25 * (np.stack([np.cos(angle), np.sin(angle)], 1) - along)
    elif motion == "swing":
        shift = 0.25 * np.sin(2 * np.pi * periods * u)[:, None] * along
    return shift, turn


def _wave(x: np.ndarray, y: np.ndarray, rng: np.random.Generator, cycles: float) -> np.ndarray:
    """A plane wave in [0, 1] of so many cycles a side."""
    heading, phase = rng.uniform(0, 2 * np.pi, 2)
    along = float(np.cos(heading)) * x + float(np.sin(heading)) * y
    return 0.5 + 0.5 * np.sin(2 * np.pi * cycles * along + float(phase))


def _painted(amount: np.ndarray, rng: np.random.Generator, channels: int) -> np.ndarray:
    """(..., C): colors between two random ones."""
    low, high = rng.random((2, channels), np.float32)
    return low + amount[..., None] * (high - low)


def clip(
    seed: int, label: int, instance: int, shape: tuple[int, int, int], plain: bool = False
) -> Tensor:
    """One clip, uint8 (C, T, H, W) with shape = (C, T, side): an instance of motion `label`.

    plain: every shape white and every ground black, so that clips differ by place and path alone.

    >>> clip(0, 1, 2, (3, 4, 16)).shape
    torch.Size([3, 4, 16, 16])
    """
    channels, frames, side = shape
    rng = np.random.default_rng([seed, 2, label, instance])
    shift, turn = path(MOTIONS[label], np.linspace(0, 1, frames), rng)
    start, angle = rng.uniform(0, 1, 2), rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:side, :side].astype(np.float32) / side
    places = (start + shift).astype(np.float32).T
    away = [v - c[:, None, None] for v, c in zip((x, y), places, strict=True)]
    cos, sin = (f(angle + turn).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))

    def own(dx: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places in the shape's own frame."""
        return cos * dx + sin * dy, cos * dy - sin * dx

    waves = [_wave(*own(*away), rng, rng.uniform(1, 3)) for _ in range(2)]
    ground = _painted((waves[0] + waves[1]) / 2, rng, channels)
    own_x, own_y = own(*((v + 0.5) % 1 - 0.5 for v in away))  # on a torus
    bearing, radius = np.arctan2(own_y, own_x), np.hypot(own_x, own_y)
    lobes, phases = (rng.uniform(*ends, 4).tolist() for ends in ((-0.2, 0.2), (0, 2 * np.pi)))
    bulge = sum(lobes[k] * np.cos((k + 2) * bearing + phases[k]) for k in range(4))
    edge = rng.uniform(0.16, 0.26) * (1 + bulge)
    inside = ((edge - radius) * side + 0.5).clip(0, 1)[..., None]  # a pixel wide
    shape_colors = _painted(_wave(own_x, own_y, rng, rng.uniform(2, 5)), rng, channels)
    pixels = (
        np.broadcast_to(inside, ground.shape)
        if plain
        else ground + inside * (shape_colors - ground)
    )
    pixels = pixels + 0.03 * rng.standard_normal(pixels.shape, np.float32)
    pixels = (pixels * 255).round().clip(0, 255).astype(np.uint8)
    return torch.from_numpy(pixels).permute(3, 0, 1, 2).contiguous()


class ClipsSource(GeneratedOptions):
    """Generated clips of moving shapes."""

    name: Literal["clips"] = Field(default="clips", description="which source this is")
    classes: int = Field(default=8, ge=1, le=len(MOTIONS), description="how many motions")
    frames: int = Field(default=16, ge=2, le=256, description="length, frames")
    size: int = Field(default=32, ge=8, le=512, description="height and width, pixels")
    channels: Literal[1, 3] = Field(default=3, description="1: gray")
    plain: bool = Field(default=False, description="white shapes on black, without stripes")

    def layout(self) -> tuple[tuple[str, ...], int]:
        return MOTIONS[: self.classes], self.channels

    def draw(self, label: int, instance: int) -> Tensor:
        shape = (self.channels, self.frames, self.size)
        return clip(self.seed, label, instance, shape, self.plain)
