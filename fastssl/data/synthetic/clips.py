"""Clips: generated ones whose class is a motion, and the views of a clip.

A clip shows a lobed, striped shape on a wavy ground, all drawn at random:

    radius of the shape at angle a       r (1 + sum_k c_k cos(k a + p_k)),  k = 2 .. 5
    place and angle at time u in [0, 1]  start + path(u), start and angle uniform, on a torus

The ground moves along, as if the camera did, and the shape re-enters where it left: no single
frame says anything of the class, which is the path alone, one of MOTIONS, with a random speed.
Frames have additive Gaussian noise.

A view is a stretch of frames, cropped and flipped as one: the same draw for every frame.
"""

from random import Random
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from fastssl.data.synthetic.generated import GeneratedOptions
from fastssl.data.views.image import (
    Area,
    Probability,
    Ratio,
    Sigma,
    Spread,
    Strength,
    View,
    check_order,
)
from fastssl.data.views.item import ItemViews

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
    """(..., C): colours between two random ones."""
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
    shape_colours = _painted(_wave(own_x, own_y, rng, rng.uniform(2, 5)), rng, channels)
    pixels = (
        np.broadcast_to(inside, ground.shape)
        if plain
        else ground + inside * (shape_colours - ground)
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
    channels: Literal[1, 3] = Field(default=3, description="1: grey")
    plain: bool = Field(default=False, description="white shapes on black, without stripes")

    def layout(self) -> tuple[tuple[str, ...], int]:
        return MOTIONS[: self.classes], self.channels

    def draw(self, label: int, instance: int) -> Tensor:
        shape = (self.channels, self.frames, self.size)
        return clip(self.seed, label, instance, shape, self.plain)


class ClipViews(ItemViews):
    """Views of clips, uint8 (C, T, H, W) -> float32 (C, frames, size, size).

    frames      every `stride`-th from a start drawn uniformly; a clip too short repeats its last
    the rest    as in images' views (views.py), one draw for all frames; contrast is about the mean
                of each frame; mean and std are of all channels
    Source: Tong et al. 2022, VideoMAE, arXiv:2203.12602 (crop and flip; no other augmentation), and
    for colours and blur Qian et al. 2021, CVRL, arXiv:2008.03800, section 3.2 (consistent in time).
    """

    kind: ClassVar[str] = "clip"

    size: int = Field(ge=4, le=4096, description="height and width of the view, pixels")
    frames: int = Field(default=16, ge=1, le=1024, description="length of the view, frames")
    stride: int = Field(default=1, ge=1, le=64, description="one in so many frames is read")
    start: Literal["random", "middle"] = Field(
        default="random", description="where the view starts among the frames that it could"
    )
    crop_scale: Annotated[tuple[Area, Area], AfterValidator(check_order)] = Field(
        default=(0.5, 1.0), description="crop area as a fraction of the frame's: low, high"
    )
    crop_ratio: Annotated[tuple[Ratio, Ratio], AfterValidator(check_order)] = Field(
        default=(3 / 4, 4 / 3), description="crop width / height: low, high"
    )
    interpolation: Literal["bilinear", "bicubic"] = Field(
        default="bilinear", description="of the crop's resize, with antialiasing"
    )
    flip: Probability = Field(default=0.5, description="probability of a left-right flip")
    rotate: float = Field(default=0.0, ge=0, le=180, description="largest rotation, degrees")
    jitter: Probability = Field(
        default=0.0, description="probability of the four colour changes below"
    )
    brightness: Strength = Field(default=0.0, description="brightness factor is within 1 +- this")
    contrast: Strength = Field(default=0.0, description="contrast factor is within 1 +- this")
    saturation: Strength = Field(default=0.0, description="saturation factor is within 1 +- this")
    hue: float = Field(default=0.0, ge=0, le=0.5, description="largest hue shift, turns either way")
    colour: Literal["sequential", "linear"] = Field(
        default="linear", description="the changes one by one, or as one linear map: faster"
    )
    grayscale: Probability = Field(default=0.0, description="probability of dropping colour")
    blur: Probability = Field(default=0.0, description="probability of a Gaussian blur")
    blur_sigma: Annotated[tuple[Sigma, Sigma], AfterValidator(check_order)] = Field(
        default=(0.1, 2.0), description="standard deviation of the blur, output pixels: low, high"
    )
    mean: float = Field(default=0.45, description="subtracted from values in [0, 1]")
    std: Spread = Field(default=0.225, description="divided by, after the mean")

    def shapes(self, channels: int) -> list[tuple[int, ...]]:
        """(channels, frames, size, size) of each view."""
        return [(channels, self.frames, self.size, self.size)] * self.count

    def evaluation(self) -> "ClipViews":
        """The middle frames' largest centred square."""
        whole = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.0, "rotate": 0.0}
        own_colours = {"jitter": 0.0, "grayscale": 0.0, "blur": 0.0}
        return self.with_fields(count=1, start="middle", **whole, **own_colours)

    def shown(self, view: Tensor) -> Tensor:
        """Clips in [0, 1]."""
        return (view * self.std + self.mean).clamp(0, 1)

    def check(self, item: Tensor) -> None:
        if item.ndim != 4 or item.shape[0] not in (1, 3) or item.dtype != torch.uint8:
            got = f"{item.dtype} {list(item.shape)}"
            raise ValueError(f"clip: want uint8 (1 or 3, T, H, W), got {got}")

    @property
    def look(self) -> View:
        """What images' views would be drawn by."""
        shared = View.model_fields.keys() & ClipViews.model_fields.keys() - {"count"}
        return View.model_validate({name: getattr(self, name) for name in shared})

    def view(self, item: Tensor, key: int) -> Tensor:
        from fastssl.data.render.torchvision import draw, render  # seconds, which a recipe need not

        T, H, W = item.shape[1:]
        look = self.look
        slack = max(0, T - (self.frames - 1) * self.stride - 1)
        random = Random(f"start {key}").random()  # another stream than the crop's
        start = slack // 2 if self.start == "middle" else int(random * (slack + 1))
        at = (start + torch.arange(self.frames) * self.stride).clamp(max=T - 1)
        pixels = render(look, item[:, at].transpose(0, 1), draw(look, H, W, key))
        return ((pixels - self.mean) / self.std).transpose(0, 1).contiguous()


def clip_views(size: int, **overrides: Any) -> ClipViews:
    """The views of `size` pixels that VideoMAE trains on, with any other field set anew.

    Raises ValueError for an unknown override, naming the closest, or a value out of bounds.
    """
    return ClipViews.preset("clips", {"size": size}, overrides)
