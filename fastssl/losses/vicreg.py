"""VICReg: embeddings that agree, that vary, and whose features are not copies of each other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.distributed import LOCAL, Group, require_all_even, world_size
from fastssl.kernels.common import accumulator
from fastssl.losses._checks import check_not_negative, check_positive
from fastssl.losses._moments import variance_covariance


class VICRegLoss(nn.Module):
    """Variance, invariance and covariance of two views' embeddings.

        invariance = mean (z_a - z_b)^2
        variance   = mean_d max(0, 1 - sqrt(var_d + eps)), averaged over the two views
        covariance = sum_{i != j} cov_ij^2 / D, summed over the two views      (both unbiased)
        loss = lambda * invariance + mu * variance + nu * covariance

    Shapes   z_a, z_b (B, ..., D): the two views of the same B images, row by row; any float dtype.
             Middle axes are positions: each has statistics of its own over the B rows, and the
             terms are averaged over positions.
    Returns  scalar float32, >= 0 up to rounding.  Each view costs one B x B or D x D product,
             whichever is cheaper: no D x D matrix is made of a small batch.
    Raises   ValueError: shapes that are not two equal (B, ..., D), or are empty; dtypes or devices
             that differ; fewer than 2 rows in the joined batch; a weight < 0, eps <= 0; batches
             that differ between ranks (on every rank).  A column that does not vary is no error.
    Ranks    variances and covariances are the joined batch's, the invariance is a mean over this
             rank's rows.  Averaged over ranks, value and gradient are those of the joined batch in
             one process.  gather_distributed=False: statistics of each rank's own b rows, as where
             training has no gather.  A covariance of b rows has noise of variance
             (var_i var_j + cov_ij^2) / (b - 1), and its square adds that to the loss: decorrelated
             features of variance 1 still cost (D - 1) / (b - 1) a view, where the joined batch
             has (D - 1) / (W b - 1).
    Source   Bardes et al. 2022, VICReg, arXiv:2105.04906, equations 1 to 6.
    Differs  from lightly.loss.VICRegLoss, whose value and gradient it has in one process, and whose
             scale is the authors' own: gathers by default.  Other scales are other weights:
             solo-learn adds the views' variance terms (double mu_param), VICRegL averages their
             covariance terms (halve nu_param).

    >>> import torch
    >>> z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    >>> round(VICRegLoss()(z, z).item(), 4)  # variances 4/3, covariances 0
    0.0
    >>> round(VICRegLoss()(z, -z).item(), 4)  # 25 (2 z)^2
    100.0
    >>> torch.isclose(VICRegLoss()(0 * z, 0 * z), torch.tensor(25 * 0.99))  # collapse
    tensor(True)
    """

    def __init__(
        self,
        lambda_param: float = 25.0,
        mu_param: float = 25.0,
        nu_param: float = 1.0,
        *,
        eps: float = 1e-4,
        gather_distributed: bool = True,
        process_group: Group = None,
    ) -> None:
        super().__init__()
        check_not_negative(lambda_param=lambda_param, mu_param=mu_param, nu_param=nu_param)
        check_positive(eps=eps)
        self.lambda_param, self.mu_param, self.nu_param = lambda_param, mu_param, nu_param
        self.eps = eps
        self.process_group = process_group if gather_distributed else LOCAL

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        group = self.process_group
        # First what all ranks refuse together: one that left alone would leave the others waiting.
        require_all_even(group, z_a=z_a, z_b=z_b)
        _check(z_a, z_b, world_size(group))
        var_a, cov_a = variance_covariance(z_a, self.eps, group)
        var_b, cov_b = variance_covariance(z_b, self.eps, group)
        spread = self.mu_param / 2 * (var_a + var_b) + self.nu_param * (cov_a + cov_b)
        return self.lambda_param * invariance(z_a, z_b) + spread

    def extra_repr(self) -> str:
        weights = f"{self.lambda_param}, mu_param={self.mu_param}, nu_param={self.nu_param}"
        gather = self.process_group != LOCAL
        return f"lambda_param={weights}, eps={self.eps}, gather_distributed={gather}"


def invariance(z_a: Tensor, z_b: Tensor) -> Tensor:
    """The mean squared difference, in float32, or float64 for float64."""
    acc = accumulator(z_a.dtype)
    return F.mse_loss(z_a.to(acc), z_b.to(acc))


def _check(z_a: Tensor, z_b: Tensor, world: int) -> None:
    if z_a.ndim < 2 or z_a.shape != z_b.shape or 0 in z_a.shape:
        shapes = f"{tuple(z_a.shape)} and {tuple(z_b.shape)}"
        raise ValueError(f"z_a and z_b must both be (B, ..., D), none empty, got {shapes}")
    if not z_a.is_floating_point() or z_a.dtype != z_b.dtype or z_a.device != z_b.device:
        seen = f"{z_a.dtype} on {z_a.device} and {z_b.dtype} on {z_b.device}"
        raise ValueError(f"z_a and z_b must share a float dtype and a device, got {seen}")
    if len(z_a) * world < 2:
        raise ValueError(f"the joined batch must have at least 2 rows, got {len(z_a) * world}")


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
