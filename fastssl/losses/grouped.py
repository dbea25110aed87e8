"""Contrast within groups of images, or between them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.distributed import BUILT, Group
from fastssl.kernels import different_group, same_group
from fastssl.losses._contrastive import ContrastiveLoss, twice
from fastssl.losses._sharded import Rule
from fastssl.losses._unit import unit

_RULES = {"same": same_group, "different": different_group}


class GroupedNTXentLoss(ContrastiveLoss):
    """NT-Xent whose negatives come from the same group alone, or from the other groups alone.

    The formula is `grouped_ntxent_reference`, in nats.

    "same": a site, a video or a patient is told apart from itself only, so that what the group
    shares is no short cut.  "different": what is in one group is not pushed apart.

    Shapes   out0, out1 (B, D): the two views of the same B images, row by row; any float dtype.
             groups (B,): integers of any size, the group of each image.
    Returns  scalar float32: the mean over this rank's 2B rows; a row with no negative left
             counts with loss 0 and gradient 0.  0 <= loss.  Nothing of N x N is held.
    Raises   ValueError: other shapes, dtypes or devices, or other ones on another rank; negatives
             that are neither; temperature not > 0.
    Ranks    as NTXentLoss; groups are compared over the joined batch.
    Source   NT-Xent: Chen et al. 2020, arXiv:2002.05709, eq. 1; with one group of all images
             "same" is that loss, and so is "different" with a group for each image.

    >>> z, groups = torch.eye(4), torch.tensor([5, 5, 9, 9])
    >>> round(GroupedNTXentLoss(temperature=0.5)(z, z, groups).item(), 4)  # ln(e^2 + 2) - 2
    0.2395
    """

    shown = (*ContrastiveLoss.shown, "negatives")

    def __init__(
        self,
        temperature: float = 0.5,
        negatives: str = "same",
        *,
        gather_distributed: bool = BUILT,
        process_group: Group = None,
        strategy: str = "gather",
    ) -> None:
        super().__init__(temperature, gather_distributed, process_group, strategy)
        if negatives not in _RULES:
            raise ValueError(f"negatives must be 'same' or 'different', got {negatives!r}")
        self.negatives = negatives

    def forward(self, out0: Tensor, out1: Tensor, groups: Tensor) -> Tensor:
        views = self.two_views(out0, out1, groups=groups)
        ids = twice(groups)
        return views.nt_xent(self.temperature, Rule(_RULES[self.negatives], ids, ids))


def grouped_ntxent_reference(
    z0: Tensor, z1: Tensor, groups: Tensor, temperature: float, negatives: str
) -> Tensor:
    """The formula, all (2B, 2B) scores at once, in one process."""
    z, i = unit(torch.cat([z0, z1])), torch.arange(2 * len(z0), device=z0.device)
    image, group, positive = i % len(z0), groups.repeat(2), i.roll(len(z0))
    same = group[:, None] == group
    kept = (image[:, None] != image) & (same if negatives == "same" else ~same)
    kept |= positive[:, None] == i
    scores = (z @ z.T / temperature).masked_fill(~kept, -torch.inf)
    return F.cross_entropy(scores, positive)
