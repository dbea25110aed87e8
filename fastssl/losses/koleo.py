"""KoLeo: every embedding away from its nearest neighbors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.distributed import Group, world_size
from fastssl.kernels import nearest
from fastssl.kernels.common import accumulator, ahead, full_precision
from fastssl.kernels.common.chunks import row_spans
from fastssl.kernels.distillation import nearest_reference
from fastssl.losses._checks import check_batch, check_counts, check_positive
from fastssl.losses._loss import Loss


class KoLeoLoss(Loss):
    """The mean of -log(|u_i - u_n + eps|_p + eps), u_n being the neighbor of u_i nearest by cosine.

    Shapes   x (B, D), any float dtype; normalized here: u = x / max(|x|, eps).
    Returns  scalar float32.  The gradient goes to both of a pair; which is nearest has none.
             Rows that coincide are eps apart: finite.
    Raises   ValueError: another shape or dtype, fewer than 2 rows, p or eps not > 0; a
             loss_group_size that does not divide the rows, or a topk that is not below it.
    Ranks    by default no collective: each rank's own rows, as in DINOv2.  gather_distributed:
             neighbors are those of all ranks' rows, as many on each; the mean over ranks of value
             and gradient is the joined batch's.
             loss_group_size: neighbors are looked for among so many rows, one such group after the
             other, ranks in their order; topk: the mean is over so many of them.
    Memory   x twice, one of them its gradient; the B x B cosines are never stored.
    Source   Sablayrolles et al. 2019, arXiv:1806.03198, section 3.2; as in DINOv2.  Groups, topk
             and ranks: Simeoni et al. 2025, DINOv3, arXiv:2508.10104, whose groups are of ranks.
    Differs  from lightly.loss.KoLeoLoss, whose value and gradient it has: refuses a single row, and
             has no module pairwise_distance.

    >>> round(KoLeoLoss()(torch.tensor([[1.0, 0.0], [0.0, 2.0]])).item(), 4)  # -log sqrt 2
    -0.3466
    """

    shown = ("p", "eps")

    def __init__(
        self,
        p: float = 2,
        eps: float = 1e-8,
        *,
        gather_distributed: bool = False,
        loss_group_size: int | None = None,
        topk: int = 1,
        process_group: Group = None,
    ) -> None:
        super().__init__(gather_distributed, process_group)
        check_positive(p=p, eps=eps)
        check_counts(topk=topk)
        if loss_group_size is not None:
            check_counts(2, loss_group_size=loss_group_size)
        self.p, self.eps = p, eps
        self.loss_group_size, self.topk = loss_group_size, topk

    def forward(self, x: Tensor) -> Tensor:
        group, size = self.process_group, self.loss_group_size
        n = check_batch(group, x=x)
        if n < 2:
            raise ValueError(f"x must have at least 2 rows, got {tuple(x.shape)}")
        if size is not None and n % size:
            raise ValueError(f"loss_group_size must divide the {n} rows, got {size}")
        if self.topk >= (size or n):
            raise ValueError(f"topk must be below the {size or n} rows of a group, got {self.topk}")
        if torch.compiler.is_compiling() or world_size(group) > 1:
            with full_precision(x.device):
                u = _unit(x, self.eps)
                rows, at = nearest(u, topk=self.topk, groups=n // (size or n), process_group=group)
                return _spread(u, rows, at, self.p, self.eps)
        return ahead(self._made, x)

    def _made(self, tensors: Sequence[Tensor], need: Sequence[bool]) -> tuple[Tensor, list[Tensor]]:
        (x,) = tensors
        acc, (B, D) = accumulator(x.dtype), x.shape
        norm = x.new_empty(B, 1, dtype=acc)
        u = x.new_empty(B, D, dtype=acc)  # at first; then what is made of it, its gradient
        spans = list(row_spans(u, 4 * D * self.topk))
        for i in spans:
            wide = x[i].to(acc)
            norm[i] = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
            torch.div(wide, norm[i].clamp_min(self.eps), out=u[i])
        near = nearest(u, topk=self.topk, groups=B // (self.loss_group_size or B)).indices
        value, short = u.new_zeros(()), norm <= self.eps
        norm.clamp_min_(self.eps)
        du = u.zero_()
        for i in spans:
            self._push(x, norm, near[i], i, value, du)
        value /= near.numel()
        for i in spans if need[0] else ():
            unit = x[i].to(acc) / norm[i]
            along = torch.linalg.vecdot(unit, du[i]).unsqueeze(1).masked_fill_(short[i], 0)
            du[i] = du[i].addcmul_(unit, along, value=-1).div_(norm[i])
        return value, [du]

    def _push(
        self, x: Tensor, norm: Tensor, near: Tensor, i: slice, value: Tensor, du: Tensor
    ) -> None:
        """Add to value, and to its gradient to the unit rows, the terms of rows i with `near`."""
        other = near.flatten()
        apart = x[other].to(du.dtype).div_(norm[other]).unflatten(0, near.shape)
        apart = (x[i].to(du.dtype) / norm[i]).unsqueeze(1).sub(apart).add_(self.eps)
        far = torch.linalg.vector_norm(apart, self.p, dim=2, keepdim=True)
        value -= (far + self.eps).log().sum()
        if self.p != 2:
            apart = apart.sign() * apart.abs().pow_(self.p - 1)
        slope = far.pow(self.p - 1).mul_(far + self.eps).mul_(-len(x) * self.topk)
        apart.div_(slope)
        du[i] += apart.sum(1)
        du.index_add_(0, other, apart.flatten(0, 1), alpha=-1)


def _unit(x: Tensor, eps: float) -> Tensor:
    return F.normalize(x.to(accumulator(x.dtype)), dim=-1, eps=eps)


def _spread(u: Tensor, rows: Tensor, at: Tensor, p: float, eps: float) -> Tensor:
    return -(F.pairwise_distance(u.unsqueeze(1), rows[at], p, eps) + eps).log().mean()


def koleo_reference(
    x: Tensor, p: float, eps: float, topk: int = 1, group_size: int | None = None
) -> Tensor:
    """The formula in one process, with the B x B cosines."""
    u = _unit(x, eps)
    at = nearest_reference(u, topk, len(x) // (group_size or len(x)))
    return _spread(u, u, at, p, eps)
