"""What methods with a teacher's distributions share: how its scores become targets, and its views.

q = softmax((t - c) / temp)     c: a center that moves after each step, or Sinkhorn's of a batch
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.kernels import sinkhorn
from fastssl.losses.dino import mean_of_all, moved
from fastssl.models import MaskedViT

from . import watch
from .configs import Assignment


class Clock(nn.Module):
    """`progress` in [0, 1] of training, saved with a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.progress = 0.0

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.progress, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.progress = state.item()


class Targets(nn.Module):
    """What a teacher's scores with K prototypes are centered by, over all ranks.

    center (K,) float32: the moving mean of the scores, of the steps before; assignment "sinkhorn"
    has none, and uses the prototypes alike in each batch, in three iterations.
    """

    center: Tensor

    def __init__(self, K: int, assignment: Assignment, momentum: float) -> None:
        super().__init__()
        self.assignment, self.momentum = assignment, momentum
        if assignment == "center":
            self.register_buffer("center", torch.zeros(K))

    def of(self, scores: Sequence[Tensor], temp: float, weight: Tensor | None = None) -> Tensor:
        """The center (K,) of scores (R, K) of each view; weight (R,): how a row of it counts."""
        if self.assignment == "center":
            return self.center
        weight = None if weight is None else weight.repeat(len(scores))
        return sinkhorn(torch.cat([*scores]), temp, process_group=None, weight=weight)

    def kept(self, scores: Sequence[Tensor], rows: Tensor | None = None) -> list[Tensor]:
        """What `move` needs of them: their sum and number (1, K + 1), or nothing.

        rows: how many of all count, the others being 0; None: all.
        """
        if self.assignment == "sinkhorn":
            return []
        total = torch.stack([x.sum(0, dtype=torch.float32) for x in scores]).sum(0)
        count = total.new_tensor(sum(map(len, scores))) if rows is None else rows.to(total)
        return [torch.cat([total, count.view(1)])[None]]

    def move(self, kept: list[Tensor]) -> None:
        """Towards the mean of what was kept, of all ranks."""
        for part in kept:
            mean, rows = mean_of_all(part.sum(0), None)
            mean = torch.where(rows > 0, mean, self.center)
            self.center = moved(self.center, mean, self.momentum)


def watched(
    embeddings: Sequence[Tensor], scores: Tensor, temp: float, center: Tensor
) -> dict[str, Tensor]:
    """What tells of collapse, of a teacher's scores (R, K): of 256 rows, as all would be as much
    work as the loss."""
    told = watch.of_teacher(scores[: watch.ROWS], temp, center)
    return {**watch.of_embeddings(*embeddings), **told}


def class_tokens(encoder: nn.Module, method: str) -> MaskedViT:
    """`MaskedViT` for a method that reads class token and patches.

    Raises ValueError for an encoder whose features are not its class token.
    """
    masked = MaskedViT(encoder)
    vit: Any = masked.vit
    if vit.cls_token is None or vit.global_pool != "token":
        raise ValueError(
            f"method.name={method} trains class tokens, and this model's features are "
            f"{vit.global_pool!r} of {masked.prefix} prefix tokens: give "
            "model.kwargs.global_pool=token, and a class token"
        )
    return masked


def packed(count: Tensor, most: int, bound: int | None) -> tuple[Tensor, Tensor]:
    """Rows (T,) int64 of (B G M) that are hidden patches, and what each counts, (T,) float32.

    count (B, G): how many of the M = most rows of a view are.  A row counts 1 / (B G count), so
    that a view is a mean, and one without any is 0.  bound: T, where nobody is to wait until they
    are counted: those to spare count 0, and what is beyond is left out of its view's mean.
    """
    views = count.flatten()
    hidden = (torch.arange(most, device=count.device) < views[:, None]).flatten()
    bound = int(hidden.sum()) if bound is None else min(bound, len(hidden))
    hidden &= hidden.cumsum(0) <= bound
    each = hidden.view(-1, most).sum(1, dtype=torch.float32)
    rows = hidden.byte().argsort(descending=True, stable=True)[: max(bound, 1)]
    return rows, hidden[rows] / (each * len(views)).clamp(min=1)[rows // most]
