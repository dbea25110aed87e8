"""Contrast with hard negatives: each negative weighs by how alike it is, debiased."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastssl.distributed import BUILT, Group
from fastssl.losses._checks import check_not_negative
from fastssl.losses._contrastive import ContrastiveLoss, info_nce
from fastssl.losses._unit import unit


class HCLLoss(ContrastiveLoss):
    """NT-Xent whose negatives weigh exp(beta s), corrected for positives among them.

    The formula is `hcl_reference`, in nats.  Its `hard` is computed as the difference of two
    log-sum-exps at two scales; nothing is exponentiated that could overflow.  beta=0, tau_plus=0
    is NT-Xent, and costs one log-sum-exp.

    Shapes   out0, out1 (B, D): the two views of the same B images, row by row; any float dtype.
    Returns  scalar float32: the mean over this rank's 2B rows.  0 <= loss.
    Raises   ValueError: other shapes, dtypes or devices, or other ones on another rank; a joined
             batch of one image, which has no negatives; temperature not > 0; tau_plus outside
             [0, 1); beta < 0.
    Ranks    as NTXentLoss.
    Source   Robinson et al. 2021, Contrastive Learning with Hard Negative Samples,
             arXiv:2010.04592; as in the authors' code, beta multiplies s, which is over t.

    >>> z = torch.eye(4)
    >>> round(HCLLoss(temperature=0.5, tau_plus=0, beta=0)(z, z).item(), 4)  # ln(e^2 + 6) - 2
    0.5944
    """

    shown = (*ContrastiveLoss.shown, "tau_plus", "beta")

    def __init__(
        self,
        temperature: float = 0.5,
        tau_plus: float = 0.1,
        beta: float = 1.0,
        *,
        gather_distributed: bool = BUILT,
        process_group: Group = None,
        strategy: str = "gather",
    ) -> None:
        super().__init__(temperature, gather_distributed, process_group, strategy)
        check_not_negative(tau_plus=tau_plus, beta=beta)
        if tau_plus >= 1:
            raise ValueError(f"tau_plus must be in [0, 1), got {tau_plus}")
        self.tau_plus, self.beta = tau_plus, beta

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        views, t = self.two_views(out0, out1, least=2), self.temperature
        views = views._replace(dtype=views.rows.dtype)  # small differences of large numbers follow
        log_n = math.log(2 * views.count - 2)
        positive = views.positives() / t
        hard = views.others((1 + self.beta) / t)
        mean = hard - (views.others(self.beta / t) if self.beta else log_n)  # log(hard / n)
        mass = log_n + debiased(mean, positive, self.tau_plus, -1 / t)
        return info_nce(positive, mass).mean()


def debiased(mean: Tensor, positive: Tensor, tau_plus: float, least: float | Tensor) -> Tensor:
    """The log of the negatives' mean exponential, corrected for a share of positives among them.

    mean: its log before; positive: the scores of matches; least: the log of what it is at least.
    """
    least = torch.as_tensor(least, dtype=mean.dtype, device=mean.device)
    if tau_plus == 0:
        return torch.maximum(mean, least)
    share = math.log(tau_plus) + positive - mean
    # Where positives take all the mass is at its least; the log of a stand-in has a gradient.
    over = share >= 0
    rest = (-torch.expm1(torch.where(over, -1.0, share))).log()
    return torch.maximum(torch.where(over, -torch.inf, mean + rest - math.log1p(-tau_plus)), least)


def hcl_reference(
    z0: Tensor, z1: Tensor, temperature: float, tau_plus: float, beta: float
) -> Tensor:
    """The formula by exponentials, all (2B, 2B) scores at once, in one process."""
    z, n = unit(torch.cat([z0, z1])), 2 * len(z0) - 2
    image = torch.arange(len(z0), device=z.device).repeat(2)
    scores = z @ z.T / temperature
    negative = scores[image[:, None] != image].view(len(z), n)
    positive = scores.diagonal(len(z0)).repeat(2).exp()
    hard = n * ((1 + beta) * negative).exp().sum(1) / (beta * negative).exp().sum(1)
    mass = (hard - tau_plus * n * positive) / (1 - tau_plus)
    mass = mass.clamp(min=n * math.exp(-1 / temperature))
    return -(positive / (positive + mass)).log().mean()
