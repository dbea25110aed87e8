"""FroSSL: covariances of a small Frobenius norm, so of even eigenvalues, and views that agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastssl.distributed import Group, all_reduce_sum, world_size
from fastssl.kernels import frobenius_sq
from fastssl.kernels.common import accumulator, full_precision
from fastssl.losses._checks import check_batch, is_finite
from fastssl.losses._loss import Loss


class FroSSLLoss(Loss):
    """The log of each view's squared Frobenius norm, and the views' distance to their mean.

        loss = sum_v log(|C_v|^2 / tr(C_v)^2) + invariance_weight V/N sum_v |h_v - mean h|^2

    C_v = h_v^T h_v (D, D); h_v is view v with columns of length one over the batch of N images.

    Shapes   z_views: V >= 2 tensors (B, D), the same B images row by row in each; any float dtype.
    Returns  scalar float32; the mean over ranks is the loss.
    Memory   |C|^2 by `frobenius_sq`: through B x B or D x D products, whichever is cheaper.
    Raises   ValueError: fewer than 2 views; other shapes, dtypes or devices, or other ones on
             another rank; a weight that is not finite.
    Ranks    columns and covariances are the joined batch's, and so is the mean over ranks of value
             and gradient.  gather_distributed=False: each rank's own.
    Source   Skean et al. 2024, arXiv:2310.02903, eq. 4 and algorithm 1.
    Differs  from lightly.loss.FroSSLLoss, whose value and gradient it has in one process: sums in
             float32 whatever the dtype; gathers by default.

    >>> z = torch.eye(2)
    >>> round(FroSSLLoss()([z, z]).item(), 4)  # 2 log(2 / 2^2)
    -1.3863
    """

    shown = ("invariance_weight", "gather_distributed")

    def __init__(
        self,
        invariance_weight: float = 1.0,
        *,
        gather_distributed: bool = True,
        process_group: Group = None,
    ) -> None:
        super().__init__(gather_distributed, process_group)
        if not is_finite(invariance_weight):
            raise ValueError(f"invariance_weight must be finite, got {invariance_weight}")
        self.invariance_weight = invariance_weight

    def forward(self, z_views: Sequence[Tensor]) -> Tensor:
        group, views = self.process_group, tuple(z_views)
        if len(views) < 2:
            raise ValueError(f"z_views must be at least 2, got {len(views)}")
        named: dict[str, Any] = {f"z_views[{v}]": z for v, z in enumerate(views)}
        n = check_batch(group, **named)
        dtype = views[0].dtype
        with full_precision(views[0].device):
            z = torch.stack(views).to(accumulator(dtype))
            length = all_reduce_sum(z.square().sum(1), group).sqrt().clamp_min(1e-12)
            h = z / length.unsqueeze(1)
            trace = all_reduce_sum(h.detach().square().sum((1, 2)), group)
            rows = h.to(dtype).unbind()  # 16 bits: a GPU multiplies those many times as fast
            size = torch.stack([frobenius_sq(x, x, process_group=group) for x in rows])
            apart = (h - h.mean(0)).square().sum() * (len(views) * world_size(group) / n)
            return (size.log() - 2 * trace.log()).sum() + self.invariance_weight * apart


def frossl_reference(z_views: Sequence[Tensor], invariance_weight: float = 1.0) -> Tensor:
    """The formula by D x D covariances, in one process."""
    h = torch.stack(tuple(z_views))
    h = h / torch.linalg.vector_norm(h, dim=1, keepdim=True).clamp_min(1e-12)
    covariance = h.mT @ h
    even = covariance.square().sum((1, 2)) / covariance.diagonal(dim1=1, dim2=2).sum(1) ** 2
    apart = (h - h.mean(0)).square().sum() * len(h) / h.shape[1]
    return even.log().sum() + invariance_weight * apart
