"""MACL: SimCLR at a temperature that rises as the views match, each row weighed by its error."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.distributed import BUILT, Group, all_reduce_sum, world_size
from fastssl.losses import _ahead
from fastssl.losses._checks import check_batch, check_within
from fastssl.losses._contrastive import ContrastiveLoss, info_nce
from fastssl.losses._unit import unit

EPS = 1e-8


class MACLLoss(ContrastiveLoss):
    """NT-Xent at the temperature t, and each row's divided by 1 - P, of its positive's share P.

        t = temperature (1 + alpha (A - A_0)),   A: the mean cosine of an image's views
        loss = mean over the 2N rows of -log P / (1 - P + 1e-8)

    The formula is `macl_reference`, in nats; A and the divisor have no gradient.

    Shapes   z0, z1 (B, D): the two views of the same B images, row by row; any float dtype.
    Returns  scalar float32: the mean over this rank's 2B rows.
    Raises   ValueError: other shapes, dtypes or devices, or other ones on another rank;
             temperature not > 0; alpha or A_0 outside of 0..1.
    Ranks    as NTXentLoss; A is the joined batch's.
    On a CPU in one process the gradient is made with the loss, and backward only multiplies.
    Source   Huang et al. 2023, arXiv:2207.07874, eq. 7 and 12.
    Differs  from lightly.loss.MACLLoss, whose value and gradient it has in one process: gathers by
             default, where lightly's has each rank's own negatives; 1 - P keeps its digits near a
             match, where lightly's is rounded to 0 and divides by 1e-8; no eps.

    >>> z = torch.eye(4)
    >>> round(MACLLoss(0.5, alpha=0.0)(z, z).item(), 4)  # -log P / (1 - P), P = e^2 / (e^2 + 6)
    1.3265
    """

    shown = ("temperature", "alpha", "A_0", "gather_distributed")

    def __init__(
        self,
        temperature: float = 0.1,
        alpha: float = 0.5,
        A_0: float = 0.0,
        *,
        gather_distributed: bool = BUILT,
        process_group: Group = None,
        strategy: str = "gather",
    ) -> None:
        super().__init__(temperature, gather_distributed, process_group, strategy)
        check_within(0, 1, alpha=alpha, A_0=A_0)
        self.alpha, self.A_0 = alpha, A_0

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        group = self.process_group
        if _ahead.fits(group, z0, z1):
            loss = _ahead.nt_xent(z0, z1, self._at, _weight)
            if loss is not None:
                return loss
        count = check_batch(group, z0=z0, z1=z1)
        views = self.lay_out(unit(z0), unit(z1), z0.dtype, count)
        positive = views.positives()
        match = all_reduce_sum(positive.detach().mean(), group) / world_size(group)
        t = self.temperature * (1 + self.alpha * (match - self.A_0))
        losses = info_nce(positive / t, views.others(1 / t))
        return (losses * _weight(losses.detach())).mean()

    def _at(self, match: Tensor) -> float:
        """The temperature of that mean cosine; a number that scores can be divided by."""
        return self.temperature * (1 + self.alpha * (float(match) - self.A_0)) or 1e-30


def _weight(losses: Tensor) -> Tensor:
    """1 / (1 - P + 1e-8) of losses -log P."""
    return (EPS - torch.expm1(-losses)).reciprocal_()


def macl_reference(
    z0: Tensor, z1: Tensor, temperature: float, alpha: float = 0.5, A_0: float = 0.0
) -> Tensor:
    """The formula, all (2B, 2B) scores at once, in one process."""
    z, image = unit(torch.cat([z0, z1])), torch.arange(len(z0), device=z0.device).repeat(2)
    cosines = z @ z.T
    positive = cosines.diagonal(len(z0)).repeat(2)
    t = temperature * (1 + alpha * (positive.detach().mean() - A_0))
    negative = (cosines / t).masked_fill(image[:, None] == image, -torch.inf).logsumexp(1)
    losses = torch.logaddexp(positive / t, negative) - positive / t
    return (losses / (1 - (-losses.detach()).exp() + EPS)).mean()
