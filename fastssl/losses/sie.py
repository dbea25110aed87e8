"""SIE: one part of an embedding forgets the transformation, the other part follows it."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from fastssl.distributed import BUILT, Group, require_all_even
from fastssl.kernels import column_moments
from fastssl.losses._checks import check_batch, check_embeddings, check_not_negative, check_positive
from fastssl.losses._loss import Loss
from fastssl.losses._moments import variance_covariance
from fastssl.losses.vicreg import invariance, spread_reference


class SIETerms(NamedTuple):
    """The four terms before their weights, scalars float32: see SIELoss."""

    invariance: Tensor
    equivariance: Tensor
    variance: Tensor
    covariance: Tensor


class SIELoss(Loss):
    """Two views' embeddings agree in their first D - E features, and in their last E when moved.

    The formula is `sie_reference`.  The regularizers see whole embeddings, so that neither part
    repeats the other; the variance of `predicted` keeps the predictor from answering with a mean.

    Shapes   z_a, z_b (B, D): the two views of the same B images, row by row; predicted (B, E): what
             the last E features of z_b should be after the transformation from the first view to
             the second.  E < D, or E = D for equivariance alone; one float dtype.
    Returns  scalar float32, >= 0 up to rounding.  terms() has the four by name.
    Raises   ValueError: other shapes, dtypes or devices, or other ones on another rank; fewer than
             2 images in the joined batch; a weight < 0, eps <= 0.  A column that does not vary is
             no error.
    Ranks    variances and covariances are the joined batch's, the two errors are means over this
             rank's rows: the mean over ranks of value and gradient is the joined batch's.
             gather_distributed=False: statistics of each rank's own rows.
    Source   Garrido et al. 2023, SIE, arXiv:2302.10283, section 4; the terms, their divisors and
             the default weights are those that the authors train with (0.45 * 10 for equivariance).

    >>> import torch
    >>> z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    >>> turned = z * torch.tensor([1.0, -1.0])  # a transformation that changes the second feature
    >>> loss = SIELoss()
    >>> [abs(round(loss(z, turned, sign * z[:, 1:]).item(), 4)) for sign in (-1, 1)]
    [0.0, 18.0]
    """

    shown = ("lambda_inv", "lambda_equi", "lambda_var", "lambda_cov", "eps", "gather_distributed")

    def __init__(
        self,
        lambda_inv: float = 10.0,
        lambda_equi: float = 4.5,
        lambda_var: float = 10.0,
        lambda_cov: float = 1.0,
        *,
        eps: float = 1e-4,
        gather_distributed: bool = BUILT,
        process_group: Group = None,
    ) -> None:
        super().__init__(gather_distributed, process_group)
        self.weights = (lambda_inv, lambda_equi, lambda_var, lambda_cov)
        for name, weight in zip(self.shown, self.weights, strict=False):
            check_not_negative(**{name: weight})
            setattr(self, name, weight)
        check_positive(eps=eps)
        self.eps = eps

    def forward(self, z_a: Tensor, z_b: Tensor, predicted: Tensor) -> Tensor:
        return self.weigh(self.terms(z_a, z_b, predicted))

    def weigh(self, terms: SIETerms) -> Tensor:
        """The loss of its terms."""
        inv, equi, var, cov = (w * term for w, term in zip(self.weights, terms, strict=True))
        return inv + equi + var + cov

    def terms(self, z_a: Tensor, z_b: Tensor, predicted: Tensor) -> SIETerms:
        """The four terms; averaged over ranks each is the joined batch's."""
        group = self.process_group
        # First what all ranks refuse together: one that left alone would leave the others waiting.
        require_all_even(group, z_a=z_a, z_b=z_b, predicted=predicted)
        _check(z_a, z_b, predicted, group)
        split = z_a.shape[1] - predicted.shape[1]
        agreement = invariance(z_a[:, :split], z_b[:, :split]) if split else z_a.new_zeros(())
        var_a, cov_a = variance_covariance(z_a, self.eps, group)
        var_b, cov_b = variance_covariance(z_b, self.eps, group)
        var_p = column_moments(predicted, unbiased=True, process_group=group).var
        hinge = F.relu(1 - (var_p + self.eps).sqrt()).mean()
        return SIETerms(
            invariance=agreement.to(var_a.dtype),
            equivariance=invariance(predicted, z_b[:, split:]),
            variance=(var_a + var_b + hinge) / 2,
            covariance=cov_a + cov_b,
        )


def _check(z_a: Tensor, z_b: Tensor, predicted: Tensor, group: Group) -> None:
    check_batch(group, least=2, z_a=z_a, z_b=z_b)
    check_embeddings(predicted=predicted)
    if len(predicted) != len(z_a) or predicted.shape[1] > z_a.shape[1]:
        want = f"({len(z_a)}, E) with E of at most {z_a.shape[1]}"
        raise ValueError(f"predicted must be {want}, got {tuple(predicted.shape)}")
    if (predicted.dtype, predicted.device) != (z_a.dtype, z_a.device):
        got = f"{z_a.dtype} on {z_a.device} and {predicted.dtype} on {predicted.device}"
        raise ValueError(f"z_a and predicted must share dtype and device, got {got}")


def sie_reference(
    z_a: Tensor,
    z_b: Tensor,
    predicted: Tensor,
    weights: tuple[float, float, float, float] = (10.0, 4.5, 10.0, 1.0),
    eps: float = 1e-4,
) -> Tensor:
    """The formula by whole covariances (D, D), in one process; weights in the terms' order."""
    split = z_a.shape[1] - predicted.shape[1]
    same = (z_a - z_b)[:, :split].square().sum() / max(1, len(z_a) * split)
    moved = (predicted - z_b[:, split:]).square().mean()
    (var_a, cov_a), (var_b, cov_b) = spread_reference(z_a, eps), spread_reference(z_b, eps)
    var_p, _ = spread_reference(predicted, eps)
    inv, equi, var, cov = weights
    spread = var * (var_a + var_b + var_p) / 2 + cov * (cov_a + cov_b)
    return inv * same + equi * moved + spread
