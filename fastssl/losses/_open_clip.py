"""What open_clip's users read and call in a loss that they build on."""

from __future__ import annotations

from torch import Tensor

from fastssl.distributed import Group, rank, world_size
from fastssl.losses._loss import Loss, by_group
from fastssl.losses._sharded import check_strategy


def logits(x: Tensor, y: Tensor, scale: float | Tensor, bias: float | Tensor | None) -> Tensor:
    """All scores of rows x with rows y, held."""
    scores = scale * x @ y.T
    return scores if bias is None else scores + bias


class ImageTextLoss(Loss):
    """A loss of image-text pairs, with the attributes of open_clip's.

    rank and world_size are the group's: what open_clip's constructors take for them is not needed.
    """

    shown = ("strategy",)

    def __init__(self, cache_labels: bool, strategy: str, process_group: Group) -> None:
        super().__init__(process_group=process_group)
        self.cache_labels = cache_labels
        self.strategy = check_strategy(strategy)

    @by_group
    def rank(self) -> int:
        """This process's place among those whose pairs meet."""
        return rank(self.process_group)

    @by_group
    def world_size(self) -> int:
        """How many processes' pairs meet."""
        return world_size(self.process_group)
