"""NNCLR: a past image's embedding, the nearest one, stands in for a view's own."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.distributed import Group
from fastssl.kernels import pairwise_topk
from fastssl.losses._checks import check_batch
from fastssl.losses._contrastive import ContrastiveLoss
from fastssl.losses._unit import unit
from fastssl.losses.ntxent import ntxent_reference
from fastssl.losses.queue import Queue


class NNCLRLoss(ContrastiveLoss):
    """Each view's nearest neighbor in a queue of past projections must find the other view.

    The formula is `nnclr_reference`, in nats.  Then, in training, z1 of all ranks takes the oldest
    keys' place: the neighbors are of the queue before.  update=False leaves the queue alone.

    Shapes   z0, z1 (B, dim): projections; p0, p1 (B, dim): the predictions made from them.  All
             are normalized here; any float dtype.  z0 and z1 get no gradient.
    Returns  scalar float32: the mean over this rank's rows of both terms.  0 <= loss.
    State    queue: a `Queue` of `size` keys, in state_dict.  dim=None: as wide as the first z0.
    Raises   ValueError: other shapes, dtypes or devices, or other ones on another rank;
             temperature not > 0; size or dim below 1.  A NaN in z0 or z1 makes the loss NaN.
    Ranks    as NTXentLoss; every rank has the same queue.
    Source   Dwibedi et al. 2021, arXiv:2104.14548, section 3.2.
    Differs  from the paper's eq. 3 and 4, where only the predictions stand in the denominator, by
             SimCLR's, where neighbors contrast with each other too: as lightly composes it of
             NNMemoryBankModule and NTXentLoss, whose value and gradient this has in one process.
             The queue wraps where `Queue` says.

    >>> loss = NNCLRLoss(2, 4, temperature=0.5)
    >>> _ = loss.queue.push(torch.eye(4)[:2])
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
        count = check_batch(self.process_group, z0=z0, z1=z1, p0=p0, p1=p1)
        self.queue.fit(z0)
        loss = (self._contrast(z0, p1, count) + self._contrast(z1, p0, count)) / 2
        if self.training and update:
            self.queue.push(z1, self.process_group, check=False)
        return loss

    def _contrast(self, z: Tensor, p: Tensor, count: int) -> Tensor:
        """The NT-Xent of the neighbors of z with p."""
        views = self.lay_out(self._find_neighbors(z), unit(p), p.dtype, count)
        return views.nt_xent(self.temperature)

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
