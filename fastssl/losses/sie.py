"""SIE: one part of an embedding forgets the transformation, the other part follows it."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.distributed import LOCAL, Group, require_all_even, world_size
from fastssl.kernels import column_moments
from fastssl.losses._checks import check_not_negative, check_positive
from fastssl.losses._moments import variance_covariance
from fastssl.losses.vicreg import invariance, spread_reference


class SIETerms(NamedTuple):
    """The four terms before their weights, scalars float32: see SIELoss."""

    invariance: Tensor
    equivariance: Tensor
    variance: Tensor
    covariance: Tensor


class SIELoss(nn.Module):
    """Two views' embeddings agree in their first D - E features, and in their last E when moved.

        z = [i | e], i (B, D - E) invariant, e (B, E) equivariant; p = predictor(e_a, t), what e_b
        should be after the transformation t from the first view to the second

        invariance   = mean (i_a - i_b)^2
        equivariance = mean (p - e_b)^2
        variance     = (V(z_a) + V(z_b) + V(p)) / 2      V(x) = mean_d max(0, 1 - sqrt(var_d + eps))
        covariance   = C(z_a) + C(z_b)                   C(x) = sum_{i != j} cov_ij^2 / D
        loss = sum of lambda * term; variances and covariances are unbiased

    The regularisers see whole embeddings, so that neither part repeats the other; the variance of p
    keeps the predictor from answering with a mean.

    Shapes   z_a, z_b (B, D): the two views of the same B images, row by row; predicted (B, E) with
             E < D, or E = D for equivariance alone; one float dtype.
    Returns  scalar float32, >= 0 up to rounding.  terms() has the four by name.
    Raises   ValueError: other shapes; dtypes or devices that differ; fewer than 2 rows in the
             joined batch; a weight < 0, eps <= 0; batches that differ between ranks (on every
             rank).  A column that does not vary is no error.
    Ranks    variances and covariances are the joined batch's, the two errors are means over this
             rank's rows.  Averaged over ranks, value and gradient are those of the joined batch in
             one process.  gather_distributed=False: statistics of each rank's own rows.
    Source   Garrido et al. 2023, SIE, arXiv:2302.10283, section 4; the terms, their divisors and
             the default weights are those that the authors train with (0.45 * 10 for equivariance).

    >>> import torch
    >>> z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    >>> turned = z * torch.tensor([1.0, -1.0])  # a transformation that changes the second feature
    >>> loss = SIELoss()
    >>> [abs(round(loss(z, turned, sign * z[:, 1:]).item(), 4)) for sign in (-1, 1)]
    [0.0, 18.0]
    """

    def __init__(
        self,
        lambda_inv: float = 10.0,
        lambda_equi: float = 4.5,
        lambda_var: float = 10.0,
        lambda_cov: float = 1.0,
        *,
        eps: float = 1e-4,
        gather_distributed: bool = True,
        process_group: Group = None,
    ) -> None:
        super().__init__()
        weights = (lambda_inv, lambda_equi, lambda_var, lambda_cov)
        names = ("lambda_inv", "lambda_equi", "lambda_var", "lambda_cov")
        check_not_negative(**dict(zip(names, weights, strict=True)))
        check_positive(eps=eps)
        self.weights, self.eps = weights, eps
        self.process_group = process_group if gather_distributed else LOCAL

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
        _check(z_a, z_b, predicted, world_size(group))
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

    def extra_repr(self) -> str:
        names = ("lambda_inv", "lambda_equi", "lambda_var", "lambda_cov")
        shown = [f"{name}={w}" for name, w in zip(names, self.weights, strict=True)]
        gather = self.process_group != LOCAL
        return f"{', '.join(shown)}, eps={self.eps}, gather_distributed={gather}"


def _check(z_a: Tensor, z_b: Tensor, predicted: Tensor, world: int) -> None:
    given = {"z_a": z_a, "z_b": z_b, "predicted": predicted}
    flat = any(x.ndim != 2 or 0 in x.shape for x in given.values())
    if flat or z_a.shape != z_b.shape or len(predicted) != len(z_a):
        shapes = ", ".join(str(tuple(x.shape)) for x in given.values())
        raise ValueError(
            f"z_a and z_b must both be (B, D) and predicted (B, E), none empty, got {shapes}"
        )
    if predicted.shape[1] > z_a.shape[1]:
        raise ValueError(
            f"predicted must have at most the {z_a.shape[1]} features of z_a, "
            f"got {predicted.shape[1]}"
        )
    kinds = [f"{x.dtype} on {x.device}" for x in given.values()]
    if not z_a.is_floating_point() or len(set(kinds)) > 1:
        got = ", ".join(kinds)
        raise ValueError(f"z_a, z_b and predicted must share a float dtype and a device, got {got}")
    if len(z_a) * world < 2:
        raise ValueError(f"the joined batch must have at least 2 rows, got {len(z_a) * world}")


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
