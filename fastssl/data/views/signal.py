"""The views of a signal: a stretch of samples, standardized and made louder or softer."""

from random import Random
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from fastssl.data.views.image import check_order
from fastssl.data.views.item import ItemViews

Gain = Annotated[float, Field(gt=0, le=100)]


class SignalViews(ItemViews):
    """Views of signals, float32 (C, W) -> float32 (C, length).

    crop        `length` samples from a start drawn uniformly; a signal too short is repeated
    normalize   to mean 0 and deviation 1 over the view, all channels alike; silence to 0
    gain        times exp(U(log gain)), the same for all channels
    """

    kind: ClassVar[str] = "signal"
    named, sized = "signals", "length"

    length: int = Field(ge=4, le=2**24, description="samples of the view")
    start: Literal["random", "middle"] = Field(
        default="random", description="where the view starts among the samples that it could"
    )
    gain: Annotated[tuple[Gain, Gain], AfterValidator(check_order)] = Field(
        default=(0.8, 1.25), description="factor after the normalization: low, high"
    )

    def shapes(self, channels: int) -> list[tuple[int, ...]]:
        """(channels, length) of each view."""
        return [(channels, self.length)] * self.count

    def evaluation(self) -> "SignalViews":
        """The middle of the signal, normalized."""
        return self.with_fields(count=1, start="middle", gain=(1.0, 1.0))

    def check(self, item: Tensor) -> None:
        if item.ndim != 2 or item.numel() == 0 or not item.is_floating_point():
            raise ValueError(f"signal: want float (C, W), W > 0, got {item.dtype} {[*item.shape]}")

    def view(self, item: Tensor, key: int) -> Tensor:
        draws = Random(key)
        slack = max(0, item.shape[1] - self.length)
        u, v = draws.random(), draws.random()
        start = slack // 2 if self.start == "middle" else int(u * (slack + 1))
        at = (start + torch.arange(self.length)) % item.shape[1]
        x = item[:, at].double()
        x = x - x.mean()
        deviation = float(x.std(correction=0))
        low, high = self.gain
        gain = low * (high / low) ** v
        return (x * (gain / deviation if deviation > 1e-8 else 0.0)).float()
