"""What contrastive losses share: rows of length one, and two views side by side."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.distributed import BUILT, Group, rank
from fastssl.kernels import exclude_self, pairwise_lse
from fastssl.losses._checks import check_batch, check_temperature
from fastssl.losses._loss import Loss
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


def lse_of_others(
    rows: Tensor,
    keys: Tensor,
    scale: float | Tensor,
    group: Group,
    strategy: str,
    *,
    both: bool = False,
) -> tuple[Tensor, Tensor]:
    """`sharded_lse` without the pairs of a row and the key in its place."""
    ids = joined_ids(len(rows), group, rows.device)
    rules = (Rule(exclude_self, ids, ids),)
    return sharded_lse(
        rows, keys, scale, rules=rules, both=both, process_group=group, strategy=strategy
    )


def against_queue(z: Tensor, keys: Tensor, queue: Queue, temperature: float) -> Tensor:
    """The mean InfoNCE of rows z (B, D), each with its positive in keys, against the queue's."""
    queue.fit(keys)
    queries = unit(z)
    positive = (queries * unit(keys)).sum(-1) / temperature
    rows = queries.to(z.dtype)  # see TwoViews
    return info_nce(positive, pairwise_lse(rows, queue.keys.to(rows), 1 / temperature)).mean()


class ContrastiveLoss(Loss):
    """What every contrastive loss has: a temperature, and how it meets the other ranks' keys."""

    shown = ("temperature", "gather_distributed")

    def __init__(
        self,
        temperature: float = 0.1,
        gather_distributed: bool = BUILT,
        process_group: Group = None,
        strategy: str = "gather",
    ) -> None:
        super().__init__(gather_distributed, process_group)
        self.check_temperature(temperature)
        self.temperature = temperature
        self.strategy = check_strategy(strategy)

    def check_temperature(self, temperature: float) -> None:
        check_temperature(temperature)

    def two_views(self, z0: Tensor, z1: Tensor, *, least: int = 1, **ids: Tensor) -> TwoViews:
        """Check z0, z1 (B, D) and ids (B,), then lay the views of an image side by side."""
        count = check_batch(self.process_group, ids=ids, least=least, out0=z0, out1=z1)
        return self.lay_out(unit(z0), unit(z1), z0.dtype, count)

    def lay_out(self, first: Tensor, second: Tensor, dtype: torch.dtype, count: int) -> TwoViews:
        """TwoViews of rows of length one, of `count` images on all ranks."""
        rows = torch.stack([first, second], dim=1).flatten(0, 1)
        images = joined_ids(len(first), self.process_group, rows.device)
        return TwoViews(rows, twice(images), count, dtype, self.process_group, self.strategy)


class TwoViews(NamedTuple):
    """This rank's b images: 2b rows of length one, the two of an image together, and their ids.

    count: the images of all ranks.
    dtype: of the products of all pairs.  Embeddings of 16 bits are normalized in float32, and then
    rounded back: a GPU multiplies those many times as fast, and the ranks send half as much.
    """

    rows: Tensor
    images: Tensor
    count: int
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
        rules = (Rule(exclude_self, self.images, self.images), *rules)
        rows, group = self.rows.to(self.dtype), self.group
        lse, _ = sharded_lse(
            rows, rows, scale, rules=rules, process_group=group, strategy=self.strategy
        )
        return lse.unflatten(0, (-1, 2))

    def nt_xent(self, temperature: float, *rules: Rule) -> Tensor:
        """The mean InfoNCE of each view with its other view and `others`."""
        others = self.others(1 / temperature, *rules)
        return info_nce(self.positives() / temperature, others).mean()


def twice(per_image: Tensor) -> Tensor:
    """(b,) -> (2b,): each image's value for both of its views."""
    return per_image.unsqueeze(1).expand(-1, 2).flatten()
