"""KoLeo: every embedding away from its nearest neighbor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.kernels import exclude_self, pairwise_topk
from fastssl.kernels.common import accumulator, ahead
from fastssl.kernels.common.chunks import row_spans
from fastssl.losses._checks import check_embeddings, check_positive
from fastssl.losses._loss import Loss


class KoLeoLoss(Loss):
    """The mean of -log(|u_i - u_n + eps|_p + eps), u_n being the neighbor of u_i nearest by cosine.

    Shapes   x (B, D), any float dtype; normalized here: u = x / max(|x|, eps).
    Returns  scalar float32.  The gradient goes to both of a pair; which is nearest has none.
             Rows that coincide are eps apart: finite.
    Raises   ValueError: another shape or dtype, fewer than 2 rows, p or eps not > 0.
    Ranks    no collective: each rank's own rows, as in DINOv2.
    Memory   x twice; the B x B cosines are never stored.
    Source   Sablayrolles et al. 2019, arXiv:1806.03198, section 3.2; as in DINOv2.
    Differs  from lightly.loss.KoLeoLoss, whose value and gradient it has: refuses a single row, and
             has no module pairwise_distance.

    >>> round(KoLeoLoss()(torch.tensor([[1.0, 0.0], [0.0, 2.0]])).item(), 4)  # -log sqrt 2
    -0.3466
    """

    shown = ("p", "eps")

    def __init__(self, p: float = 2, eps: float = 1e-8) -> None:
        super().__init__()
        check_positive(p=p, eps=eps)
        self.p, self.eps = p, eps

    def forward(self, x: Tensor) -> Tensor:
        check_embeddings("B, D", x=x)
        if len(x) < 2:
            raise ValueError(f"x must have at least 2 rows, got {tuple(x.shape)}")
        if torch.compiler.is_compiling():
            u = _unit(x, self.eps)
            return _spread(u, _nearest(u.detach()), self.p, self.eps)
        return ahead(self._made, x)

    def _made(self, tensors: Sequence[Tensor], need: Sequence[bool]) -> tuple[Tensor, list[Tensor]]:
        (x,) = tensors
        wide = x.to(accumulator(x.dtype))
        norm = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
        u = wide / norm.clamp_min(self.eps)
        near = _nearest(u)
        du, value = torch.zeros_like(u), u.new_zeros(())
        for i in row_spans(u, 4 * u.shape[1]):
            apart = u[i] - u[near[i]] + self.eps
            far = torch.linalg.vector_norm(apart, self.p, dim=1, keepdim=True)
            value -= (far + self.eps).log().sum()
            if self.p != 2:
                apart = apart.sign() * apart.abs().pow_(self.p - 1)
            slope = far.pow(self.p - 1).mul_(far + self.eps).mul_(-len(u))
            apart.div_(slope)
            du[i] += apart
            du.index_add_(0, near[i], apart, alpha=-1)
        value /= len(u)
        if need[0]:
            along = torch.linalg.vecdot(u, du).unsqueeze(1).masked_fill_(norm <= self.eps, 0)
            du.addcmul_(u, along, value=-1).div_(norm.clamp_min_(self.eps))
        return value, [du]


def _nearest(u: Tensor) -> Tensor:
    return pairwise_topk(u, u, 1, mask=exclude_self)[1].squeeze(1)


def _unit(x: Tensor, eps: float) -> Tensor:
    return F.normalize(x.to(accumulator(x.dtype)), dim=-1, eps=eps)


def _spread(u: Tensor, near: Tensor, p: float, eps: float) -> Tensor:
    return -(F.pairwise_distance(u, u[near], p, eps) + eps).log().mean()


def koleo_reference(x: Tensor, p: float, eps: float) -> Tensor:
    """The formula, with the B x B cosines."""
    u = _unit(x, eps)
    return _spread(u, (u @ u.T).detach().fill_diagonal_(-2).argmax(1), p, eps)
