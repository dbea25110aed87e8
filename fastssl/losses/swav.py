"""SwAV: each crop predicts the prototypes that another crop of its image is assigned to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastssl.distributed import LOCAL, Group
from fastssl.kernels import sinkhorn
from fastssl.losses._checks import check_counts, check_positive, check_temperature
from fastssl.losses._loss import Loss
from fastssl.losses.dino import check_views, cross_entropies


class SwaVLoss(Loss):
    """The cross-entropy of each crop's distribution with the others' Sinkhorn assignments.

    Shapes   high_resolution_outputs, low_resolution_outputs: lists of (B, K) scores of each crop
             with K prototypes, any float dtype; the first are assigned, all predict.
             queue_outputs: None, or for each of the first (Q, K): scores of older embeddings, which
             count in the assignment alone.
    Returns  scalar float32, 0 <= loss: the mean over assigned crops, the other crops and images.
    Raises   ValueError: no other crop, shapes that disagree, as many queues as assigned crops or
             none, temperatures not > 0, sinkhorn_iterations < 1.
    Ranks    sinkhorn_gather_distributed: prototypes are used alike over all ranks' rows; else over
             each rank's own.
    Source   Caron et al. 2020, arXiv:2006.09882, eq. 2 and 3.
    Differs  from lightly.loss.SwaVLoss, whose value and gradient it has: assignments are made in
             the log domain, finite where scores / sinkhorn_epsilon pass 88, and over ranks of
             unlike sizes exact; the result has no dimension, and there is no subloss.

    >>> loss, scores = SwaVLoss(), torch.zeros(2, 4)
    >>> round(loss([scores, scores], []).item(), 4)  # log 4
    1.3863
    """

    shown = ("temperature", "sinkhorn_iterations", "sinkhorn_epsilon")

    def __init__(
        self,
        temperature: float = 0.1,
        sinkhorn_iterations: int = 3,
        sinkhorn_epsilon: float = 0.05,
        sinkhorn_gather_distributed: bool = False,
        *,
        process_group: Group = None,
    ) -> None:
        super().__init__(sinkhorn_gather_distributed, process_group)
        check_temperature(temperature)
        check_positive(sinkhorn_epsilon=sinkhorn_epsilon)
        check_counts(sinkhorn_iterations=sinkhorn_iterations)
        self.temperature, self.sinkhorn_epsilon = temperature, sinkhorn_epsilon
        self.sinkhorn_iterations = sinkhorn_iterations

    @property
    def sinkhorn_gather_distributed(self) -> bool:
        """Whether other ranks' rows count in the assignment."""
        return self.process_group != LOCAL

    def forward(
        self,
        high_resolution_outputs: Sequence[Tensor],
        low_resolution_outputs: Sequence[Tensor],
        queue_outputs: Sequence[Tensor] | None = None,
    ) -> Tensor:
        high, crops = high_resolution_outputs, [*high_resolution_outputs, *low_resolution_outputs]
        T, V = len(high), len(crops)
        if T == 0 or V < 2:
            raise ValueError(f"high_resolution_outputs must have another crop, got {T} of {V}")
        if queue_outputs is not None and len(queue_outputs) != T:
            raise ValueError(f"queue_outputs must be {T} tensors, got {len(queue_outputs)}")
        check_views(crops, high)
        rows = list(high)
        if queue_outputs is not None:
            rows = [torch.cat([x.detach(), q]) for x, q in zip(high, queue_outputs, strict=True)]
        centers = [
            sinkhorn(
                x,
                self.sinkhorn_epsilon,
                iterations=self.sinkhorn_iterations,
                process_group=self.process_group,
            )
            for x in rows
        ]
        pairs = [[float(v != t) for t in range(T)] for v in range(V)]
        temps = self.temperature, self.sinkhorn_epsilon
        return cross_entropies(crops, high, torch.stack(centers), pairs, temps) / ((V - 1) * T)
