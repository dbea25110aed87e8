"""VISReg: views agree, and embeddings are centered, of unit scale, and of a Gaussian's shape."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.distributed import BUILT, Group, all_gather_rows, all_reduce_sum, rank, world_size
from fastssl.kernels.common import accumulator, full_precision
from fastssl.losses._checks import check_counts, check_not_negative, check_positive, check_within
from fastssl.losses._loss import Loss
from fastssl.losses._slices import Ranked, draw_directions
from fastssl.losses.lejepa import check_views, spread_of_views


class VISRegLossComponents(NamedTuple):
    """The loss and its terms, each a scalar: total is of all others, which have no weight yet."""

    total: Tensor
    pred: Tensor
    scale: Tensor
    shape: Tensor
    center: Tensor


class VISRegLoss(Loss):
    """Views near the mean of their image's global ones, and each view's batch a standard Gaussian.

        loss   = (1 - lambda_param) pred + lambda_param (lambda_scale scale + lambda_shape shape
                 + lambda_center center)
        pred   = mean over views of (view - mean of globals)^2
        scale  = mean over features of (1 - std)^2, center that of mean^2, of each view's batch
        shape  = mean over num_slices directions of (x_(i) - Gaussian quantile i / (N + 1))^2 of the
                 sorted x = a . (z - mean) / (std + eps); std has no gradient there

    The formula is `visreg_reference`.

    Shapes   local_proj (L, N, D), global_proj (G, N, D): views of the same N images; any float
             dtype, one for both.  L and G at least 1.
    Returns  scalar float32, 0 <= loss; `forward_components` all terms.
    State    none.  Directions are drawn from torch's default generator, at every call anew.
    Memory   embeddings twice, and one chunk of directions.
    Raises   ValueError: other shapes, dtypes or devices, or other ones on another rank; fewer than
             2 images; a lambda_param outside [0, 1], another weight < 0, num_slices < 1, eps not
             > 0.
    Ranks    the batch is that of all ranks, the directions are the first one's, and each rank sorts
             along its share of them; the mean over ranks of value and gradient is the joined
             batch's.  gather_distributed=False: each rank its own batch, along directions of its
             own, if ranks have seeds of their own.
    Source   Wu et al. 2026, VISReg, arXiv:2606.02572, algorithm 1.
    Differs  from lightly.loss.VISRegLoss, whose values and gradients it has in one process under
             the same seed: gathers by default, and works in float32 for 16-bit inputs.

    >>> z = torch.tensor([[[1.0], [-1.0]]])
    >>> loss = VISRegLoss(lambda_shape=0.0)
    >>> loss(local_proj=z, global_proj=z).item(), loss(local_proj=3 * z, global_proj=z).item() > 1
    (0.0, True)
    """

    shown = ("lambda_param", "num_slices", "gather_distributed")

    def __init__(
        self,
        lambda_param: float = 0.9,
        num_slices: int = 4096,
        lambda_scale: float = 1.0,
        lambda_shape: float = 1.0,
        lambda_center: float = 1.0,
        gather_distributed: bool = BUILT,
        eps: float = 1e-4,
        *,
        process_group: Group = None,
    ) -> None:
        super().__init__(gather_distributed, process_group)
        check_within(0, 1, lambda_param=lambda_param)
        check_counts(num_slices=num_slices)
        check_not_negative(
            lambda_scale=lambda_scale, lambda_shape=lambda_shape, lambda_center=lambda_center
        )
        check_positive(eps=eps)
        self.lambda_param, self.num_slices, self.eps = lambda_param, num_slices, eps
        self.lambda_scale, self.lambda_shape = lambda_scale, lambda_shape
        self.lambda_center = lambda_center

    def forward(self, *, local_proj: Tensor, global_proj: Tensor) -> Tensor:
        return self.forward_components(local_proj=local_proj, global_proj=global_proj).total

    def forward_components(
        self, *, local_proj: Tensor, global_proj: Tensor
    ) -> VISRegLossComponents:
        """All terms; arguments and what is raised: forward."""
        group = self.process_group
        check_views(group, local_proj, global_proj)
        n = global_proj.shape[1] * world_size(group)
        if n < 2:
            raise ValueError(f"global_proj must have at least 2 images in all ranks, got {n}")
        with full_precision(global_proj.device):
            z = torch.cat([global_proj, local_proj]).to(accumulator(global_proj.dtype))
            mean = all_reduce_sum(z.sum(1, keepdim=True), group) / n
            z = z - mean
            var = all_reduce_sum(z.square().sum(1, keepdim=True), group) / n
            std = torch.where(var > 0, var, 1).sqrt() * (var > 0)  # of 0 without a gradient
            scale, center = (1 - std).square().mean(), mean.square().mean()
            shape = self._shape(z / (std.detach() + self.eps))
        pred = spread_of_views(local_proj, global_proj)
        terms = self.lambda_scale * scale + self.lambda_shape * shape + self.lambda_center * center
        total = (1 - self.lambda_param) * pred + self.lambda_param * terms
        return VISRegLossComponents(total, pred, scale, shape, center)

    def _shape(self, z: Tensor) -> Tensor:
        group, S = self.process_group, self.num_slices
        W, here = world_size(group), rank(group)
        a = draw_directions(z, S, group)[:, here * S // W : (here + 1) * S // W]
        rows = all_gather_rows(z.transpose(0, 1), group, check=False).transpose(0, 1)
        n = rows.shape[1]
        at = torch.arange(1, n + 1, device=z.device, dtype=z.dtype) / (n + 1)
        need = rows.requires_grad and torch.is_grad_enabled()
        return Ranked.call(rows, a, torch.special.ndtri(at), need) * (W / (len(z) * n * S))


def visreg_reference(
    local_proj: Tensor, global_proj: Tensor, directions: Tensor, eps: float = 1e-4
) -> VISRegLossComponents:
    """The terms in one process, total their sum without weights; directions (D, S)."""
    z = torch.cat([global_proj, local_proj])
    pred = (z - global_proj.mean(0)).square().mean()
    mean, std = z.mean(1, keepdim=True), z.std(1, correction=0, keepdim=True)
    x = ((z - mean) / (std.detach() + eps)) @ directions
    at = torch.arange(1, z.shape[1] + 1, device=z.device, dtype=z.dtype) / (z.shape[1] + 1)
    shape = (x.sort(1).values - torch.special.ndtri(at).unsqueeze(1)).square().mean()
    scale, center = (1 - std).square().mean(), mean.square().mean()
    return VISRegLossComponents(pred + scale + shape + center, pred, scale, shape, center)
