"""The views of a clip: a stretch of frames, cropped and flipped as one: one draw for all frames."""

from random import Random
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

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


class ClipViews(ItemViews):
    """Views of clips, uint8 (C, T, H, W) -> float32 (C, frames, size, size).

    frames      every `stride`-th from a start drawn uniformly; a clip too short repeats its last
    the rest    as in images' views (image.py), one draw for all frames; contrast is about the mean
                of each frame; mean and std are of all channels
    The defaults are those that VideoMAE trains on.
    Source: Tong et al. 2022, VideoMAE, arXiv:2203.12602 (crop and flip; no other augmentation), and
    for colors and blur Qian et al. 2021, CVRL, arXiv:2008.03800, section 3.2 (consistent in time).
    """

    kind: ClassVar[str] = "clip"
    named = "clips"

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
        default=0.0, description="probability of the four color changes below"
    )
    brightness: Strength = Field(default=0.0, description="brightness factor is within 1 +- this")
    contrast: Strength = Field(default=0.0, description="contrast factor is within 1 +- this")
    saturation: Strength = Field(default=0.0, description="saturation factor is within 1 +- this")
    hue: float = Field(default=0.0, ge=0, le=0.5, description="largest hue shift, turns either way")
    color: Literal["sequential", "linear"] = Field(
        default="linear", description="the changes one by one, or as one linear map: faster"
    )
    grayscale: Probability = Field(default=0.0, description="probability of dropping color")
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
        """The middle frames' largest centered square."""
        whole = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.0, "rotate": 0.0}
        own_colors = {"jitter": 0.0, "grayscale": 0.0, "blur": 0.0}
        return self.with_fields(count=1, start="middle", **whole, **own_colors)

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
