"""Alignment and uniformity: an image's views close together, all images spread over the sphere."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastssl.distributed import BUILT, Group, all_gather_rows, all_reduce_sum
from fastssl.losses import _ahead
from fastssl.losses._checks import check_batch, check_not_negative, check_positive
from fastssl.losses._contrastive import lse_of_others
from fastssl.losses._loss import Loss
from fastssl.losses._sharded import check_strategy
from fastssl.losses._unit import unit


class HypersphereLoss(Loss):
    """The mean distance of an image's views, and the log of the mean Gaussian of all pairs.

        loss = mean_i |x_i - y_i|^alpha + lam (uniform(x) + uniform(y)) / 2
        uniform(x) = log mean_{i != j} exp(-t |x_i - x_j|^2)          rows of length one

    Shapes   z_a, z_b (B, D): the two views of the same B images, row by row; any float dtype.
    Returns  scalar float32; the mean over ranks is the loss.
    Memory   uniform(x) is a log-sum-exp of 2 t x_i . x_j, streamed: no B x B distances.
    Raises   ValueError: other shapes, dtypes or devices, or other ones on another rank; fewer than
             2 images in the joined batch; t or alpha not > 0; lam < 0.
    Ranks    the pairs are the joined batch's, and so is the mean over ranks of value and gradient.
             gather_distributed=False: each rank's own.  strategy: as in NTXentLoss.
    On a CPU in one process the gradient is made with the loss, and backward only multiplies.
    Source   Wang & Isola 2020, arXiv:2005.10242, section 4.1; t, lam and alpha as there.
    Differs  from lightly.loss.hypersphere_loss.HypersphereLoss, whose value and gradient it has in
             one process: gathers by default, where lightly's has each rank's own pairs; views that
             coincide have gradient 0 at any alpha.

    >>> z = torch.eye(4)
    >>> round(HypersphereLoss()(z, z).item(), 4)  # log exp(-2)
    -2.0
    """

    shown = ("t", "lam", "alpha", "gather_distributed")

    def __init__(
        self,
        t: float = 1.0,
        lam: float = 1.0,
        alpha: float = 2.0,
        *,
        gather_distributed: bool = BUILT,
        process_group: Group = None,
        strategy: str = "gather",
    ) -> None:
        super().__init__(gather_distributed, process_group)
        check_positive(t=t, alpha=alpha)
        check_not_negative(lam=lam)
        self.t, self.lam, self.alpha = t, lam, alpha
        self.strategy = check_strategy(strategy)

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        if _ahead.fits(self.process_group, z_a, z_b, least=2):
            loss = _ahead.hypersphere(z_a, z_b, self.t, self.lam, self.alpha)
            if loss is not None:
                return loss
        n = check_batch(self.process_group, least=2, z_a=z_a, z_b=z_b)
        x, y = unit(z_a), unit(z_b)
        apart = (x - y).square().sum(1)
        if self.alpha != 2:
            there = apart > 0  # a root has no slope at 0
            apart = torch.where(there, torch.where(there, apart, 1) ** (self.alpha / 2), 0)
        uniform = self._uniform(x, z_a.dtype, n) + self._uniform(y, z_b.dtype, n)
        return apart.mean() + self.lam * uniform / 2

    def _uniform(self, x: Tensor, dtype: torch.dtype, n: int) -> Tensor:
        group, t, rows = self.process_group, self.t, x.to(dtype)  # see TwoViews
        lse, _ = lse_of_others(rows, rows, 2 * t, group, self.strategy)
        total = all_gather_rows(lse, group, check=False).logsumexp(0) - 2 * t
        # Rows of zeros, which have no direction, are 1 from the others and 0 from each other.
        zeros = all_reduce_sum((x.detach() == 0).all(1).sum(), group).to(total.dtype)
        nearer = -2 * zeros * (n - zeros) * math.exp(-t) * math.expm1(-t)
        nearer = nearer - zeros * (zeros - 1) * math.expm1(-2 * t)
        return torch.logaddexp(total, nearer.log()) - math.log(n * (n - 1))


def hypersphere_reference(z_a: Tensor, z_b: Tensor, t: float, lam: float, alpha: float) -> Tensor:
    """The formula by the distances of all pairs, in one process."""
    x, y = unit(z_a), unit(z_b)
    uniform = [(-t * torch.pdist(z).square()).exp().mean().log() for z in (x, y)]
    return (x - y).norm(dim=1).pow(alpha).mean() + lam * (uniform[0] + uniform[1]) / 2
