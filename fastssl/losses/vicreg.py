"""VICReg: embeddings that agree, that vary, and whose features are not copies of each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.distributed import Group
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
    On a CPU of a small batch the gradient is made with the loss, and backward only multiplies.
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
        gather_distributed: bool = True,
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
        if _ahead.fits(group, z_a, z_b, least=2) and _ahead.is_small(z_a):
            return ahead(self._small, z_a, z_b)
        check_batch(group, "B, ..., D", least=2, z_a=z_a, z_b=z_b)
        var_a, cov_a = variance_covariance(z_a, self.eps, group)
        var_b, cov_b = variance_covariance(z_b, self.eps, group)
        spread = self.mu_param / 2 * (var_a + var_b) + self.nu_param * (cov_a + cov_b)
        return self.lambda_param * invariance(z_a, z_b) + spread

    def _small(self, views: Sequence[Tensor], need: Sequence[bool]) -> _ahead.Gradients:
        """Value and gradients of both views at once, through their covariances."""
        c, difference = _ahead.centered(views), views[0] - views[1]
        B, D = difference.shape
        cov = torch.bmm(c.mT, c)
        variances = cov.diagonal(dim1=1, dim2=2)
        deviations = (variances + self.eps).sqrt_()
        gaps = (1 - deviations).clamp_min_(0)
        variances.zero_()
        hinge = gaps.sum().mul_(self.mu_param / (2 * D))
        value = hinge.add_(_ahead.square(cov), alpha=self.nu_param / D)
        value.add_(_ahead.square(difference), alpha=self.lambda_param / (B * D))
        cov.mul_(4 * self.nu_param / D)
        variances.copy_(gaps.sign_().mul_(-self.mu_param / (2 * D)).div_(deviations))
        dz = torch.bmm(c, cov).mul_((B - 1) ** -0.5)  # see _moments.py: nothing through the mean
        difference.mul_(2 * self.lambda_param / (B * D))
        return value, [dz[0].add_(difference), dz[1].sub_(difference)]


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
