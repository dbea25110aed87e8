"""What somebody else's package brings: a source, its views, a model, a schedule and a method.

Rows of numbers, each around the center of its class; a view adds noise; two views' embeddings are
drawn together, and a slow copy of the encoder remembers.
"""

from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

import fastssl
from fastssl.data.sources.base import Items, SourceOptions
from fastssl.data.views.item import ItemViews
from fastssl.losses import VICRegLoss
from fastssl.methods import Method, MethodConfig
from fastssl.models import EMA, feature_dim
from fastssl.schedules.config import Moving, ScheduleConfig, Within, at


class Dots(Items):
    channels, classes = 8, ("a", "b", "c")

    def __init__(self, count: int):
        self.names = np.array([f"dot {i}" for i in range(count)])
        self.labels = torch.arange(count) % 3
        draws = torch.Generator().manual_seed(0)
        centers = 3 * torch.randn(3, 8, generator=draws)
        self.rows = centers[self.labels] + torch.randn(count, 8, generator=draws)

    per_item: ClassVar[tuple[str, ...]] = ("names", "labels", "rows")

    def item(self, i: int) -> Tensor:
        return self.rows[i]


@fastssl.register_source
class DotsSource(SourceOptions):
    name: Literal["dots"] = "dots"
    count: int = Field(120, ge=8, description="How many rows there are.")

    def open(self) -> tuple[Dots, ...]:
        return (Dots(self.count),)


class DotViews(ItemViews):
    kind: ClassVar[str] = "dot"
    named, sized = "noisy_dots", ""
    count: int = 2
    noise: float = Field(0.1, ge=0, description="Its standard deviation.")

    def shapes(self, channels: int) -> list[tuple[int, ...]]:
        return [(channels,)] * self.count

    def evaluation(self) -> "DotViews":
        return self.with_fields(count=1, noise=0.0)

    def check(self, item: Tensor) -> None:
        if item.ndim != 1:
            raise ValueError(f"dot: want (8,), got {list(item.shape)}")

    def view(self, item: Tensor, key: int) -> Tensor:
        draws = np.random.default_rng(key).standard_normal(len(item))
        return item + self.noise * torch.from_numpy(draws).float()


fastssl.register_views("noisy_dots")(DotViews.preset)


@fastssl.register_model(lambda shape: {"inputs": shape[0]})
def dot_mlp(pretrained: bool = False, num_classes: int = 0, *, inputs: int, width: int = 16):
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width))


@fastssl.register_schedule
class Halving(ScheduleConfig):
    """One until the middle of the run, and a half from there."""

    name: Literal["halving"] = "halving"

    def at(self, progress: float) -> float:
        return 1.0 if progress < 0.5 else 0.5


class AgreeConfig(MethodConfig):
    name: Literal["agree"] = "agree"
    pull: float = Field(25.0, gt=0, description="Weight of the views' agreement.")
    momentum: Annotated[Moving, Within(0, 1)] = Field(0.9, description="Of the slow copy.")


@fastssl.register_method(AgreeConfig)
class Agree(Method):
    preset, views, couples_batch = "noisy_dots", 2, True

    def __init__(self, encoder: nn.Module, cfg: AgreeConfig):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(feature_dim(encoder), 8)
        self.slow, self.momentum = EMA(encoder), cfg.momentum
        self.criterion = VICRegLoss(cfg.pull)

    def networks(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder, "teacher": self.slow.model}

    def loss(self, encoded: Any, batch: dict[str, Any]) -> dict[str, Any]:
        lag = F.mse_loss(self.slow(batch["views"][0]), encoded[0].detach())
        return {"loss": self.criterion(*map(self.head, encoded)), "lag": lag}

    def on_step(self, keep: Any, progress: float) -> None:
        self.slow.update(self.encoder, at(self.momentum, progress))
