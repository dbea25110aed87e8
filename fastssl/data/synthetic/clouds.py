"""Clouds of points: generated ones on twelve kinds of surface.

A surface is x(u, v) with u, v in [0, 1]; a cloud takes points of it at random, uniformly by area:
many candidates are drawn with u, v uniform, and kept with probability proportional to the area
element |x_u x x_v|, found by finite differences.  Proportions of each surface are drawn too.  Then

    x <- R_z(angle) (s * x) + noise,   s_k ~ U(0.6, 1.4) an axis, angle ~ U(0, 2 pi), noise 1-3 %
    x <- (x - mean) / max |x - mean|   the unit sphere

so that no side is up but the vertical one, and proportions tell little.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fastssl.data.synthetic.generated import GeneratedOptions

SURFACES = (
    *("ellipsoid", "box", "torus", "cone", "cylinder", "pyramid"),
    *("spring", "bowl", "saddle", "octahedron", "vase", "knot"),
)
_CANDIDATES = 6  # a point kept: the area element varies by less
Curve = Callable[[np.ndarray], np.ndarray]


def _superquadric(u: np.ndarray, v: np.ndarray, e: float, n: float) -> np.ndarray:
    """A sphere whose sines and cosines are raised to e (upright) and n (around)."""

    def power(x: np.ndarray, p: float) -> np.ndarray:
        return np.sign(x) * np.abs(x) ** p

    a, b = np.pi * (v - 0.5), 2 * np.pi * u
    flat = power(np.cos(a), e)
    return np.stack([flat * power(np.cos(b), n), flat * power(np.sin(b), n), power(np.sin(a), e)])


def _turned(radius: np.ndarray, height: np.ndarray, u: np.ndarray, corners: int = 0) -> np.ndarray:
    """A profile turned about the vertical axis; with `corners`, on a regular polygon."""
    b = 2 * np.pi * u
    if corners:
        wedge = 2 * np.pi / corners
        radius = radius * np.cos(wedge / 2) / np.cos(b % wedge - wedge / 2)
    return np.stack([radius * np.cos(b), radius * np.sin(b), height])


def _tube(line: Curve, u: np.ndarray, v: np.ndarray, width: float) -> np.ndarray:
    """A tube of radius `width` about the curve line(u), (3, ...)."""
    step = 1e-4
    along = line(u + step) - line(u - step)
    along /= np.linalg.norm(along, axis=0)
    up = np.array([0.0, 0.0, 1.0])[:, None] - along[2] * along
    up /= np.linalg.norm(up, axis=0)
    side = np.cross(along, up, axis=0)
    b = 2 * np.pi * v
    return line(u) + width * (np.cos(b) * up + np.sin(b) * side)


def _spring(t: np.ndarray, turns: float) -> np.ndarray:
    angle = 2 * np.pi * turns * t
    return np.stack([np.cos(angle), np.sin(angle), 2 * t - 1])


def _trefoil(t: np.ndarray) -> np.ndarray:
    angle = 2 * np.pi * t
    x = np.sin(angle) + 2 * np.sin(2 * angle)
    y = np.cos(angle) - 2 * np.cos(2 * angle)
    return np.stack([x, y, -np.sin(3 * angle)]) / 3


def _lidded(v: np.ndarray, top: float) -> tuple[np.ndarray, np.ndarray]:
    """Radius and height of a closed profile: base, wall to radius `top`, and lid of that radius."""
    radius = np.interp(v, [0, 0.25, 0.75, 1], [0, 1, top, 0])
    return radius, np.interp(v, [0, 0.25, 0.75, 1], [-1, -1, 1, 1])


def _surface(kind: str, u: np.ndarray, v: np.ndarray, form: np.ndarray) -> np.ndarray:
    """Points (3, P) at u, v (P,); form: three numbers in [0, 1], the proportions."""
    if kind == "ellipsoid":
        return _superquadric(u, v, 1, 1)
    if kind == "octahedron":
        return _superquadric(u, v, 1.8 + 0.4 * form[0], 1.8 + 0.4 * form[1])
    if kind in ("box", "pyramid"):
        radius, height = _lidded(v, 1.0 if kind == "box" else 0.02)
        return _turned(radius, height, u, corners=4)
    if kind in ("cylinder", "cone"):
        return _turned(*_lidded(v, 1.0 if kind == "cylinder" else 0.02), u)
    if kind == "torus":
        width, b = 0.25 + 0.3 * form[0], 2 * np.pi * v
        return _turned(1 + width * np.cos(b), width * np.sin(b), u)
    if kind == "bowl":
        tilt = np.pi * (0.35 + 0.2 * form[0]) * v
        return _turned(np.sin(tilt), -np.cos(tilt), u)
    if kind == "vase":
        waist = 0.7 + 0.3 * np.sin(2 * np.pi * (v * (0.8 + 0.4 * form[0]) + 0.2 * form[1]))
        return _turned(waist, 2 * v - 1, u)
    if kind == "saddle":
        x, y = 2 * u - 1, 2 * v - 1
        return np.stack([x, y, (0.6 + 0.4 * form[0]) * (x**2 - y**2)])
    width, turns = 0.12 + 0.06 * form[0], 2 + form[1]
    return _tube(partial(_spring, turns=turns) if kind == "spring" else _trefoil, u, v, width)


def _by_area(kind: str, points: int, rng: np.random.Generator) -> np.ndarray:
    """(points, 3), uniform over the surface."""
    form, step = rng.random(3), 1e-4
    u, v = rng.random((2, _CANDIDATES * points))
    x_u = _surface(kind, u + step, v, form) - _surface(kind, u - step, v, form)
    x_v = _surface(kind, u, v + step, form) - _surface(kind, u, v - step, form)
    area = np.linalg.norm(np.cross(x_u, x_v, axis=0), axis=0)
    # The largest of log(u) / area are a sample without replacement, weighted by area.
    keys = np.log(rng.random(len(u))) / np.maximum(area, 1e-300)
    at = np.argsort(-keys)[:points]
    return _surface(kind, u[at], v[at], form).T


def cloud(seed: int, label: int, instance: int, points: int) -> Tensor:
    """One cloud, float32 (points, 3), in the unit sphere: an instance of surface `label`.

    >>> cloud(0, 1, 2, 50).shape
    torch.Size([50, 3])
    """
    rng = np.random.default_rng([seed, 4, label, instance])
    x = _by_area(SURFACES[label], points, rng) * rng.uniform(0.6, 1.4, 3)
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = np.cos(angle), np.sin(angle)
    x = x @ np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    x = x + rng.uniform(0.01, 0.03) * rng.standard_normal(x.shape)
    x = x - x.mean(0)
    x = x / max(np.linalg.norm(x, axis=1).max(), 1e-12)
    return torch.from_numpy(x.astype(np.float32))


class CloudsSource(GeneratedOptions):
    """Generated clouds of points on surfaces."""

    name: Literal["clouds"] = Field(default="clouds", description="which source this is")
    classes: int = Field(
        default=len(SURFACES), ge=1, le=len(SURFACES), description="how many kinds of surface"
    )
    points: int = Field(default=1024, ge=8, le=2**20, description="points of each")

    def layout(self) -> tuple[tuple[str, ...], int]:
        return SURFACES[: self.classes], 3

    def draw(self, label: int, instance: int) -> Tensor:
        return cloud(self.seed, label, instance, self.points)
