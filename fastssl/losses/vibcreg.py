"""VIbCReg: VICReg with correlations in the place of covariances."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.distributed import BUILT, Group
from fastssl.kernels import column_moments, cross_correlation, standardize
from fastssl.kernels.common import accumulator, ahead, full_precision
from fastssl.losses import _ahead
from fastssl.losses._checks import check_batch, check_not_negative
from fastssl.losses._loss import Loss

EPS = 1e-4


class VIbCRegLoss(Loss):
    """The views' squared distance, a hinge on each feature's deviation, and squared correlations.

        loss = sim MSE(z1, z2) + sum over the views of
               var mean_d max(0, 1 - sqrt(var_d + 1e-4)) + cov mean_{d, e} r_de^2 [d != e]

    with the three weights; var_d is unbiased, r the features' correlations, over the batch.

    Shapes   z1, z2 (B, D): the two views of the same B images, row by row; any float dtype.
    Returns  scalar float32; 0 <= loss.
    Memory   correlations by the smaller of the B x B and D x D products.
    Raises   ValueError: other shapes, dtypes or devices, or other ones on another rank; fewer than
             2 images in the joined batch; a weight < 0.
    Ranks    variances and correlations are the joined batch's, and so is the mean over ranks of
             value and gradient.  gather_distributed=False: each rank's own.
    On a CPU in one process the gradient is made with the loss, and backward only multiplies.
    Source   Lee & Aune 2021, arXiv:2109.00783, eq. 4 to 7; as solo-learn's vibcreg_loss_func.  The
             paper's iterative normalization is a layer of the projector, not of the loss.

    >>> z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    >>> VIbCRegLoss()(z, z).item()  # deviations above 1, and no correlation
    0.0
    """

    shown = ("sim_loss_weight", "var_loss_weight", "cov_loss_weight", "gather_distributed")

    def __init__(
        self,
        sim_loss_weight: float = 25.0,
        var_loss_weight: float = 25.0,
        cov_loss_weight: float = 200.0,
        *,
        gather_distributed: bool = BUILT,
        process_group: Group = None,
    ) -> None:
        super().__init__(gather_distributed, process_group)
        weights = {"sim_loss_weight": sim_loss_weight, "var_loss_weight": var_loss_weight}
        check_not_negative(**weights, cov_loss_weight=cov_loss_weight)
        self.sim_loss_weight, self.var_loss_weight = sim_loss_weight, var_loss_weight
        self.cov_loss_weight = cov_loss_weight

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        group = self.process_group
        if _ahead.fits(group, z1, z2, least=2):
            return ahead(self._alone, z1, z2)
        n = check_batch(group, least=2, z1=z1, z2=z2)
        acc = accumulator(z1.dtype)
        with full_precision(z1.device):
            hinge = off = z1.new_zeros((), dtype=acc)
            for z in (z1, z2):
                var = column_moments(z, unbiased=True, process_group=group).var
                hinge = hinge + F.relu(1 - (var + EPS).sqrt()).mean()
                rows = standardize(z, eps=0.0, process_group=group)  # |column|^2 = n
                squares = cross_correlation(rows, rows, process_group=group).off_diagonal_sq
                off = off + squares / (n * z.shape[1]) ** 2
            apart = F.mse_loss(z1.to(acc), z2.to(acc))
            sizes = self.sim_loss_weight * apart + self.var_loss_weight * hinge
            return sizes + self.cov_loss_weight * off

    def _alone(self, views: Sequence[Tensor], need: Sequence[bool]) -> _ahead.Gradients:
        """Value and gradients of one process."""
        x, y = (z.to(accumulator(z.dtype)) for z in views)
        (N, D), difference = x.shape, x - y
        sim, var = 2 * self.sim_loss_weight / x.numel(), self.var_loss_weight / D
        cov = self.cov_loss_weight / D**2
        value, gradients = _ahead.square(difference).mul_(sim / 2), []
        for z, pull in (x, sim), (y, -sim):
            c = z - z.mean(0)
            c.sub_(c.mean(0))  # what rounding left
            squares = c.square().sum(0)
            deviations = (squares / (N - 1) + EPS).sqrt_()
            gaps = (1 - deviations).clamp_min_(0)
            value.add_(gaps.sum(), alpha=var)
            hinge = gaps.sign_().mul_(-var / (N - 1)).div_(deviations)
            inverse = squares.rsqrt().masked_fill_(squares == 0, 0)
            h = c * inverse
            if _ahead.has_few_features(h):
                r = torch.mm(h.T, h)
                r.diagonal().zero_()
                value.add_(_ahead.square(r), alpha=cov)
                dh = torch.mm(h, r)
            else:
                gram, own = torch.mm(h, h.T), h.square().sum(0)
                value.add_(_ahead.square(gram) - _ahead.square(own), alpha=cov)
                dh = torch.mm(gram, h).addcmul_(h, own, value=-1)
            # Nothing through the mean: what is centered stays so.
            dc = dh.addcmul_(h, (dh * h).sum(0), value=-1).mul_(inverse.mul_(4 * cov))
            gradients.append(dc.addcmul_(c, hinge).add_(difference, alpha=pull))
        return value, gradients


def vibcreg_reference(
    z1: Tensor, z2: Tensor, sim: float = 25.0, var: float = 25.0, cov: float = 200.0
) -> Tensor:
    """The formula by D x D correlations, in one process."""
    loss = sim * F.mse_loss(z1, z2)
    for z in (z1, z2):
        loss = loss + var * F.relu(1 - (z.var(0) + EPS).sqrt()).mean()
        h = F.normalize(z - z.mean(0), dim=0)
        r = h.T @ h
        loss = loss + cov * (r - r.diagonal().diag()).square().mean()
    return loss
