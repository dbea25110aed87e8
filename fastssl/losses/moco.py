"""MoCo: queries against a queue of past keys, or against the keys of the whole batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.distributed import BUILT, Group
from fastssl.losses._checks import check_batch
from fastssl.losses._contrastive import ContrastiveLoss, against_queue, info_nce, lse_of_others
from fastssl.losses._unit import unit
from fastssl.losses.queue import Queue


class MoCoLoss(ContrastiveLoss):
    """Each query must find its own key among the keys of a queue.

    The formula is `moco_reference`, in nats.  Then, in training, the keys of all ranks take the
    oldest ones' place in the queue: the loss is that of the queue before.  update=False leaves the
    queue alone: a symmetric loss is loss(q0, k1, update=False) + loss(q1, k0).

    Shapes   query, key (B, dim): normalized here; any float dtype.  key gets no gradient.
    Returns  scalar float32: the mean over this rank's B queries.  0 <= loss.
    State    queue: a `Queue` of `size` keys, in state_dict.  Nothing of B x size is held.
    Raises   ValueError: other shapes, dtypes or devices, or other ones on another rank;
             temperature not > 0; size or dim below 1.
    Ranks    every rank has the same queue, and meets it with its own queries: the mean over ranks
             of value and gradient is the joined batch's.
    Source   He et al. 2020, MoCo, arXiv:1911.05722, eq. 1 and algorithm 1 (t = 0.07, 65536 keys);
             MoCo v2, arXiv:2003.04297, has t = 0.2.

    >>> loss = MoCoLoss(4, temperature=1.0, size=2)
    >>> _ = loss.queue.push(torch.eye(4)[:2])
    >>> z = torch.eye(4)[2:]
    >>> round(loss(z, z).item(), 4)  # ln(e + 2) - 1
    0.5514
    >>> loss.queue.keys.argmax(1).tolist()
    [2, 3]
    """

    def __init__(
        self, dim: int, temperature: float = 0.07, size: int = 65536, *, process_group: Group = None
    ) -> None:
        super().__init__(temperature, process_group=process_group)
        self.queue = Queue(size, dim)

    def forward(self, query: Tensor, key: Tensor, *, update: bool = True) -> Tensor:
        check_batch(self.process_group, query=query, key=key)
        loss = against_queue(query, key.detach(), self.queue, self.temperature)
        if self.training and update:
            self.queue.push(key, self.process_group, check=False)
        return loss


class MoCoV3Loss(ContrastiveLoss):
    """Each query must find its own key among the keys of the whole batch: MoCo without a queue.

    The formula is `moco_v3_reference`: its factor 2 t keeps the size of the gradient when the
    temperature t changes.  The paper's loss is symmetric: loss(q0, k1) + loss(q1, k0).

    Shapes   query, key (B, D): normalized here; any float dtype.  key gets no gradient.
    Returns  scalar float32: the mean over this rank's B queries.  0 <= loss; 2 t ln N when all
             embeddings of N images agree.  Nothing of N x N is held.
    Raises   ValueError: other shapes, dtypes or devices, or other ones on another rank;
             temperature not > 0.
    Ranks    as NTXentLoss.
    Source   Chen et al. 2021, MoCo v3, arXiv:2104.02057, algorithm 1.

    >>> round(MoCoV3Loss(temperature=0.5)(torch.eye(4), torch.eye(4)).item(), 4)  # ln(e^2 + 3) - 2
    0.3408
    """

    def __init__(
        self,
        temperature: float = 0.2,
        *,
        gather_distributed: bool = BUILT,
        process_group: Group = None,
        strategy: str = "gather",
    ) -> None:
        super().__init__(temperature, gather_distributed, process_group, strategy)

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        group, t = self.process_group, self.temperature
        check_batch(group, query=query, key=key)
        q, k = unit(query), unit(key.detach())
        rows, keys = q.to(query.dtype), k.to(query.dtype)  # see TwoViews
        negative, _ = lse_of_others(rows, keys, 1 / t, group, self.strategy)
        return 2 * t * info_nce((q * k).sum(-1) / t, negative).mean()


def moco_reference(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """MoCo's formula, all (B, 1 + size) scores at once, the positive in front; queue (size, D)."""
    q, k = unit(query), unit(key.detach())
    scores = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.to(q).T], dim=1)
    return F.cross_entropy(scores / temperature, scores.new_zeros(len(q), dtype=torch.int64))


def moco_v3_reference(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """MoCo v3's formula, all (B, B) scores at once, in one process."""
    scores = unit(query) @ unit(key.detach()).T / temperature
    return 2 * temperature * F.cross_entropy(scores, torch.arange(len(scores), device=key.device))
