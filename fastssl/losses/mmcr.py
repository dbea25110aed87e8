"""MMCR: the views of an image on one spot, and the spots of all images far apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastssl.distributed import (
    BUILT,
    LOCAL,
    Group,
    all_gather_nograd,
    all_reduce_sum,
    rank,
    world_size,
)
from fastssl.kernels.common import (
    FirstOrder,
    accumulator,
    ahead,
    can_read_values,
    finished,
    first_order,
    full_precision,
)
from fastssl.losses import _ahead
from fastssl.losses._checks import check_batch, check_not_negative
from fastssl.losses._loss import Loss


class MMCRLoss(Loss):
    """The nuclear norm of the images' centroids, against that of each image's views.

    The formula is `mmcr_reference`: a nuclear norm is the sum of singular values.

    Shapes   online, momentum (B, k, D): k views of B images through two networks; any float dtype.
             Rows are taken as they are: the paper's have length one.
    Returns  scalar float32; the mean over ranks is the loss.  It grows with the batch: for rows of
             length one the centroids' norm is at most sqrt(B min(B, D)).
    Accuracy singular values are roots of the eigenvalues of the smaller Gram matrix, summed in
             float64: exact to 1e-8 of the largest, below a rounding of float32.  The gradient is
             U V^T of the directions with a singular value above max(rows, D) * 2^-23 of the largest
             (2^-26 for float64), the subgradient of least norm: where views coincide, or
             embeddings collapse, the other directions are rounding, and get none.
    Raises   ValueError: other shapes, dtypes or devices, or other ones on another rank; fewer than
             2 images in the joined batch; lmda < 0.
    Ranks    centroids are those of all ranks' images, and the mean over ranks of value and gradient
             is the joined batch's.  gather_distributed=False: each rank's own centroids.
             A part's norm is less than the whole's, and by how much depends on how alike the
             parts are: ranks may then spread over the same few directions at no cost.
    On a CPU in one process the gradient is made with the loss, and backward only multiplies.
    Source   Yerxa et al. 2023, arXiv:2303.03307; loss and lmda as in lightly.
    Differs  from lightly.loss.MMCRLoss, whose value and gradient it has in one process: gathers by
             default, where lightly's has each rank's own centroids.

    >>> z = torch.eye(4)[:, None]
    >>> round(MMCRLoss(0.0)(z, z).item(), 4), round(MMCRLoss(1.0)(z, z).item(), 4)  # -4 + sqrt(2)
    (-4.0, -2.5858)
    """

    shown = ("lmda", "gather_distributed")

    def __init__(
        self, lmda: float = 5e-3, *, gather_distributed: bool = BUILT, process_group: Group = None
    ) -> None:
        super().__init__(gather_distributed, process_group)
        check_not_negative(lmda=lmda)
        self.lmda = lmda

    def forward(self, online: Tensor, momentum: Tensor) -> Tensor:
        group = self.process_group
        if _ahead.fits(group, online, momentum, axes=3, least=2):
            return ahead(self._alone, online, momentum)
        check_batch(group, "B, k, D", least=2, online=online, momentum=momentum)
        acc = accumulator(online.dtype)
        z = torch.cat([online, momentum], dim=1).to(acc)
        with full_precision(z.device):
            spread = _NuclearNorm.call(z.mean(1), group)
            size = _NuclearNorm.call(z, LOCAL).mean()  # pyright: ignore
        return self.lmda * size - spread

    def _alone(self, sides: Sequence[Tensor], need: Sequence[bool]) -> _ahead.Gradients:
        """Value and gradients of one process."""
        acc = accumulator(sides[0].dtype)
        z = torch.cat(tuple(sides), dim=1).to(acc)
        spread, dcenters = _polar(z.mean(1))
        sizes, dz = _polar(z)
        value = sizes.mean().mul_(self.lmda).sub_(spread).to(acc)
        dz = dz.mul_(self.lmda / len(z)).sub_(dcenters.unsqueeze(1), alpha=1 / z.shape[1])
        return value, dz.split([side.shape[1] for side in sides], dim=1)


def _polar(x: Tensor) -> tuple[Tensor, Tensor]:
    """|X|_* of x (..., n, D) in float64, and U V^T: see `_NuclearNorm`."""
    wide, by_rows, times = x.double(), x.shape[-2] <= x.shape[-1], _times(x)
    gram = times(wide, wide.mT) if by_rows else times(wide.mT, wide)
    norm, root = _inverse_root(gram, _resolved(x.dtype, max(x.shape[-2:])))
    if x.ndim == 2:  # many directions, far apart in size: sums of float32 would be rounding
        return norm, (times(root, wide) if by_rows else times(wide, root)).to(x.dtype)
    root = root.to(x.dtype)
    return norm, times(root, x) if by_rows else times(x, root)


def _times(x: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The product of matrices like x, at half of the call's price of `@`."""
    return torch.mm if x.ndim == 2 else torch.bmm


def _resolved(dtype: torch.dtype, size: int) -> float:
    """The least singular value that is not rounding, in units of the largest."""
    return max(torch.finfo(dtype).eps, 2.0**-26) * size


class _NuclearNorm(FirstOrder):
    """|X|_* of the joined rows of x (..., n, D), for each leading index: d|X|_*/dX = U V^T.

    X = U S V^T.  With K = X X^T = U S^2 U^T, U V^T is K^(-1/2) X; with K = X^T X, X K^(-1/2).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        W, n = world_size(group), x.shape[-2]
        ctx.by_rows, ctx.group = n * W <= x.shape[-1], group
        if ctx.by_rows:
            rows = all_gather_nograd(x, group, check=False) if W > 1 else x
            wide = rows.double()
            gram = wide @ wide.mT
        else:
            rows, wide = x, x.double()
            gram = all_reduce_sum(wide.mT @ wide, group)
        norm, root = _inverse_root(gram, _resolved(x.dtype, max(n * W, x.shape[-1])))
        if ctx.by_rows:
            root = root[..., n * rank(group) :, :][..., :n, :]
        ctx.save_for_backward(rows, root.to(x.dtype))
        return finished(norm.to(x.dtype))

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, root = ctx.saved_tensors
        grad = all_reduce_sum(grad, ctx.group)[..., None, None]
        return (root @ x if ctx.by_rows else x @ root).mul_(grad), None


def _inverse_root(gram: Tensor, resolved: float) -> tuple[Tensor, Tensor]:
    """The sum of the roots of K's eigenvalues, and K^(-1/2) on the directions that are resolved.

    resolved: the least root, in units of the largest, that is not rounding.  Where K is not finite,
    which no eigendecomposition takes, both are nan.
    """
    whole = can_read_values(gram) and math.isfinite(gram.sum())
    values, vectors = torch.linalg.eigh(gram if whole else torch.where(gram.isfinite(), gram, 0))
    sigma = values.clamp_min_(0).sqrt_()
    inverse = sigma.reciprocal().masked_fill_(sigma <= sigma[..., -1:] * resolved, 0)
    norm, root = sigma.sum(-1), _times(gram)(vectors * inverse.unsqueeze(-2), vectors.mT)
    if whole:
        return norm, root
    broken = (0 * gram).sum((-2, -1))  # nan, or 0
    return norm + broken, root + broken[..., None, None]


def mmcr_reference(online: Tensor, momentum: Tensor, lmda: float) -> Tensor:
    """The formula by singular values, in one process."""
    z = torch.cat([online, momentum], dim=1)  # (B, 2k, D)
    spread, size = torch.linalg.svdvals(z.mean(1)).sum(), torch.linalg.svdvals(z).sum(-1).mean()
    return lmda * size - spread
