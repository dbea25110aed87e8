"""SimCLR's loss, over the batch or over a bank of past keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.distributed import BUILT, Group
from fastssl.losses import _ahead
from fastssl.losses._checks import check_batch, is_finite
from fastssl.losses._contrastive import ContrastiveLoss, against_queue
from fastssl.losses._labeled import labeled_nt_xent
from fastssl.losses._loss import also_named
from fastssl.losses._unit import unit
from fastssl.losses.queue import Banked, Queue, bank_of


class NTXentLoss(Banked, ContrastiveLoss):
    """SimCLR: each view must find its image's other view among all other views of the batch.

    The formula is `ntxent_reference`, in nats.  Computed is the mean of -log sigmoid(p - n), p a
    view's score with its other view and n the log-sum-exp of the negatives': near a perfect match
    a cross-entropy is a difference of numbers near 1 / t, of which float32 keeps nothing.

    With a memory bank each row of out0 must find its row of out1 among the bank's keys.  Then out1,
    of all ranks, takes the oldest keys' place, if out0 requires a gradient: an evaluation leaves
    the bank as it is.  The loss is that of the bank before.

    With labels each pair of one label is a positive by itself, against all rows of other labels:
    `labeled_ntxent_reference` of normalized rows, 0 where no label has two.

    Shapes   out0, out1 (B, D): the two views of the same B images, row by row; any float dtype.
             Or embeddings (N, D) and labels (N,), integers of any size.
             memory_bank_size: keys or (keys, D), D that of the first batch; 0 keys: no bank.
    Returns  scalar float32: the mean over this rank's rows.  0 <= loss; ln(2N - 1) when all
             embeddings of N images agree.  No N x N scores are held.
    State    memory_bank: a `Queue`, in state_dict; None without keys.  A state_dict without a bank
             leaves the bank as it is; one with a bank is taken without it where there is none.
             lightly's names of the bank's parts are taken too.
    Raises   ValueError: other shapes, dtypes or devices, or other ones on another rank;
             abs(temperature) < 1e-8 or not finite; a bank that is not keys or (keys, D); labels and
             a bank.  A non-finite input is no error: it gives a non-finite loss.
    Ranks    each rank's rows meet the keys of all, gathered once (strategy="gather", and wherever
             there are labels) or passed round ("ring"): the mean over ranks of value and gradient
             is the joined batch's.  gather_distributed=False: each rank's batch alone.
    On a CPU in one process the gradient is made with the loss, and backward only multiplies.
    Source   Chen et al. 2020, SimCLR, arXiv:2002.05709, eq. 1; the bank: MoCo, arXiv:1911.05722.
    Differs  from lightly.loss.NTXentLoss, whose value and gradient it has in one process: gathers
             by default, because W small batches are not the large batch that was asked for;
             normalizes and sums in float32 whatever the dtype; the bank begins with the same keys
             on every rank, is saved, and wraps where `Queue` says; no cross_entropy and no eps.
             From pytorch_metric_learning's, whose value and gradient it has with labels: no
             indices_tuple, ref_emb or ref_labels; no distance, reducer, regularizer or statistics.

    >>> z = torch.eye(4)
    >>> round(NTXentLoss(temperature=0.5)(z, z).item(), 4)  # ln(e^2 + 6) - 2
    0.5944
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = BUILT,
        *,
        process_group: Group = None,
        strategy: str = "gather",
    ) -> None:
        super().__init__(temperature, gather_distributed, process_group, strategy)
        self.memory_bank = bank_of(memory_bank_size)

    def check_temperature(self, temperature: float) -> None:
        if not (is_finite(temperature) and abs(temperature) >= 1e-8):
            want = "at least 1e-8 in magnitude and finite"
            raise ValueError(f"temperature must be {want}, got {temperature}")

    @also_named(embeddings="out0", labels="out1")
    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        if out1.ndim < out0.ndim:
            return self._labeled(out0, out1)
        if self.memory_bank is not None:
            return self._against_bank(out0, out1, self.memory_bank)
        given = isinstance(self.temperature, float | int)
        if given and _ahead.fits(self.process_group, out0, out1):
            loss = _ahead.nt_xent(out0, out1, self.temperature)
            if loss is not None:
                return loss
        return self.two_views(out0, out1).nt_xent(self.temperature)

    def _against_bank(self, out0: Tensor, out1: Tensor, bank: Queue) -> Tensor:
        check_batch(self.process_group, out0=out0, out1=out1)
        loss = against_queue(out0, out1, bank, self.temperature)
        if out0.requires_grad and torch.is_grad_enabled():
            bank.push(out1, self.process_group, check=False)
        return loss

    def _labeled(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        group, bank = self.process_group, self.memory_bank
        check_batch(group, "N, D", ids={"labels": labels}, embeddings=embeddings)
        if bank is not None:
            raise ValueError(f"labels must come without a memory bank, got memory_bank={bank}")
        rows = unit(embeddings).to(embeddings.dtype)  # see TwoViews
        return labeled_nt_xent(rows, labels, self.temperature, group)


def ntxent_reference(z0: Tensor, z1: Tensor, temperature: float) -> Tensor:
    """The formula, all (2B, 2B) scores at once, in one process."""
    z = unit(torch.cat([z0, z1]))  # (2B, D): i and i + B are the views of image i
    i = torch.arange(len(z), device=z.device)
    scores = (z @ z.T / temperature).masked_fill(i[:, None] == i, -torch.inf)
    return F.cross_entropy(scores, i.roll(len(z0)))
