"""Decoupled contrastive losses: the positive stands outside the denominator."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastssl.distributed import BUILT, Group, all_gather_nograd, rank
from fastssl.losses._checks import check_positive
from fastssl.losses._contrastive import ContrastiveLoss
from fastssl.losses._unit import unit


class DCLLoss(ContrastiveLoss):
    """NT-Xent without the positive in its denominator, and with a weight on the positive.

    The formula is `dcl_reference`, in nats.

    Shapes   out0, out1 (B, D): the two views of the same B images, row by row; any float dtype.
             weight_fn: None, all 1; or a function of two (B, D) tensors, the normalized views of
             this rank in float32, the anchors first: their weights (B,).  It is called for either
             direction, and its gradient is kept: detach in it what should have none.
    Returns  scalar float32: the mean over this rank's 2B rows.  It has no lower end at 0;
             ln(2N - 2) when all embeddings of N images agree.
    Raises   ValueError: other shapes, dtypes or devices, or other ones on another rank; a joined
             batch of one image, which has no negatives; weights that are not (B,); temperature
             not > 0.
    Ranks    as NTXentLoss.
    Source   Yeh et al. 2021, Decoupled Contrastive Learning, arXiv:2110.06848, eq. 6.
    Differs  from lightly.loss.DCLLoss, whose value and gradient it has in one process: gathers by
             default; normalizes and sums in float32 whatever the dtype; temperature > 0.

    >>> z = torch.eye(4)
    >>> round(DCLLoss(temperature=0.5)(z, z).item(), 4)  # ln 6 - 2
    -0.2082
    """

    def __init__(
        self,
        temperature: float = 0.1,
        weight_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        gather_distributed: bool = BUILT,
        *,
        process_group: Group = None,
        strategy: str = "gather",
    ) -> None:
        super().__init__(temperature, gather_distributed, process_group, strategy)
        self.weight_fn = weight_fn

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        views = self.two_views(out0, out1, least=2)
        positive = views.positives() / self.temperature
        if self.weight_fn is not None:
            first, second = views.rows.unflatten(0, (-1, 2)).unbind(1)
            weights = self.weight_fn(first, second), self.weight_fn(second, first)
            if any(w.shape != first.shape[:1] for w in weights):
                want, got = (len(first),), tuple(weights[0].shape)
                raise ValueError(f"weight_fn must return weights {want}, got {got}")
            positive = positive * torch.stack(weights, dim=1)
        return (views.others(1 / self.temperature) - positive).mean()


class DCLWLoss(DCLLoss):
    """DCL that dwells on the pairs that do not match yet: negative von Mises-Fisher weights.

    The formula is `dclw_reference`.
    Raises   ValueError: sigma not > 0, and what DCLLoss raises.
    Ranks    the softmax is over the joined batch (gather_distributed=False: this rank's).
    Source   Yeh et al. 2021, arXiv:2110.06848.
    Differs  from lightly.loss.DCLWLoss as DCLLoss from lightly's.  In the rest it is DCLLoss.

    >>> z = torch.eye(4)
    >>> round(DCLWLoss(temperature=0.5)(z, z).item(), 4)  # all weights are 1
    -0.2082
    """

    shown = (*DCLLoss.shown, "sigma")

    def __init__(
        self,
        temperature: float = 0.1,
        sigma: float = 0.5,
        gather_distributed: bool = BUILT,
        *,
        process_group: Group = None,
        strategy: str = "gather",
    ) -> None:
        super().__init__(
            temperature, None, gather_distributed, process_group=process_group, strategy=strategy
        )
        check_positive(sigma=sigma)
        self.sigma = sigma
        self.weight_fn = partial(_mises_fisher, sigma=sigma, group=self.process_group)


@torch.no_grad()
def _mises_fisher(anchors: Tensor, positives: Tensor, sigma: float, group: Group) -> Tensor:
    match = all_gather_nograd((anchors * positives).sum(-1) / sigma, group, check=False)
    weights = 2 - len(match) * match.softmax(0)
    return weights.unflatten(0, (-1, len(anchors)))[rank(group)]


def dcl_reference(
    z0: Tensor, z1: Tensor, temperature: float, weights: Tensor | float = 1.0
) -> Tensor:
    """The formula, all (2B, 2B) scores at once, in one process; weights: one, or (2B,)."""
    z, image = unit(torch.cat([z0, z1])), torch.arange(len(z0), device=z0.device).repeat(2)
    scores = z @ z.T / temperature
    positive = scores.diagonal(len(z0)).repeat(2)
    negative = scores.masked_fill(image[:, None] == image, -torch.inf).logsumexp(1)
    return (negative - weights * positive).mean()


def dclw_reference(z0: Tensor, z1: Tensor, temperature: float, sigma: float) -> Tensor:
    """`dcl_reference` with the weights of DCLW."""
    match = (unit(z0) * unit(z1)).sum(1).detach() / sigma
    weights = 2 - len(z0) * match.softmax(0)
    return dcl_reference(z0, z1, temperature, weights.repeat(2))
