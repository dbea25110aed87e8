"""Redundancy-reduction losses over the correlation primitives."""

from __future__ import annotations

from torch import Tensor, nn

from fastssl.distributed import LOCAL, Group, all_reduce_sum, require_all_even, world_size
from fastssl.kernels import cross_diagonal, frobenius_sq, standardise


class BarlowTwinsLoss(nn.Module):
    """The cross-correlation of two views' embeddings should be the identity.

        C = A^T B / N,  A and B standardised per column over the batch (biased variance, eps 1e-5)
        loss = sum_i (1 - C_ii)^2 + lambda * sum_{i != j} C_ij^2

    Shapes   z_a, z_b (B, D): the two views of the same B images, row by row; any float dtype.
    Returns  scalar float32, 0 <= loss up to rounding; the same on every rank.  The off-diagonal
             sum is |A^T B|^2 / N^2 - sum_i C_ii^2, so no D x D matrix is made when N < 0.75 D.
    Raises   ValueError: shapes that are not two equal (B, D); fewer than 2 rows in the joined
             batch; lambda_param < 0; batches that differ between ranks (on every rank).
    Ranks    A and B are standardised with the statistics of the joined batch.  Value, and the mean
             over ranks of the gradient, are those of the joined batch in one process.
             gather_distributed=False standardises and correlates within each rank's batch only.
    Source   Zbontar et al. 2021, Barlow Twins, arXiv:2103.03230, eq. 1 and algorithm 1.
    Differs  from lightly.loss.BarlowTwinsLoss, whose value and gradient it has in one process:
             gathers by default, and across ranks its statistics are the joined batch's, where
             lightly standardises per rank and then averages C.

    >>> import torch
    >>> z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    >>> round(BarlowTwinsLoss()(z, z).item(), 4), round(BarlowTwinsLoss()(z, -z).item(), 3)
    (0.0, 8.0)
    """

    eps = 1e-5

    def __init__(
        self,
        lambda_param: float = 5e-3,
        *,
        gather_distributed: bool = True,
        process_group: Group = None,
    ) -> None:
        super().__init__()
        if not lambda_param >= 0:
            raise ValueError(f"lambda_param must be >= 0, got {lambda_param}")
        self.lambda_param = lambda_param
        self.process_group = process_group if gather_distributed else LOCAL

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        group = self.process_group
        # First what all ranks refuse together: one that left alone would leave the others waiting.
        require_all_even(group, z_a=z_a, z_b=z_b)
        if z_a.ndim != 2 or z_a.shape != z_b.shape:
            shapes = f"{tuple(z_a.shape)} and {tuple(z_b.shape)}"
            raise ValueError(f"z_a and z_b must both be (B, D), got {shapes}")
        n = len(z_a) * world_size(group)
        if n < 2:
            raise ValueError(f"the joined batch must have at least 2 rows, got {n}")
        a = standardise(z_a, eps=self.eps, process_group=group)
        b = standardise(z_b, eps=self.eps, process_group=group)
        diagonal = all_reduce_sum(cross_diagonal(a, b), group) / n
        total = frobenius_sq(a, b, process_group=group) / n**2
        off_diagonal = total - diagonal.square().sum()
        return (1 - diagonal).square().sum() + self.lambda_param * off_diagonal

    def extra_repr(self) -> str:
        gather = self.process_group != LOCAL
        return f"lambda_param={self.lambda_param}, gather_distributed={gather}"
