"""VICReg: embeddings that agree, that vary, and whose features are not copies of each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.distributed import BUILT, Group
from fastssl.kernels.common import accumulator, ahead
from fastssl.losses import _ahead
from fastssl.losses._checks import check_batch, check_not_negative, check_positive
from fastssl.losses._loss import Loss
from fastssl.losses._moments import variance_covariance


class VICRegLoss(Loss):
    """Variance, invariance and covariance of two views' embeddings.

    The formula is `vicreg_reference`: variances and covariances are unbiased.

    Shapes   z_a, z_b (B, ..., D): the two views of the same B images, row by row; any float dtype.
             Middle axes are positions: each has statistics of its own over the B rows, and the
             terms are averaged over positions.
    Returns  scalar float32, >= 0 up to rounding.  Each view costs one B x B or D x D product,
             whichever is cheaper: no D x D matrix is made of a small batch.
    Raises   ValueError: other shapes, dtypes or devices, or other ones on another rank; fewer than
             2 images in the joined batch; a weight < 0, eps <= 0.  A column that does not vary is
             no error.
    Ranks    variances and covariances are the joined batch's, the invariance is a mean over this
             rank's rows: the mean over ranks of value and gradient is the joined batch's.
             gather_distributed=False: statistics of each rank's own b rows, whose covariances have
             noise, and its square in the loss: decorrelated features of variance 1 still cost
             (D - 1) / (b - 1) a view, where the joined batch has (D - 1) / (W b - 1).
    On a CPU in one process, without middle axes, the gradient is made with the loss, and backward
             only multiplies.
    Source   Bardes et al. 2022, VICReg, arXiv:2105.04906, equations 1 to 6.
    Differs  from lightly.loss.VICRegLoss, whose value and gradient it has in one process, and whose
             scale is the authors' own: gathers by default.  Other scales are other weights:
             solo-learn adds the views' variance terms (double mu_param), VICRegL averages their
             covariance terms (halve nu_param).

    >>> z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    >>> round(VICRegLoss()(z, z).item(), 4)  # variances 4/3, covariances 0
    0.0
    >>> round(VICRegLoss()(z, -z).item(), 4)  # 25 (2 z)^2
    100.0
    >>> torch.isclose(VICRegLoss()(0 * z, 0 * z), torch.tensor(25 * 0.99))  # collapse
    tensor(True)
    """

    shown = ("lambda_param", "mu_param", "nu_param", "eps", "gather_distributed")

    def __init__(
        self,
        lambda_param: float = 25.0,
        mu_param: float = 25.0,
        nu_param: float = 1.0,
        gather_distributed: bool = BUILT,
        eps: float = 1e-4,
        *,
        process_group: Group = None,
    ) -> None:
        super().__init__(gather_distributed, process_group)
        check_not_negative(lambda_param=lambda_param, mu_param=mu_param, nu_param=nu_param)
        check_positive(eps=eps)
        self.lambda_param, self.mu_param, self.nu_param = lambda_param, mu_param, nu_param
        self.eps = eps

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        group = self.process_group
        if _ahead.fits(group, z_a, z_b, least=2):
            return ahead(self._alone, z_a, z_b)
        check_batch(group, "B, ..., D", least=2, z_a=z_a, z_b=z_b)
        var_a, cov_a = variance_covariance(z_a, self.eps, group)
        var_b, cov_b = variance_covariance(z_b, self.eps, group)
        spread = self.mu_param / 2 * (var_a + var_b) + self.nu_param * (cov_a + cov_b)
        return self.lambda_param * invariance(z_a, z_b) + spread

    def _alone(self, views: Sequence[Tensor], need: Sequence[bool]) -> _ahead.Gradients:
        """Value and gradients of one process."""
        x, y = (z.to(accumulator(z.dtype)) for z in views)
        difference, size = x - y, x.numel()
        value = _ahead.square(difference).mul_(self.lambda_param / size)
        gradients = []
        for z, pull in (x, 2 * self.lambda_param / size), (y, -2 * self.lambda_param / size):
            c = z - z.mean(0)
            c.sub_(c.mean(0))  # what rounding left
            spread = self._by_features if _ahead.has_few_features(z) else self._by_rows
            gradients.append(spread(c, value, difference, pull))
        return value, gradients

    def _by_features(self, c: Tensor, value: Tensor, difference: Tensor, pull: float) -> Tensor:
        """The gradient of centered rows c, through their D x D covariances.

        Their terms are added to the value, and pull times the difference to the gradient.
        """
        D, n = c.shape[1], c.shape[0] - 1
        cov = torch.addmm(value, c.T, c, beta=0, alpha=1 / n)  # nothing is added: beta is 0
        variances = cov.diagonal()
        hinge = self._hinge(variances, value, n)
        variances.zero_()
        value.add_(_ahead.square(cov), alpha=self.nu_param / D)
        cov.mul_(4 * self.nu_param / (D * n))
        variances.copy_(hinge)
        return torch.addmm(difference, c, cov, beta=pull)  # nothing through the mean: _moments.py

    def _by_rows(self, c: Tensor, value: Tensor, difference: Tensor, pull: float) -> Tensor:
        """The same through the B x B products of rows: see `_moments._ByPosition`."""
        D, n = c.shape[1], c.shape[0] - 1
        gram = torch.addmm(value, c, c.T, beta=0, alpha=1 / n)
        variances = c.square().sum(0).div_(n)
        hinge = self._hinge(variances, value, n)
        value.add_(_ahead.square(gram) - _ahead.square(variances), alpha=self.nu_param / D)
        weight = 4 * self.nu_param / (D * n)
        dz = torch.addmm(difference, gram, c, beta=pull, alpha=weight)
        return dz.addcmul_(c, hinge.sub_(variances, alpha=weight))

    def _hinge(self, variances: Tensor, value: Tensor, n: int) -> Tensor:
        """What the variances' term, which is added to the value, multiplies centered rows by."""
        share = self.mu_param / (2 * variances.shape[0])
        deviations = (variances + self.eps).sqrt_()
        gaps = (1 - deviations).clamp_min_(0)
        value.add_(gaps.sum(), alpha=share)
        return gaps.sign_().mul_(-share / n).div_(deviations)


def invariance(z_a: Tensor, z_b: Tensor) -> Tensor:
    """The mean squared difference, in float32, or float64 for float64."""
    acc = accumulator(z_a.dtype)
    return F.mse_loss(z_a.to(acc), z_b.to(acc))


def vicreg_reference(
    z_a: Tensor,
    z_b: Tensor,
    lambda_param: float = 25.0,
    mu_param: float = 25.0,
    nu_param: float = 1.0,
    eps: float = 1e-4,
) -> Tensor:
    """The formula by whole covariances (..., D, D), in one process; z (B, ..., D)."""
    variance, covariance = zip(*(spread_reference(z, eps) for z in (z_a, z_b)), strict=True)
    spread = mu_param * sum(variance) / 2 + nu_param * sum(covariance)
    return lambda_param * (z_a - z_b).square().mean() + spread


def spread_reference(z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The variance and the covariance term of one view z (B, ..., D)."""
    c = (z - z.mean(0)).flatten(1, -2) if z.ndim > 2 else (z - z.mean(0)).unsqueeze(1)
    cov = torch.einsum("npi,npj->pij", c, c) / (len(z) - 1)  # p: positions
    var = cov.diagonal(dim1=1, dim2=2)
    off_diagonal = cov - torch.diag_embed(var)
    hinge = F.relu(1 - (var + eps).sqrt()).mean()
    return hinge, off_diagonal.square().sum((1, 2)).mean() / z.shape[-1]
