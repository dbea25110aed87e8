"""What contrastive losses share: rows of length one, and two views side by side."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.distributed import LOCAL, Group, rank, require_all_even, world_size
from fastssl.kernels import exclude_self, pairwise_lse
from fastssl.losses._checks import check_embeddings, check_ids, check_positive
from fastssl.losses._sharded import Rule, check_strategy, sharded_lse
from fastssl.losses._unit import unit
from fastssl.losses.queue import Queue


def joined_ids(n: int, group: Group, device: torch.device) -> Tensor:
    """The places that this rank's n rows have in the joined batch."""
    return torch.arange(n, device=device) + n * rank(group)


def info_nce(positive: Tensor, negative: Tensor) -> Tensor:
    """-log of the positive's share, of its score and the log-sum-exp of the negatives' scores.

    Near a perfect match log(e^p + e^n) - p would be a difference of two large numbers; this keeps
    its digits.  Without negatives, n = -inf, it is 0 with gradient 0.
    """
    return -F.logsigmoid(positive - negative)


def against_queue(z: Tensor, keys: Tensor, queue: Queue, temperature: float) -> Tensor:
    """The mean InfoNCE of rows z (B, D), each with its positive in keys, against the queue's."""
    queue.fit(keys)
    queries = unit(z)
    positive = (queries * unit(keys)).sum(-1) / temperature
    rows = queries.to(z.dtype)  # see TwoViews
    return info_nce(positive, pairwise_lse(rows, queue.keys.to(rows), 1 / temperature)).mean()


class ContrastiveLoss(nn.Module):
    """What every contrastive loss has: a temperature, and the ranks that it contrasts over."""

    def __init__(
        self,
        temperature: float,
        gather_distributed: bool = True,
        process_group: Group = None,
        strategy: str = "gather",
    ) -> None:
        super().__init__()
        self.check_temperature(temperature)
        self.temperature = temperature
        self.process_group = process_group if gather_distributed else LOCAL
        self.strategy = check_strategy(strategy)

    def check_temperature(self, temperature: float) -> None:
        check_positive(temperature=temperature)
        if temperature < 1e-8:
            raise ValueError(f"temperature must be at least 1e-8, got {temperature}")

    def two_views(self, z0: Tensor, z1: Tensor, **ids: Tensor) -> TwoViews:
        """Check z0, z1 (B, D) and ids (B,), then lay the views of an image side by side."""
        # First what all ranks refuse together: one that left alone would leave the others waiting.
        require_all_even(self.process_group, z0=z0, z1=z1, **ids)
        check_embeddings(z0=z0, z1=z1)
        for name, given in ids.items():
            check_ids(name, given, z0)
        rows = torch.stack([unit(z0), unit(z1)], dim=1).flatten(0, 1)
        images = joined_ids(len(z0), self.process_group, z0.device)
        return TwoViews(rows, twice(images), z0.dtype, self.process_group, self.strategy)

    def extra_repr(self) -> str:
        gather = self.process_group != LOCAL
        return f"temperature={self.temperature}, gather_distributed={gather}"


class TwoViews(NamedTuple):
    """This rank's b images: 2b rows of length one, the two of an image together, and their ids.

    dtype: of the products of all pairs.  Embeddings of 16 bits are normalised in float32, and then
    rounded back: a GPU multiplies those many times as fast, and the ranks send half as much.
    """

    rows: Tensor
    images: Tensor
    dtype: torch.dtype
    group: Group
    strategy: str

    def positives(self) -> Tensor:
        """(b, 1) cosines of each image's two views."""
        first, second = self.rows.unflatten(0, (-1, 2)).unbind(1)
        return (first * second).sum(-1, keepdim=True)

    def others(self, scale: float | Tensor, *rules: Rule) -> Tensor:
        """(b, 2) log-sum-exps of each view's scaled cosines with all views of other images.

        scale: a number, or one for each row.  rules: which of those pairs are kept, by row.
        """
        self_out = Rule(exclude_self, self.images, self.images)
        rows = self.rows.to(self.dtype)
        negatives, _ = sharded_lse(
            rows,
            rows,
            scale,
            rules=(self_out, *rules),
            process_group=self.group,
            strategy=self.strategy,
        )
        return negatives.unflatten(0, (-1, 2))

    def joined_images(self, at_least: int = 1) -> int:
        """The images of the joined batch.  Raises ValueError when they are too few."""
        images = len(self.rows) // 2 * world_size(self.group)
        if images < at_least:
            raise ValueError(f"the joined batch must have at least {at_least} images, got {images}")
        return images


def twice(per_image: Tensor) -> Tensor:
    """(b,) -> (2b,): each image's value for both of its views."""
    return per_image.unsqueeze(1).expand(-1, 2).flatten()
