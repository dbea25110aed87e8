"""SSL-EY: canonical correlation analysis of an image's views as a loss without constraints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastssl.distributed import BUILT, Group, world_size
from fastssl.kernels import frobenius_sq
from fastssl.kernels.common import FirstOrder, accumulator, ahead, first_order
from fastssl.losses import _ahead
from fastssl.losses._checks import check_batch
from fastssl.losses._loss import Loss
from fastssl.losses._moments import center, covariance_scale


class SSLEYLoss(Loss):
    """The views' covariances between them against those within, at their best for CCA's subspace.

    The formula is `ssl_ey_reference`.  Both orders of two views are in C, the sum of covariances
    between views: of two views tr(C) is 2 tr(cov(Z_1, Z_2)).

    Shapes   views: a sequence of at least two (B, D), the same B images row by row in each; any
             float dtype.
    Returns  scalar float32; the mean over ranks is the loss.  At least -D (views - 1)^2, when all
             views are alike and their covariance is (views - 1) / views times the identity: so the
             loss sets the embeddings' scale, and wants no normalization before it.
    Memory   tr(C) by sums over rows: |sum_i Z_i|^2 - sum_i |Z_i|^2.  |V|^2 by one product of the
             views * B rows, through their Gram matrix when that is cheaper than D x D.
    Raises   ValueError: other shapes, dtypes or devices, or other ones on another rank; fewer than
             two views, or 2 images in the joined batch.  A column that does not vary is no error.
    Ranks    covariances are the joined batch's, and so is the mean over ranks of value and
             gradient.  gather_distributed=False: each rank's own covariances; the noise of few rows
             is squared in the loss, which then wants smaller embeddings than the joined batch's.
    On a CPU in one process the gradient is made with the loss, and backward only multiplies.
    Source   Chapman, Wells & Lawry Aguila 2023, arXiv:2310.01012 (the EY loss, with the A
             and B of multiview CCA); for two views as in the authors' own code.

    >>> z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    >>> half = z * (3 / 8) ** 0.5  # covariance I / 2
    >>> round(SSLEYLoss()([half, half]).item(), 4), round(SSLEYLoss()([half, -half]).item(), 4)
    (-2.0, 6.0)
    """

    shown = ("gather_distributed",)

    def __init__(self, *, gather_distributed: bool = BUILT, process_group: Group = None) -> None:
        super().__init__(gather_distributed, process_group)

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        group = self.process_group
        if len(views) < 2:
            raise ValueError(f"views must be at least 2, got {len(views)}")
        if _ahead.fits(group, *views, least=2):
            return ahead(_alone, *views)
        named: dict[str, Any] = {f"views[{i}]": z for i, z in enumerate(views)}
        n = check_batch(group, least=2, **named)
        scale = covariance_scale(views[0], n)
        unit = 1 / ((n - 1) * scale**2)  # 1, up to rounding, where rows have been scaled
        rows = center(torch.stack(tuple(views), 1), scale, group)
        within = frobenius_sq(*[rows.flatten(0, 1)] * 2, process_group=group)
        between = _Between.call(rows)
        # `between` has this rank's rows: times the ranks, so that the mean over ranks is their sum.
        return within * unit**2 - between * (2 * unit * world_size(group))


def _alone(views: Sequence[Tensor], need: Sequence[bool]) -> _ahead.Gradients:
    """Value and gradients of one process, all views at once."""
    c = _ahead.centered(views)
    rows, total, n = c.flatten(0, 1), c.sum(0), c.shape[1] - 1
    few = _ahead.has_few_features(rows)  # else by products of rows, of the same squares
    pair = (rows.T, rows) if few else (rows, rows.T)
    product = torch.addmm(c[0, 0, 0], *pair, beta=0, alpha=1 / n)  # nothing is added: beta is 0
    square, between, own = (_ahead.square(x) for x in (product, total, rows))
    value = square.sub_(between - own, alpha=2 / n)
    dz = torch.mm(rows, product) if few else torch.mm(product, rows)
    return value, dz.add_(rows).view_as(c).sub_(total).mul_(4 / n).unbind()


class _Between(FirstOrder):
    """sum_{i != j} z_ni . z_nj over the rows of z (N, V, D): dz_ni = 2 sum_{j != i} z_nj."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        wide = z.to(accumulator(z.dtype))
        return wide.sum(1).square().sum() - wide.square().sum()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        wide = z.to(accumulator(z.dtype))
        return (wide.sum(1, keepdim=True) - wide).mul_(2 * grad).to(z.dtype)


def ssl_ey_reference(views: Sequence[Tensor]) -> Tensor:
    """The formula by whole covariances (D, D), in one process."""
    centered = [z - z.mean(0) for z in views]
    n, total = len(views[0]) - 1, torch.stack(centered).sum(0)
    within = torch.stack([z.T @ z for z in centered]).sum(0) / n  # V
    between = total.T @ total / n - within  # C
    return (within @ within).trace() - 2 * between.trace()
