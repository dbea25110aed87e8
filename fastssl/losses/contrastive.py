"""Contrastive losses over `pairwise_lse`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.distributed import LOCAL, Group, all_gather_rows, rank, require_all_even
from fastssl.kernels import exclude_self, pairwise_lse


class NTXentLoss(nn.Module):
    """SimCLR: each view must find its image's other view among all other views of the batch.

    With z the 2N normalised embeddings and p(i) the other view of i:

        loss = mean_i [ log sum_{j != i} exp(z_i.z_j / t) - z_i.z_p(i) / t ]        [nats]
             = mean_i -log sigmoid(z_i.z_p(i) / t - n_i),  n_i the log-sum-exp of i's negatives

    The second form is the one computed: near a perfect match the first is a difference of two
    numbers near 1 / t, and float32 keeps nothing of it.

    Shapes   z0, z1 (B, D): the two views of the same B images, row by row; any float dtype.
    Returns  scalar float32: the mean over this rank's 2B rows.  0 <= loss; ln(2N - 1) when all
             embeddings agree.  Only the log-sum-exp meets N x N pairs, and it holds none of them.
    Raises   ValueError: shapes that are not two equal (B, D) with B > 0; abs(temperature) < 1e-8;
             batches that differ between ranks (on every rank).  A non-finite input is not an error
             here: it gives a non-finite loss.
    Ranks    the embeddings are gathered once, in their own dtype; this rank's rows meet all keys.
             The mean over ranks of value and gradient is that of the joined batch.
             gather_distributed=False contrasts within each rank's batch only.
    Source   Chen et al. 2020, SimCLR, arXiv:2002.05709, eq. 1.
    Differs  from lightly.loss.NTXentLoss, whose value and gradient it has in one process: gathers
             by default, because W small batches are not the large batch that was asked for;
             normalises and sums in float32 whatever the dtype; no memory bank.

    >>> z = torch.eye(4)
    >>> round(NTXentLoss(temperature=0.5)(z, z).item(), 4)  # ln(e^2 + 6) - 2
    0.5944
    """

    def __init__(
        self,
        temperature: float = 0.5,
        *,
        gather_distributed: bool = True,
        process_group: Group = None,
    ) -> None:
        super().__init__()
        if not abs(temperature) >= 1e-8:
            raise ValueError(f"temperature must be at least 1e-8 in magnitude, got {temperature}")
        self.temperature = temperature
        self.process_group = process_group if gather_distributed else LOCAL

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        # First what all ranks refuse together: one that left alone would leave the others waiting.
        require_all_even(self.process_group, z0=z0, z1=z1)
        if z0.ndim != 2 or z0.shape != z1.shape or len(z0) == 0:
            shapes = f"{tuple(z0.shape)} and {tuple(z1.shape)}"
            raise ValueError(f"z0 and z1 must both be (B, D) with B > 0, got {shapes}")
        pairs = torch.stack([z0, z1], dim=1)  # (B, 2, D): a view's twin is its neighbour
        everyone = all_gather_rows(pairs, self.process_group, check=False).flatten(0, 1)
        keys = F.normalize(everyone.double() if z0.dtype == torch.float64 else everyone.float())
        images = torch.arange(len(keys), device=keys.device) // 2
        mine, mine_images = keys, images
        if len(keys) != 2 * len(z0):
            start = 2 * len(z0) * rank(self.process_group)
            rows = slice(start, start + 2 * len(z0))
            mine, mine_images = keys[rows], images[rows]
        first, second = mine.unflatten(0, (-1, 2)).unbind(1)
        positive = (first * second).sum(-1, keepdim=True) / self.temperature
        negative = pairwise_lse(
            mine,
            keys,
            1 / self.temperature,
            mask=exclude_self,
            row_ids=mine_images,
            col_ids=images,
        )
        return -F.logsigmoid(positive - negative.unflatten(0, (-1, 2))).mean()

    def extra_repr(self) -> str:
        gather = self.process_group != LOCAL
        return f"temperature={self.temperature}, gather_distributed={gather}"
