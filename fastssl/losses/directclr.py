"""DirectCLR: SimCLR's loss of the first features of a representation, without a projector."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastssl.distributed import BUILT, Group
from fastssl.losses._checks import check_counts
from fastssl.losses._loss import also_named
from fastssl.losses.ntxent import NTXentLoss


class DirectCLRLoss(NTXentLoss):
    """NTXentLoss of the first loss_dim features alone.

    Shapes   out0, out1 (B, ...), flattened to (B, D); fewer features than loss_dim are all taken.
             A memory bank has keys of min(loss_dim, D).
    Raises   ValueError: loss_dim below 1, and what NTXentLoss raises.
    Returns, state, ranks and the rest: NTXentLoss.
    Source   Jing et al. 2022, arXiv:2110.09348, section 6.
    Differs  from lightly.loss.DirectCLRLoss as NTXentLoss from lightly's: gathers by default; no
             cross_entropy and no eps.

    >>> import torch
    >>> z = torch.eye(4).repeat(1, 2)  # the last four features are no others
    >>> round(DirectCLRLoss(4, temperature=0.5)(z, z).item(), 4)
    0.5944
    """

    shown = ("loss_dim", *NTXentLoss.shown)

    def __init__(
        self,
        loss_dim: int = 64,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = BUILT,
        *,
        process_group: Group = None,
        strategy: str = "gather",
    ) -> None:
        super().__init__(
            temperature,
            memory_bank_size,
            gather_distributed,
            process_group=process_group,
            strategy=strategy,
        )
        check_counts(loss_dim=loss_dim)
        self.loss_dim = loss_dim

    @also_named(embeddings="out0", labels="out1")
    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        return super().forward(*(self._first(x) for x in (out0, out1)))

    def _first(self, x: Tensor) -> Tensor:
        """The first features of x; labels (B,) as they are."""
        return x if x.ndim < 2 else x.flatten(1)[:, : self.loss_dim]
