"""GroCo: a view's similarities, sorted, must have the positive above the negatives."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastssl.distributed import Group, all_gather_nograd
from fastssl.kernels import exclude_self, pairwise_topk
from fastssl.losses._checks import check_batch, check_counts, check_positive
from fastssl.losses._contrastive import joined_ids
from fastssl.losses._loss import Loss
from fastssl.losses._unit import unit


class GroCoLoss(Loss):
    """Each view's other view must sort above the most alike views of other images.

    For an anchor z_i, of the view v, an odd-even sorting network sorts n + 1 numbers, upwards: its
    n greatest cosines with view v of other images, and above them that with its other view.  An
    exchange of neighbors is relaxed: both keep their place by a share, a Cauchy distribution's, so
    that at the end a part of each number lies in the last place, the positive's.  The formula is
    `groco_reference`, in nats.  Keys get no gradient: each view is moved as an anchor, to keys that
    stay.

    Shapes   z0, z1 (B, D): the two views of the same B images, row by row; any float dtype.
    Returns  scalar float32: the mean over this rank's 2B anchors.  0 <= loss; no number has more
             than 87 nats.
    Raises   ValueError: other shapes, dtypes or devices, or other ones on another rank; negatives
             < 1; steepness not > 0; a joined batch of one image, which has no negatives.  A
             non-finite input is no error: it gives a non-finite loss.
    Ranks    the views are gathered once, without gradient; this rank's anchors sort the nearest of
             all ranks: the mean over ranks of value and gradient is the joined batch's.
    Source   Shvetsova et al. 2023, arXiv:2301.02009, section 3; the network: Petersen et al. 2022,
             arXiv:2203.09630, and the authors' code.  The places' masses are propagated backwards
             through the network, of which the permutation matrix is never made.
    Differs  from the authors' code: a joined batch of n images or fewer gives fewer negatives,
             where theirs fails; a mass is clamped at the least float, where theirs clamps the
             logarithm at -100.

    >>> round(GroCoLoss(1)(torch.eye(2), torch.eye(2)).item(), 4)  # arctan(1) is pi / 4: -ln(3/4)
    0.2877
    """

    shown = ("negatives", "steepness")

    def __init__(
        self, negatives: int = 10, steepness: float = 1.0, *, process_group: Group = None
    ) -> None:
        super().__init__(process_group=process_group)
        check_counts(negatives=negatives)
        check_positive(steepness=steepness)
        self.negatives, self.steepness = negatives, steepness

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        check_batch(self.process_group, least=2, z0=z0, z1=z1)
        everyone = all_gather_nograd(torch.stack([z0, z1], 1), self.process_group, check=False)
        x0, x1 = unit(z0), unit(z1)
        keys0, keys1 = unit(everyone).unbind(1)
        return (self._order_loss(x0, x1, keys0) + self._order_loss(x1, x0, keys1)) / 2

    def _order_loss(self, anchors: Tensor, positives: Tensor, keys: Tensor) -> Tensor:
        """The loss of anchors (B, D), their positives, and keys (N, D) with other images'."""
        mine = joined_ids(len(anchors), self.process_group, anchors.device)
        others = exclude_self(mine, torch.arange(len(keys), device=keys.device))
        n = min(self.negatives, len(keys) - 1)
        nearest = pairwise_topk(anchors, keys, n, mask=others)[1].flip(1)
        numbers = torch.cat([keys[nearest], positives.detach().unsqueeze(1)], dim=1)
        mass = last_place_mass(torch.einsum("bd,bnd->bn", anchors, numbers), self.steepness)
        right = torch.cat([1 - mass[:, :-1], mass[:, -1:]], dim=1)
        return -right.clamp_min(torch.finfo(right.dtype).tiny).log().mean()


def last_place_mass(x: Tensor, steepness: float) -> Tensor:
    """(B, n): how much of each of x (B, n) the relaxed sorting network puts in the last place.

    A layer mixes the columns of the permutation matrix by a symmetric matrix L of its own, so that
    the last column of L_1 ... L_n is L_1 (... (L_n e_n)): what the last place has, taken back.

    >>> last_place_mass(torch.tensor([[0.0, 1.0]]), 1.0)
    tensor([[0.2500, 0.7500]])
    """
    layers = []
    for layer in range(x.shape[1]):
        start = layer % 2
        a, b = _split_neighbors(x, start)
        share = 0.5 + torch.atan(steepness * (b - a)) / math.pi
        layers.append((start, share))
        x = _exchange(x, start, share)
    mass = torch.zeros_like(x)
    mass[:, -1] = 1
    for start, share in reversed(layers):
        mass = _exchange(mass, start, share)
    return mass


def _exchange(x: Tensor, start: int, share: Tensor) -> Tensor:
    """x, its pairs of neighbors from `start` on mixed: each keeps `share` and takes the rest."""
    a, b = _split_neighbors(x, start)
    swap = (1 - share) * (b - a)
    mixed = torch.stack([a + swap, b - swap], dim=-1).flatten(1)
    return torch.cat([x[:, :start], mixed, x[:, start + mixed.shape[1] :]], dim=1)


def _split_neighbors(x: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """The left and the right of each pair of columns from `start` on; the last may have no pair."""
    pairs = (x.shape[1] - start) // 2
    return x[:, start::2][:, :pairs], x[:, start + 1 :: 2]


def groco_reference(z0: Tensor, z1: Tensor, negatives: int, steepness: float) -> Tensor:
    """The formula by whole permutation matrices, in one process."""
    x0, x1 = unit(z0), unit(z1)
    losses = []
    for anchors, others in ((x0, x1), (x1, x0)):
        cosines = (anchors @ anchors.detach().T).fill_diagonal_(-math.inf)  # of one view
        n = min(negatives, len(z0) - 1)
        hardest = cosines.topk(n, dim=1).values.flip(1)
        numbers = torch.cat([hardest, (anchors * others.detach()).sum(1, keepdim=True)], dim=1)
        mass = sorting_matrix(numbers, steepness)[:, :, -1]
        right = torch.cat([1 - mass[:, :-1], mass[:, -1:]], dim=1)
        losses.append(-right.clamp_min(torch.finfo(right.dtype).tiny).log().mean())
    return (losses[0] + losses[1]) / 2


def sorting_matrix(x: Tensor, steepness: float) -> Tensor:
    """(B, n, n) relaxed permutations that sort x (B, n): how much of number e lies in place p."""
    P = torch.eye(x.shape[1], dtype=x.dtype, device=x.device).expand(len(x), -1, -1)
    for layer in range(x.shape[1]):
        L = torch.eye(x.shape[1], dtype=x.dtype, device=x.device).repeat(len(x), 1, 1)
        for i in range(layer % 2, x.shape[1] - 1, 2):
            keep = 0.5 + torch.atan(steepness * (x[:, i + 1] - x[:, i])) / math.pi
            L[:, i, i] = L[:, i + 1, i + 1] = keep
            L[:, i, i + 1] = L[:, i + 1, i] = 1 - keep
        x, P = torch.einsum("bn,bnm->bm", x, L), P @ L
    return P
