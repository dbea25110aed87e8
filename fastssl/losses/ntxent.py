"""SimCLR's loss, over the batch or over a bank of past keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.distributed import Group
from fastssl.losses import _ahead
from fastssl.losses._checks import check_batch, is_finite
from fastssl.losses._contrastive import ContrastiveLoss, against_queue
from fastssl.losses._unit import unit
from fastssl.losses.queue import Queue


class NTXentLoss(ContrastiveLoss):
    """SimCLR: each view must find its image's other view among all other views of the batch.

    The formula is `ntxent_reference`, in nats.  Computed is the mean of -log sigmoid(p - n), p a
    view's score with its other view and n the log-sum-exp of the negatives': near a perfect match
    a cross-entropy is a difference of numbers near 1 / t, of which float32 keeps nothing.

    With a memory bank each row of z0 must find its row of z1 among the bank's keys.  Then z1, of
    all ranks, takes the oldest keys' place, if z0 requires a gradient: an evaluation leaves the
    bank as it is.  The loss is that of the bank before.

    Shapes   z0, z1 (B, D): the two views of the same B images, row by row; any float dtype.
             memory_bank_size: keys or (keys, D), D that of the first batch; 0 keys: no bank.
    Returns  scalar float32: the mean over this rank's rows.  0 <= loss; ln(2N - 1) when all
             embeddings of N images agree.  No N x N scores are held.
    State    memory_bank: a `Queue`, in state_dict.
    Raises   ValueError: other shapes, dtypes or devices, or other ones on another rank;
             abs(temperature) < 1e-8 or not finite; a bank that is not keys or (keys, D).  A non-
             finite input is no error: it gives a non-finite loss.
    Ranks    each rank's rows meet the keys of all, gathered once (strategy="gather") or passed
             round ("ring"): the mean over ranks of value and gradient is the joined batch's.
             gather_distributed=False: each rank's batch alone.
    On a CPU in one process the gradient is made with the loss, and backward only multiplies.
    Source   Chen et al. 2020, SimCLR, arXiv:2002.05709, eq. 1; the bank: MoCo, arXiv:1911.05722.
    Differs  from lightly.loss.NTXentLoss, whose value and gradient it has in one process: gathers
             by default, because W small batches are not the large batch that was asked for;
             normalizes and sums in float32 whatever the dtype; the bank begins with the same keys
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
        given = memory_bank_size
        size = (given,) if isinstance(given, int) else tuple(given)
        if len(size) not in (1, 2):
            raise ValueError(f"memory_bank_size must be keys or (keys, D), got {given}")
        self.memory_bank = Queue(*size) if size[0] else None

    def check_temperature(self, temperature: float) -> None:
        if not (is_finite(temperature) and abs(temperature) >= 1e-8):
            want = "at least 1e-8 in magnitude and finite"
            raise ValueError(f"temperature must be {want}, got {temperature}")

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        if self.memory_bank is not None:
            return self._against_bank(z0, z1, self.memory_bank)
        if _ahead.fits(z0, self.process_group) and isinstance(self.temperature, float | int):
            check_batch(self.process_group, z0=z0, z1=z1)
            loss = _ahead.nt_xent(z0, z1, self.temperature)
            if loss is not None:
                return loss
        return self.two_views(z0, z1).nt_xent(self.temperature)

    def _against_bank(self, z0: Tensor, z1: Tensor, bank: Queue) -> Tensor:
        check_batch(self.process_group, z0=z0, z1=z1)
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
