"""NNCLR: a past image's embedding, the nearest one, stands in for a view's own."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.distributed import Group, require_all_even
from fastssl.kernels import pairwise_topk
from fastssl.losses._checks import check_embeddings
from fastssl.losses._contrastive import ContrastiveLoss, TwoViews, info_nce, joined_ids, twice
from fastssl.losses._unit import unit
from fastssl.losses.ntxent import ntxent_reference
from fastssl.losses.queue import Queue


class NNCLRLoss(ContrastiveLoss):
    """Each view's nearest neighbour in a queue of past projections must find the other view.

        nn(z) = the key of the queue with the greatest cosine to z
        loss  = 1/2 NTXent(nn(z0), p1) + 1/2 NTXent(nn(z1), p0)                        [nats]

    Then, in training, z1 of all ranks takes the oldest keys' place: the neighbours are of the
    queue before.  update=False leaves the queue alone.

    Shapes   z0, z1 (B, dim): projections; p0, p1 (B, dim): the predictions made from them.  All
             are normalised here; any float dtype.  z0 and z1 get no gradient.
    Returns  scalar float32: the mean over this rank's rows of both terms.  0 <= loss.
    State    queue: a `Queue` of `size` keys, in state_dict.  dim=None: as wide as the first z0.
    Raises   ValueError: shapes that are not four equal (B, dim), none empty; dtypes or devices
             that differ, or are not floats; temperature not > 0; size or dim below 1; batches that
             differ between ranks (on every rank).  A NaN in z0 or z1 makes the loss NaN.
    Ranks    every rank has the same queue; the rows meet neighbours and predictions of all ranks
             (strategy: "gather" or "ring").  The mean over ranks of value and gradient is that of
             the joined batch.
    Source   Dwibedi et al. 2021, arXiv:2104.14548, section 3.2.
    Differs  from the paper's eq. 3 and 4, where only the predictions stand in the denominator, by
             SimCLR's, where neighbours contrast with each other too: as lightly composes it of
             NNMemoryBankModule and NTXentLoss, whose value and gradient this has in one process.
             The queue wraps where `Queue` says.

    >>> loss = NNCLRLoss(2, 4, temperature=0.5)
    >>> loss.queue.push(torch.eye(4)[:2])
    >>> z = torch.eye(4)[:2]
    >>> round(loss(z, z, z, z).item(), 4)  # ln(e^2 + 2) - 2
    0.2395
    """

    def __init__(
        self,
        size: int = 65536,
        dim: int | None = None,
        temperature: float = 0.1,
        *,
        process_group: Group = None,
        strategy: str = "gather",
    ) -> None:
        super().__init__(temperature, process_group=process_group, strategy=strategy)
        self.queue = Queue(size, dim)

    def forward(
        self, z0: Tensor, z1: Tensor, p0: Tensor, p1: Tensor, *, update: bool = True
    ) -> Tensor:
        require_all_even(self.process_group, z0=z0, z1=z1, p0=p0, p1=p1)
        check_embeddings(z0=z0, z1=z1, p0=p0, p1=p1)
        self.queue.fit(z0)
        loss = (self._contrast(z0, p1) + self._contrast(z1, p0)) / 2
        if self.training and update:
            self.queue.push(z1, self.process_group, check=False)
        return loss

    def _contrast(self, z: Tensor, p: Tensor) -> Tensor:
        """The NT-Xent of the neighbours of z with p."""
        rows = torch.stack([self._find_neighbors(z), unit(p)], dim=1).flatten(0, 1)
        images = twice(joined_ids(len(p), self.process_group, p.device))
        views = TwoViews(rows, images, p.dtype, self.process_group, self.strategy)
        return info_nce(
            views.positives() / self.temperature, views.others(1 / self.temperature)
        ).mean()

    @torch.no_grad()
    def _find_neighbors(self, z: Tensor) -> Tensor:
        """(B, dim): the queue's key nearest to each row, and NaN for a row that is NaN."""
        queries = unit(z)
        keys = self.queue.bank.to(queries)
        cosines, nearest = pairwise_topk(queries, keys, 1)
        return torch.where(cosines.isnan(), cosines, keys[nearest[:, 0]])


def nnclr_reference(
    z0: Tensor, z1: Tensor, p0: Tensor, p1: Tensor, queue: Tensor, temperature: float
) -> Tensor:
    """The formula, with NT-Xent's; queue (size, D): rows of length one."""
    near0, near1 = (queue.to(p0)[(unit(z) @ queue.to(unit(z)).T).argmax(1)] for z in (z0, z1))
    first = ntxent_reference(near0, p1, temperature)
    return (first + ntxent_reference(near1, p0, temperature)) / 2
