"""The views of a volume (C, D, H, W): D depth, H down, W to the right."""

import math
from random import Random
from typing import Annotated, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field
from torch import Tensor

from fastssl.data.views.image import Area, Probability, Ratio, Sigma, Spread, check_order
from fastssl.data.views.item import ItemViews


class VolumeViews(ItemViews):
    """Views of volumes, uint8 or float32 (C, D, H, W) -> float32 (C, depth, size, size).

    crop       v ~ U(crop_scale) of the volume, its sides those of the volume times v^(1/3) e_a / e,
               log e_a ~ U(log crop_ratio) for each axis, e their geometric mean; a side longer than
               the volume's is cut to it; place uniform; resized trilinearly with antialiasing
    flip       each of the three axes, with probability flip
    turn       with probability turn: by 0 to 3 quarters, each as likely, about the axis of depth;
               then about those of height and width, where all sides are alike
    blur       with probability blur: Gaussian, sigma ~ U(blur_sigma) voxels of the output, cut at
               3 sigma, reflected at the border
    gamma      v -> l + (h - l) ((v - l) / (h - l))^g, l and h the least and the largest value of a
               channel, log g ~ U(-log gamma, log gamma)
    normalize  (v - mean) / std, v in [0, 1] of uint8, else as it is
    intensity  v -> f v + b, f ~ U(1 - gain, 1 + gain), b ~ U(-shift, shift)
    noise      with probability noise: plus normal numbers, sigma ~ U(noise_sigma)

    Source: the operations of nnU-Net, Isensee et al. 2021, arXiv:1904.08128, supplement D; the
    defaults (crop and flips alone) are no paper's.
    """

    kind: ClassVar[str] = "volume"
    named = "volumes"

    size: int = Field(ge=4, le=1024, description="height and width of the view, voxels")
    depth: int | None = Field(default=None, ge=1, le=1024, description="its depth; none: size")
    crop_scale: Annotated[tuple[Area, Area], AfterValidator(check_order)] = Field(
        default=(0.3, 1.0), description="crop as a fraction of the volume: low, high"
    )
    crop_ratio: Annotated[tuple[Ratio, Ratio], AfterValidator(check_order)] = Field(
        default=(1.0, 1.0), description="factors of the crop's sides, before their mean is put back"
    )
    flip: Probability = Field(default=0.5, description="probability of a flip of each axis")
    turn: Probability = Field(default=0.0, description="probability of quarter turns")
    blur: Probability = Field(default=0.0, description="probability of a Gaussian blur")
    blur_sigma: Annotated[tuple[Sigma, Sigma], AfterValidator(check_order)] = Field(
        default=(0.5, 1.0), description="standard deviation of the blur, voxels: low, high"
    )
    gamma: float = Field(
        default=1.0, ge=1, le=4, description="largest power, its inverse the least"
    )
    gain: float = Field(default=0.0, ge=0, lt=1, description="values' factor is within 1 +- this")
    shift: float = Field(
        default=0.0, ge=0, le=4, description="largest shift of values, in units of std"
    )
    noise: Probability = Field(default=0.0, description="probability of noise")
    noise_sigma: Annotated[tuple[Spread, Spread], AfterValidator(check_order)] = Field(
        default=(0.01, 0.3), description="standard deviation of the noise, in units of std"
    )
    mean: float = Field(default=0.45, description="subtracted from values")
    std: Spread = Field(default=0.225, description="divided by, after the mean")

    @property
    def sides(self) -> tuple[int, int, int]:
        """Depth, height and width of a view."""
        return self.size if self.depth is None else self.depth, self.size, self.size

    def shapes(self, channels: int) -> list[tuple[int, ...]]:
        """(channels, depth, size, size) of each view."""
        return [(channels, *self.sides)] * self.count

    def evaluation(self) -> "VolumeViews":
        """The whole volume, resized."""
        off = {"flip": 0.0, "turn": 0.0, "blur": 0.0, "gamma": 1.0, "gain": 0.0, "shift": 0.0}
        whole = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "noise": 0.0}
        return self.with_fields(count=1, **off, **whole)

    def shown(self, view: Tensor) -> Tensor:
        """Volumes in [0, 1]: their first channel, unless they have 1 or 3."""
        view = view if view.shape[1] in (1, 3) else view[:, :1]
        return (view * self.std + self.mean).clamp(0, 1)

    def check(self, item: Tensor) -> None:
        if item.ndim != 4 or not item.numel() or item.dtype not in (torch.uint8, torch.float32):
            got = f"{item.dtype} {list(item.shape)}"
            raise ValueError(f"volume: want uint8 or float32 (C, D, H, W), got {got}")

    def view(self, item: Tensor, key: int) -> Tensor:
        out = item.float() / 255 if item.dtype == torch.uint8 else item
        for axis, map_ in enumerate(self._maps(out.shape[1:], key), 1):
            start, weights = map_
            out = out.narrow(axis, start, weights.shape[1])
            out = F.linear(out.movedim(axis, -1), weights).movedim(-1, axis)
        turns = _stream("turn", key, 4)
        if turns[0] < self.turn:
            planes = [(2, 3), *([(1, 3), (1, 2)] if self.sides[0] == self.size else [])]
            for plane, u in zip(planes, turns[1:], strict=False):
                out = torch.rot90(out, int(4 * u), plane)
        return self._shaded(out, key).contiguous()

    def _maps(self, sides: tuple[int, ...], key: int) -> list[tuple[int, Tensor]]:
        """Of each axis where the crop starts, and the weights (output, crop) that resize it, with
        the flip and the blur that are drawn."""
        u = _stream("crop", key, 7)
        (small, large), (low, high) = self.crop_scale, self.crop_ratio
        ratios = [math.log(low) + (math.log(high) - math.log(low)) * r for r in u[1:4]]
        mean = sum(ratios) / 3
        root = (small + (large - small) * u[0]) ** (1 / 3)
        flips, blurs = _stream("flip", key, 3), _stream("blur", key, 2)
        low, high = self.blur_sigma
        sigma = low + (high - low) * blurs[1] if blurs[0] < self.blur else 0.0
        maps = []
        for a, (side, size) in enumerate(zip(sides, self.sides, strict=True)):
            length = min(side, max(1, round(side * root * math.exp(ratios[a] - mean))))
            weights = _resize(length, size)
            weights = _blur(size, sigma) @ weights if sigma else weights
            weights = weights.flip(0) if flips[a] < self.flip else weights
            maps.append((int(u[4 + a] * (side - length + 1)), weights))
        return maps

    def _shaded(self, x: Tensor, key: int) -> Tensor:
        """The changes of values, and the normalization."""
        u = _stream("shade", key, 5)
        if self.gamma > 1:
            low, high = (x.flatten(1).aminmax(dim=1)[i][:, None, None, None] for i in (0, 1))
            span = (high - low).clamp_min(1e-12)
            power = math.exp(math.log(self.gamma) * (2 * u[0] - 1))
            x = low + span * ((x - low) / span).clamp(0, 1) ** power
        x = (x - self.mean) / self.std
        if self.gain or self.shift:
            x = (1 + self.gain * (2 * u[1] - 1)) * x + self.shift * (2 * u[2] - 1)
        if u[3] < self.noise:
            low, high = self.noise_sigma
            rng = np.random.Generator(np.random.PCG64(key))
            normal = torch.from_numpy(rng.standard_normal(tuple(x.shape), np.float32))
            x = x + (low + (high - low) * u[4]) * normal
        return x


def _stream(what: str, key: int, count: int) -> list[float]:
    """`count` numbers in [0, 1) of the operation `what`."""
    rng = Random(f"{what} {key}")
    return [rng.random() for _ in range(count)]


def _resize(length: int, size: int) -> Tensor:
    """Weights (size, length) of linear resizing: tents as wide as an output voxel, if that is wider
    than an input one."""
    scale = length / size
    at = (torch.arange(size, dtype=torch.float64) + 0.5) * scale - 0.5
    away = (torch.arange(length, dtype=torch.float64) - at[:, None]).abs() / max(scale, 1.0)
    tents = (1 - away).clamp_min(0)
    return (tents / tents.sum(1, keepdim=True)).float()


def _blur(size: int, sigma: float) -> Tensor:
    """The Gaussian's weights (size, size), reflected at the border."""
    radius = min(math.ceil(3 * sigma), size - 1)
    taps = torch.arange(-radius, radius + 1)
    weights = taps.square().mul(-0.5 / sigma**2).softmax(0)
    at = torch.arange(size)[:, None] + taps
    at = (size - 1) - ((size - 1) - at.abs()).abs()
    return torch.zeros(size, size).scatter_add_(1, at, weights.expand(size, len(taps)))
