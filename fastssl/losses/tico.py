"""TiCo: two views agree, and embeddings keep away from where recent batches were."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastssl.distributed import BUILT, Group, all_gather_nograd, all_reduce_sum, world_size
from fastssl.kernels.common import FirstOrder, first_order, full_precision
from fastssl.losses._checks import check_batch, check_not_negative, check_within
from fastssl.losses._loss import Loss
from fastssl.losses._unit import unit


class TiCoLoss(Loss):
    """Invariance of two views, and contrast with a moving covariance C of embeddings.

    The formula is `tico_reference`.  C has no gradient, this batch's part of it included.

    Shapes   z_a, z_b (B, D): two views of the same B images, row by row; any float dtype.
    Returns  scalar float32; the mean over ranks is the loss.  0 <= loss; the second term is at most
             rho, when all embeddings have been one direction for long.
    State    C (D, D) float32 (float64 for float64), None before the first batch, in state_dict
             after it, and the same on every rank.  update_covariance_matrix=False reads it only,
             and then makes no matrix of features of a batch of fewer than D rows.
    Cost     two products of B D^2; backward has none: the gradient is what the second one gave.
    Raises   ValueError: other shapes, dtypes or devices, or other ones on another rank; a D other
             than C's; fewer than 2 images in the joined batch; beta outside [0, 1]; rho < 0.
    Ranks    C is of the joined batch, and the mean over ranks of value and gradient is the joined
             batch's.  gather_distributed=False: each rank has a C of its own, of its own b rows.
             Rows meet themselves in it, which adds rho (1 - beta) / b to the loss, and W times as
             much as in the joined batch.
    Source   Zhu et al. 2022, TiCo, arXiv:2206.10698.
    Differs  from lightly.loss.TiCoLoss, whose value and gradient it has in one process: gathers by
             default, and C is a buffer that is saved.

    >>> loss, z = TiCoLoss(), torch.eye(2)
    >>> round(loss(z, z).item(), 4)  # C = 0.1 * I / 2
    0.4
    >>> round(loss(z, z).item(), 4)  # 0.9 * 0.1 * I / 2 more
    0.76
    """

    C: Tensor | None
    shown = ("beta", "rho", "gather_distributed")

    def __init__(
        self,
        beta: float = 0.9,
        rho: float = 8.0,
        gather_distributed: bool = BUILT,
        *,
        process_group: Group = None,
    ) -> None:
        super().__init__(gather_distributed, process_group)
        check_within(0, 1, beta=beta)
        check_not_negative(rho=rho)
        self.beta, self.rho = beta, rho
        self.register_buffer("C", None)

    def forward(self, z_a: Tensor, z_b: Tensor, update_covariance_matrix: bool = True) -> Tensor:
        n, D = check_batch(self.process_group, least=2, z_a=z_a, z_b=z_b), z_a.shape[1]
        if self.C is not None and len(self.C) != D:
            raise ValueError(f"z_a must have the {len(self.C)} features of C, got {D}")
        a, b = unit(z_a), unit(z_b)
        with torch.no_grad(), full_precision(a.device):
            product = self._meet(a.detach(), n, update_covariance_matrix)
        return 1 + _Terms.call(a, b, product, self.rho) / len(a)  # pyright: ignore

    def _meet(self, a: Tensor, n: int, update: bool) -> Tensor:
        """a C_t, and C_t kept if it is to be."""
        group, share = self.process_group, (1 - self.beta) / n
        old = a.new_zeros(a.shape[1], a.shape[1]) if self.C is None else self.C.to(a)
        if not update and n < len(old):
            rows = all_gather_nograd(a, group, check=False)
            return (a @ old).mul_(self.beta).addmm_(a @ rows.T, rows, alpha=share)
        if world_size(group) > 1:
            new = old.mul(self.beta).add_(all_reduce_sum(a.T @ a, group), alpha=share)
        else:
            new = torch.addmm(old, a.T, a, beta=self.beta, alpha=share)
        if update:
            self.C = new
        return a @ new

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take the saved shape: C has none before the first batch."""
        saved = state_dict.get(prefix + "C")
        device = None if self.C is None else self.C.device
        self.C = None if saved is None else torch.empty_like(saved, device=device)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class _Terms(FirstOrder):
    """sum_n rho a_n . p_n - a_n . b_n, of p = a C, where C has no gradient: da = 2 rho p - b."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, product: Tensor, rho: float) -> Tensor:
        ctx.save_for_backward(a, b, product)
        ctx.rho = rho
        return ((rho * product - b) * a).sum()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        a, b, product = ctx.saved_tensors
        da = (2 * ctx.rho * product).sub_(b).mul_(grad) if ctx.needs_input_grad[0] else None
        return da, -grad * a if ctx.needs_input_grad[1] else None, None, None


def tico_reference(
    z_a: Tensor, z_b: Tensor, C: Tensor | float, beta: float, rho: float
) -> tuple[Tensor, Tensor]:
    """The formula in one process, and C (D, D) after the batch; C: before it, 0 at first."""
    a, b = unit(z_a), unit(z_b)
    C = beta * C + (1 - beta) * a.detach().T @ a.detach() / len(a)
    return 1 - (a * b).sum(1).mean() + rho * ((a @ C) * a).sum(1).mean(), C
