"""SimCLR's loss, over the batch or over a bank of past keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.distributed import Group, require_all_even
from fastssl.losses._checks import check_embeddings, is_finite
from fastssl.losses._contrastive import ContrastiveLoss, against_queue, info_nce
from fastssl.losses._unit import unit
from fastssl.losses.queue import Queue


class NTXentLoss(ContrastiveLoss):
    """SimCLR: each view must find its image's other view among all other views of the batch.

    With z the 2N normalised embeddings and p(i) the other view of i:

        loss = mean_i [ log sum_{j != i} exp(z_i.z_j / t) - z_i.z_p(i) / t ]        [nats]
             = mean_i -log sigmoid(z_i.z_p(i) / t - n_i),  n_i the log-sum-exp of i's negatives

    The second form is the one computed: near a perfect match the first is a difference of two
    numbers near 1 / t, and float32 keeps nothing of it.

    With a memory bank, z0_i must find z1_i among the bank's keys, and rows are the N of z0 alone.
    Then z1, of all ranks, takes the oldest keys' place, if z0 requires a gradient: an evaluation
    leaves the bank as it is.  The loss is that of the bank before.

    Shapes   z0, z1 (B, D): the two views of the same B images, row by row; any float dtype.
             memory_bank_size: 0, or (keys, D).
    Returns  scalar float32: the mean over this rank's rows.  0 <= loss; ln(2N - 1) when all
             embeddings agree.  Only the log-sum-exp meets N x N pairs, and it holds none of them.
    State    memory_bank: a `Queue`, in state_dict.
    Raises   ValueError: shapes that are not two equal (B, D), none empty; dtypes or devices that
             differ, or are not floats; abs(temperature) < 1e-8 or not finite; a bank that is not 0
             or (keys, D); batches that differ between ranks (on every rank).  A non-finite
             input is not an error here: it gives a non-finite loss.
    Ranks    each rank's rows meet the keys of all, gathered once (strategy="gather") or passed
             round ("ring").  The mean over ranks of value and gradient is that of the joined batch.
             gather_distributed=False contrasts within each rank's batch only.
    Source   Chen et al. 2020, SimCLR, arXiv:2002.05709, eq. 1; the bank: MoCo, arXiv:1911.05722.
    Differs  from lightly.loss.NTXentLoss, whose value and gradient it has in one process: gathers
             by default, because W small batches are not the large batch that was asked for;
             normalises and sums in float32 whatever the dtype; the bank begins with the same keys
             on every rank, is saved, and wraps where `Queue` says.

    >>> z = torch.eye(4)
    >>> round(NTXentLoss(temperature=0.5)(z, z).item(), 4)  # ln(e^2 + 6) - 2
    0.5944
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = True,
        *,
        process_group: Group = None,
        strategy: str = "gather",
    ) -> None:
        super().__init__(temperature, gather_distributed, process_group, strategy)
        size = memory_bank_size
        self.memory_bank = None
        if size != 0:
            if isinstance(size, int) or len(size) != 2:
                raise ValueError(f"memory_bank_size must be 0 or (keys, D), got {size}")
            self.memory_bank = Queue(*size)

    def check_temperature(self, temperature: float) -> None:
        if not (is_finite(temperature) and abs(temperature) >= 1e-8):
            want = "at least 1e-8 in magnitude and finite"
            raise ValueError(f"temperature must be {want}, got {temperature}")

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        if self.memory_bank is not None:
            return self._against_bank(z0, z1, self.memory_bank)
        views = self.two_views(z0, z1)
        positive = views.positives() / self.temperature
        return info_nce(positive, views.others(1 / self.temperature)).mean()

    def _against_bank(self, z0: Tensor, z1: Tensor, bank: Queue) -> Tensor:
        require_all_even(self.process_group, z0=z0, z1=z1)
        check_embeddings(z0=z0, z1=z1)
        loss = against_queue(z0, z1, bank, self.temperature)
        if z0.requires_grad and torch.is_grad_enabled():
            bank.push(z1, self.process_group, check=False)
        return loss


def ntxent_reference(z0: Tensor, z1: Tensor, temperature: float) -> Tensor:
    """The formula, all (2B, 2B) scores at once, in one process."""
    z = unit(torch.cat([z0, z1]))  # (2B, D): i and i + B are the views of image i
    i = torch.arange(len(z), device=z.device)
    scores = (z @ z.T / temperature).masked_fill(i[:, None] == i, -torch.inf)
    return F.cross_entropy(scores, i.roll(len(z0)))
