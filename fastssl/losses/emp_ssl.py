"""EMP-SSL: many patches of an image on one spot, and every patch's batch at a high coding rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.distributed import BUILT, Group, all_gather_nograd, all_reduce_sum, rank, world_size
from fastssl.kernels.common import FirstOrder, accumulator, finished, first_order, full_precision
from fastssl.losses._checks import check_batch, check_positive, is_finite
from fastssl.losses._loss import Loss


class EMPSSLLoss(Loss):
    """The negative coding rate of each view's batch, and the negative cosine with the views' mean.

        loss = -tcr_coef mean_v R(z_v) - inv_coef mean_{v, i} cos(z_vi, mean_v z_vi)
        R(z) = 1/2 log det(I + D / (N tcr_eps) z^T z)      of N images

    Shapes   z_views: V tensors (B, D), the same B images row by row in each; any float dtype.
    Returns  scalar float32.
    Memory   one matrix a view, of B x B or D x D, whichever is smaller: log det(I + z^T z) is that
             of I + z z^T.
    Raises   ValueError: no views; other shapes, dtypes or devices, or other ones on another rank;
             tcr_eps not > 0.  A matrix that float32 has not as positive definite gives nan.
    Ranks    the coding rate is the joined batch's, and so is the mean over ranks of value and
             gradient.  gather_distributed=False: each rank's own rate.
    Source   Tong et al. 2023, arXiv:2304.03977, eq. 3; tcr_eps is not squared, as in the authors'
             code.
    Differs  from lightly.loss.EMPSSLLoss: that adds the coding rate, and so makes it small, which
             is a collapse; the paper and its code make it large.  Its value and gradient are those
             of tcr_coef=-1.  Gathers by default.

    >>> z = [torch.eye(2), torch.eye(2)]
    >>> round(EMPSSLLoss(tcr_eps=1.0)(z).item(), 4)  # -log(1 + 2 / 2) - 200
    -200.6931
    """

    shown = ("tcr_eps", "inv_coef", "tcr_coef", "gather_distributed")

    def __init__(
        self,
        tcr_eps: float = 0.2,
        inv_coef: float = 200.0,
        *,
        tcr_coef: float = 1.0,
        gather_distributed: bool = BUILT,
        process_group: Group = None,
    ) -> None:
        super().__init__(gather_distributed, process_group)
        check_positive(tcr_eps=tcr_eps)
        for name, value in (("inv_coef", inv_coef), ("tcr_coef", tcr_coef)):
            if not is_finite(value):
                raise ValueError(f"{name} must be finite, got {value}")
        self.tcr_eps, self.inv_coef, self.tcr_coef = tcr_eps, inv_coef, tcr_coef

    def forward(self, z_views: Sequence[Tensor]) -> Tensor:
        group, views = self.process_group, tuple(z_views)
        if not views:
            raise ValueError("z_views must be at least 1, got 0")
        named: dict[str, Any] = {f"z_views[{v}]": z for v, z in enumerate(views)}
        n = check_batch(group, **named)
        with full_precision(views[0].device):
            z = torch.stack(views).to(accumulator(views[0].dtype))
            rate = _CodingRate.call(z, z.shape[-1] / (n * self.tcr_eps), group).mean()
            match = F.cosine_similarity(z, z.mean(0, keepdim=True), dim=-1).mean()
        return -self.tcr_coef * rate - self.inv_coef * match


class _CodingRate(FirstOrder):
    """1/2 log det(I + a X^T X) of the joined rows of x (V, n, D), for each V.

    Its gradient is a X (I + a X^T X)^-1 = a (I + a X X^T)^-1 X.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: float, group: Group) -> Tensor:
        W, n = world_size(group), x.shape[1]
        ctx.by_rows, ctx.group, ctx.a = n * W <= x.shape[2], group, a
        rows = x
        if ctx.by_rows:
            if W > 1:
                rows = all_gather_nograd(x.transpose(0, 1), group, check=False).transpose(0, 1)
            gram = rows @ rows.mT
        else:
            gram = all_reduce_sum(x.mT @ x, group)
        gram = gram.mul_(a)
        gram.diagonal(dim1=1, dim2=2).add_(1)
        factor, failed = torch.linalg.cholesky_ex(gram)
        rate = factor.diagonal(dim1=1, dim2=2).log().sum(-1)
        if ctx.needs_input_grad[0]:
            inverse = torch.cholesky_inverse(factor)
            if ctx.by_rows:
                inverse = inverse[:, n * rank(group) :][:, :n]
            ctx.save_for_backward(rows, inverse)
        return finished(rate.masked_fill(failed > 0, torch.nan))

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, inverse = ctx.saved_tensors
        grad = all_reduce_sum(grad, ctx.group)[:, None, None] * ctx.a
        return (inverse @ x if ctx.by_rows else x @ inverse).mul_(grad), None, None


def emp_ssl_reference(
    z_views: Sequence[Tensor], tcr_eps: float, inv_coef: float, tcr_coef: float = 1.0
) -> Tensor:
    """The formula by D x D matrices, in one process."""
    z = torch.stack(tuple(z_views))
    eye = torch.eye(z.shape[2], dtype=z.dtype, device=z.device)
    rate = torch.logdet(eye + z.shape[2] / (z.shape[1] * tcr_eps) * z.mT @ z).mean() / 2
    match = F.cosine_similarity(z, z.mean(0, keepdim=True), dim=-1).mean()
    return -tcr_coef * rate - inv_coef * match
