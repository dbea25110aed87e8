"""DeepCluster v2: every crop predicts the cluster that its image has been given."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.distributed import BUILT, Group, all_reduce_sum, require_all_even, world_size
from fastssl.kernels.common import accumulator, can_read_values
from fastssl.losses._checks import check_embeddings, check_ids, check_temperature
from fastssl.losses._loss import Loss


class DeepClusterV2Loss(Loss):
    """The cross-entropy of each crop's scores with its image's cluster, one mean for each head.

        loss = mean_h mean over crops and images of -log softmax(outputs_h / temperature)[cluster]

    Shapes   outputs (H, V, B, K): the scores of V crops of B images with the K centroids of each of
             H heads, rows and centroids of length one; any float dtype.  assignments (H, B): the
             image's cluster by each head, an integer; -1: none yet, and it does not count.
    Returns  scalar float32, in nats; a head without any assignment counts 0.
    Raises   ValueError: other shapes, dtypes or devices, or other ones on another rank; on a CPU an
             assignment outside of -1..K-1; temperature not > 0.
    Ranks    a head's mean is over the images of all ranks that have a cluster, and so is the mean
             over ranks of value and gradient.  gather_distributed=False: each rank's own.
    Source   Caron et al. 2020, SwAV, arXiv:2006.09882, appendix D; as solo-learn's
             deepclusterv2_loss_func.
    Differs  from that: nan there where a head has no assignment; float32 whatever the dtype.

    >>> scores = torch.eye(4).view(1, 1, 4, 4)
    >>> round(DeepClusterV2Loss(0.5)(scores, torch.tensor([[0, 1, 2, -1]])).item(), 4)
    0.3408
    """

    shown = ("temperature", "gather_distributed")

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        gather_distributed: bool = BUILT,
        process_group: Group = None,
    ) -> None:
        super().__init__(gather_distributed, process_group)
        check_temperature(temperature)
        self.temperature = temperature

    def forward(self, outputs: Tensor, assignments: Tensor) -> Tensor:
        group = self.process_group
        require_all_even(group, outputs=outputs, assignments=assignments)
        check_embeddings("H, V, B, K", outputs=outputs)
        check_ids("assignments", assignments, outputs[:, 0], axes=2)
        H, V, B, K = outputs.shape
        if can_read_values(assignments) and assignments.is_cpu:
            low, high = (int(x) for x in assignments.aminmax())
            if low < -1 or high >= K:
                raise ValueError(f"assignments must lie in [-1, {K - 1}], got {low}..{high}")
        target = assignments.long().unsqueeze(1).expand(H, V, B)
        scores = outputs.to(accumulator(outputs.dtype)).flatten(0, 2) / self.temperature
        losses = F.cross_entropy(scores, target.flatten(), ignore_index=-1, reduction="none")
        count = all_reduce_sum((assignments >= 0).sum(1) * V, group)
        each = losses.view(H, -1).sum(1) / count.clamp(min=1)
        return each.mean() * world_size(group)


def deepcluster_v2_reference(outputs: Tensor, assignments: Tensor, temperature: float) -> Tensor:
    """The formula, head by head, in one process."""
    total = outputs.new_zeros(())
    for scores, clusters in zip(outputs, assignments, strict=True):
        has = clusters >= 0
        share = (scores[:, has] / temperature).log_softmax(-1)
        if has.any():
            total = total - share[:, torch.arange(len(share[0])), clusters[has]].mean()
    return total / len(outputs)
