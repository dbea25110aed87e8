"""FroSSL: covariances of a small Frobenius norm, so of even eigenvalues, and views that agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastssl.distributed import BUILT, Group, all_reduce_sum, world_size
from fastssl.kernels import frobenius_sq
from fastssl.kernels.common import accumulator, ahead, full_precision
from fastssl.losses import _ahead
from fastssl.losses._checks import check_batch, is_finite
from fastssl.losses._loss import Loss
from fastssl.losses._unit import unit


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
    On a CPU in one process the gradient is made with the loss, and backward only multiplies.
    Source   Skean et al. 2024, arXiv:2310.02903, eq. 4 and algorithm 1.
    Differs  from lightly.loss.FroSSLLoss, whose value and gradient it has in one process: sums in
             float32 whatever the dtype; columns shorter than 1e-12 have length one too; gathers by
             default.

    >>> z = torch.eye(2)
    >>> round(FroSSLLoss()([z, z]).item(), 4)  # 2 log(2 / 2^2)
    -1.3863
    """

    shown = ("invariance_weight", "gather_distributed")

    def __init__(
        self,
        invariance_weight: float = 1.0,
        *,
        gather_distributed: bool = BUILT,
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
        if _ahead.fits(group, *views):
            made = self._alone(views)
            if made is not None:
                return made
        named: dict[str, Any] = {f"z_views[{v}]": z for v, z in enumerate(views)}
        n = check_batch(group, **named)
        dtype = views[0].dtype
        with full_precision(views[0].device):
            h = _unit_columns(torch.stack(views).to(accumulator(dtype)), group)
            trace = all_reduce_sum(h.detach().square().sum((1, 2)), group)
            rows = h.to(dtype).unbind()  # 16 bits: a GPU multiplies those many times as fast
            size = torch.stack([frobenius_sq(x, x, process_group=group) for x in rows])
            apart = (h - h.mean(0)).square().sum() * (len(views) * world_size(group) / n)
            return (size.log() - 2 * trace.log()).sum() + self.invariance_weight * apart

    def _alone(self, views: Sequence[Tensor]) -> Tensor | None:
        """The loss of one process, its gradient made with it, all views at once.

        None where a column is too long or too short for its square.
        """
        fresh = [_with_lengths(views)]
        low, high = fresh[0][1].aminmax()
        if not (low >= 1e-9 and high <= 1e15):
            return None

        def run(tensors: Sequence[Tensor], need: Sequence[bool]) -> _ahead.Gradients:
            z, length = fresh.pop() if fresh else _with_lengths(tensors)
            h = z.div_(length)
            by_features = _ahead.has_few_features(h[0])
            product = torch.bmm(h.mT, h) if by_features else torch.bmm(h, h.mT)
            flat, rows, (V, N, _) = product.flatten(1), h.flatten(1), h.shape
            size, trace = torch.linalg.vecdot(flat, flat), torch.linalg.vecdot(rows, rows)
            apart, weight = h - h.mean(0), self.invariance_weight * V / N
            value = (size.log() - 2 * trace.log_()).sum().add_(_ahead.square(apart), alpha=weight)
            if not any(need):
                return value, tensors
            dh = torch.bmm(h, product) if by_features else torch.bmm(product, h)
            dh.mul_(4 / size[:, None, None]).add_(apart, alpha=2 * weight)
            along = (dh * h).sum(1, keepdim=True)
            return value, dh.addcmul_(h, along, value=-1).div_(length).unbind()

        return ahead(run, *views)


def _with_lengths(views: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(V, B, D) and (V, 1, D): all views, and the lengths of their columns."""
    z = torch.stack([x.detach() for x in views]).to(accumulator(views[0].dtype))
    return z, torch.linalg.vector_norm(z, dim=1, keepdim=True)


def _unit_columns(z: Tensor, group: Group) -> Tensor:
    """z (V, B, D) with columns of length one over the joined batch; one of zeros stays zero."""
    if world_size(group) == 1:
        return unit(z.mT).mT
    squares = all_reduce_sum(z.square().sum(1), group).clamp_min(1e-24)
    return z / squares.sqrt().unsqueeze(1)


def frossl_reference(z_views: Sequence[Tensor], invariance_weight: float = 1.0) -> Tensor:
    """The formula by D x D covariances, in one process."""
    h = unit(torch.stack(tuple(z_views)).mT).mT
    covariance = h.mT @ h
    even = covariance.square().sum((1, 2)) / covariance.diagonal(dim1=1, dim2=2).sum(1) ** 2
    apart = (h - h.mean(0)).square().sum() * len(h) / h.shape[1]
    return even.log().sum() + invariance_weight * apart
