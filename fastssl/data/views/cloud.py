"""The views of a cloud of points: some of its points, scaled and shifted."""

from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from fastssl.data.views.image import check_order
from fastssl.data.views.item import ItemViews

Factor = Annotated[float, Field(gt=0, le=10)]


class CloudViews(ItemViews):
    """Views of clouds, float32 (N, 3) -> float32 (points, 3).

    subset     `points` of the N at random, without repetition as far as they go
    scale      each axis times U(scale)
    translate  each axis plus U(-translate, translate)
    The defaults are those that Point-MAE trains on.
    Source: Pang et al. 2022, Point-MAE, arXiv:2203.06604, section 4.1 (scaling and translation).
    """

    kind: ClassVar[str] = "cloud"
    named, sized = "clouds", "points"

    points: int = Field(ge=4, le=2**20, description="points of the view")
    subset: Literal["random", "first"] = Field(
        default="random", description="which of the cloud's points are read"
    )
    scale: Annotated[tuple[Factor, Factor], AfterValidator(check_order)] = Field(
        default=(2 / 3, 3 / 2), description="factor of each axis: low, high"
    )
    translate: float = Field(default=0.2, ge=0, le=10, description="largest shift of each axis")

    def shapes(self, channels: int) -> list[tuple[int, ...]]:
        """(points, channels) of each view."""
        return [(self.points, channels)] * self.count

    def evaluation(self) -> "CloudViews":
        """The first points, as they are: generated clouds have no order."""
        return self.with_fields(count=1, subset="first", scale=(1.0, 1.0), translate=0.0)

    def check(self, item: Tensor) -> None:
        if item.ndim != 2 or item.numel() == 0 or not item.is_floating_point():
            raise ValueError(f"cloud: want float (N, 3), N > 0, got {item.dtype} {[*item.shape]}")

    def view(self, item: Tensor, key: int) -> Tensor:
        N, axes = item.shape
        draws = np.random.Generator(np.random.PCG64(key))
        low, high = self.scale
        factor = low + (high - low) * draws.random(axes)
        shift = self.translate * (2 * draws.random(axes) - 1)
        order = np.arange(N) if self.subset == "first" else np.argsort(draws.random(N))
        chosen = item[torch.from_numpy(np.resize(order, self.points))]
        moved = chosen.double() * torch.from_numpy(factor) + torch.from_numpy(shift)
        return moved.float()
