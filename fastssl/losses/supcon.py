"""Supervised contrast: every view of every image of the same label is a positive."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.distributed import Group, all_gather_nograd, all_gather_rows, rank, world_size
from fastssl.losses._checks import check_batch
from fastssl.losses._contrastive import ContrastiveLoss, lse_of_others
from fastssl.losses._loss import also_named
from fastssl.losses._unit import unit


class SupConLoss(ContrastiveLoss):
    """Each view must find all views of its label's images among all other views of the batch.

    The formula is `supcon_reference`, in nats.  The mean over positives stands outside the
    logarithm (the paper's L_out), so that a view meets the sum of its label's other views: no pair
    but the log-sum-exp's is seen.

    Shapes   features (B, V, D): V views of B images; any float dtype.  labels (B,): integers of any
             size, or None: each image is its own label (SimCLR's loss over V views).  Or embeddings
             (N, D) and labels (N,).
    Returns  scalar float32: the mean over the views that have a positive, 0 when none
             has.  0 <= loss; ln(N - 1) when all N embeddings agree.  Nothing of N x N is held.  Of
             two views without labels it is NTXentLoss, which keeps more digits near a match.
    Raises   ValueError: other shapes, dtypes or devices, or other ones on another rank; one view
             without labels; temperature not > 0.
    Ranks    as NTXentLoss.  Labels are compared over the joined batch; with them, each image's
             summed views are gathered whatever the strategy.
    Source   Khosla et al. 2020, Supervised Contrastive Learning, arXiv:2004.11362, eq. 2.
    Differs  from pytorch_metric_learning's SupConLoss, whose value and gradient it has: that leaves
             anchors whose loss rounds to 0 out of the mean, and is 0 in a batch of one label; no
             indices_tuple, ref_emb or ref_labels; no distance, reducer, regularizer or statistics.
             The paper's code multiplies by t / 0.07; neither does this.

    >>> z = torch.eye(2).repeat_interleave(2, 0).unsqueeze(1)  # one view of four images
    >>> round(SupConLoss(temperature=0.5)(z, torch.tensor([7, 7, 3, 3])).item(), 4)  # ln(e^2+2) - 2
    0.2395
    """

    @also_named(embeddings="features")
    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        group, flat = self.process_group, features.ndim == 2
        axes = "N, D" if flat else "B, V, D"
        check_batch(group, axes, ids={"labels": labels}, features=features)
        z = unit(features.unsqueeze(1) if flat else features)
        B, V, _ = z.shape
        rows = z.flatten(0, 1).to(features.dtype)  # see TwoViews
        # Positives are of the rounded rows too: else their mean may pass the log-sum-exp.
        z = z + (rows.detach().view_as(z) - z.detach())
        if labels is not None:
            sums, images, anchors = _by_label(z.sum(1), V, labels, group)
        elif V > 1:
            sums, images = z.sum(1), torch.ones(B, dtype=torch.int64, device=z.device)
            anchors = images.sum() * V * world_size(group)
        else:
            raise ValueError(f"one view has no positives without labels, got {tuple(z.shape)}")
        positives = (images * V - 1).unsqueeze(1)
        dots = (z * (sums.unsqueeze(1) - z)).sum(-1)  # (B, V)
        positive = dots / positives.clamp(min=1) / self.temperature
        lse, _ = lse_of_others(rows, rows, 1 / self.temperature, group, self.strategy)
        losses = torch.where(positives > 0, lse.view_as(positive) - positive, 0)
        # Below 0 is rounding alone.  What is taken away is a constant: the gradient stays.
        losses = losses - losses.detach().clamp(max=0)
        return losses.sum() / anchors.clamp(min=1) * world_size(group)


def _by_label(x: Tensor, V: int, labels: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """Over the joined batch, of x (b, D), this rank's sums over views, and labels (b,).

    The sums of x over each image's label, (b, D); the images of that label, (b,); and, 0-d, how
    many views have a positive.
    """
    everyone = all_gather_rows(x, group, check=False)
    ordered, order = all_gather_nograd(labels, group, check=False).sort(stable=True)
    # Labels are numbered in their order: how many there are need not be asked of the device.
    new = (ordered != ordered.roll(1)).long()
    new[0] = 0
    number = torch.empty_like(order).index_copy(0, order, new.cumsum(0))
    images = torch.zeros_like(number).index_put((number,), torch.ones_like(number), accumulate=True)
    sums = torch.zeros_like(everyone).index_put((number,), everyone, accumulate=True)
    anchors = (images[number] * V > 1).sum() * V
    mine = number.unflatten(0, (-1, len(x)))[rank(group)]
    return sums[mine], images[mine], anchors


def supcon_reference(features: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The formula, all (B V, B V) scores at once, in one process."""
    z, label = unit(features).flatten(0, 1), labels.repeat_interleave(features.shape[1])
    other = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = (label[:, None] == label) & other
    scores = z @ z.T / temperature
    share = scores - scores.masked_fill(~other, -torch.inf).logsumexp(1, keepdim=True)
    losses = -share.masked_fill(~positive, 0).sum(1) / positive.sum(1).clamp(min=1)
    return losses.sum() / positive.any(1).sum().clamp(min=1)
