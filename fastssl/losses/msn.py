"""MSN: a masked view's distribution over prototypes is that of the whole view, sharpened."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.distributed import LOCAL, Group, all_reduce_sum, world_size
from fastssl.kernels import sinkhorn
from fastssl.kernels.common import full_precision
from fastssl.losses._checks import check_counts, check_positive, check_temperature, is_finite
from fastssl.losses._loss import Loss
from fastssl.losses.dino import cross_entropies


class MSNLoss(Loss):
    """The cross-entropy with sharpened, evenly used assignments, and the entropy of their mean.

        loss = mean over anchors of CE(q, p) + regularization_weight (log K - H(mean of p))

    p = softmax(a . c / temperature) of an anchor a, q that of its target, divided by
    target_sharpen_temperature too and then used alike by Sinkhorn; a, c and targets have length 1.

    Shapes   anchors (V * B, D): V masked views of B images, view after view; targets (B, D);
             prototypes (K, D); any float dtype, one for all.  No gradient to targets.
    Returns  scalar float32, 0 <= loss.
    Raises   ValueError: shapes that disagree, temperatures not > 0, sinkhorn_iterations < 0, a
             weight that is not finite.
    Ranks    gather_distributed: prototypes are used alike over the targets of all ranks, and the
             mean is that of all ranks' anchors, as many on each; else each rank's own.
    Source   Assran et al. 2022, arXiv:2204.07141, eq. 1 and section 3.
    Differs  from lightly.loss.MSNLoss, whose value and gradient it has in one process: sharpened
             and assigned in the log domain, finite at any temperature; with gather_distributed the
             mean too is over ranks, as in facebookresearch/msn.

    >>> x = torch.eye(2)
    >>> round(MSNLoss(temperature=1e-2)(x, x, x).item(), 4)  # sure, and of both alike
    0.0
    """

    shown = ("temperature", "sinkhorn_iterations", "regularization_weight")

    def __init__(
        self,
        temperature: float = 0.1,
        sinkhorn_iterations: int = 3,
        regularization_weight: float = 1.0,
        gather_distributed: bool = False,
        *,
        process_group: Group = None,
    ) -> None:
        super().__init__(gather_distributed, process_group)
        check_temperature(temperature)
        check_counts(0, sinkhorn_iterations=sinkhorn_iterations)
        if not is_finite(regularization_weight):
            got = regularization_weight
            raise ValueError(f"regularization_weight must be finite, got {got}")
        self.temperature, self.sinkhorn_iterations = temperature, sinkhorn_iterations
        self.regularization_weight = regularization_weight

    def forward(
        self,
        anchors: Tensor,
        targets: Tensor,
        prototypes: Tensor,
        target_sharpen_temperature: float = 0.25,
    ) -> Tensor:
        check_positive(target_sharpen_temperature=target_sharpen_temperature)
        _check_sides(anchors, targets, prototypes)
        with full_precision(anchors.device):
            a, t, c = (
                F.normalize(x if x.dtype == torch.float64 else x.float(), dim=1)
                for x in (anchors, targets.detach(), prototypes)
            )
            scores, aims = a @ c.T, t @ c.detach().T
            sharp = self.temperature * target_sharpen_temperature
            center = None
            if self.sinkhorn_iterations:
                center = sinkhorn(
                    aims,
                    sharp,
                    iterations=self.sinkhorn_iterations,
                    process_group=self.process_group,
                    normalized=True,
                )
            views = scores.chunk(len(a) // len(t))
            pairs = [[1.0]] * len(views)
            temps = self.temperature, sharp
            loss = cross_entropies(views, [aims], center, pairs, temps) / len(views)
            if self.regularization_weight > 0:
                mean = (scores / self.temperature).softmax(1).mean(0)
                group = self.process_group
                if group != LOCAL and world_size(group) > 1:
                    mean = all_reduce_sum(mean, group) / world_size(group)
                loss = loss + self.regularization_weight * self.regularization_loss(mean)
            return loss

    def regularization_loss(self, mean_anchor_probs: Tensor) -> Tensor:
        """log K - H(mean_anchor_probs), of (K,): 0 where all prototypes are used alike."""
        return torch.xlogy(mean_anchor_probs, mean_anchor_probs).sum() + math.log(
            len(mean_anchor_probs)
        )


class PMSNLoss(MSNLoss):
    """MSN whose prototypes are used by a power law: the k-th as k^-power_law_exponent.

    The regularizer is the divergence of the mean from that law, KL(law, mean).
    Shapes, returns and what is raised: MSNLoss; ValueError too for an exponent that is not finite.
    Source   Assran et al. 2022, PMSN, arXiv:2210.07277, as in lightly.loss.PMSNLoss.

    >>> x = torch.eye(2)
    >>> round(PMSNLoss(temperature=1e-2, power_law_exponent=0.0)(x, x, x).item(), 4)
    0.0
    """

    def __init__(
        self,
        temperature: float = 0.1,
        sinkhorn_iterations: int = 3,
        regularization_weight: float = 1,
        power_law_exponent: float = 0.25,
        gather_distributed: bool = False,
        *,
        process_group: Group = None,
    ) -> None:
        super().__init__(
            temperature,
            sinkhorn_iterations,
            regularization_weight,
            gather_distributed,
            process_group=process_group,
        )
        if not is_finite(power_law_exponent):
            raise ValueError(f"power_law_exponent must be finite, got {power_law_exponent}")
        self.power_law_exponent = power_law_exponent

    def regularization_loss(self, mean_anchor_probs: Tensor) -> Tensor:
        """KL(law, mean_anchor_probs), of (K,)."""
        k = torch.arange(1, len(mean_anchor_probs) + 1, device=mean_anchor_probs.device)
        law = k.to(mean_anchor_probs.dtype) ** -self.power_law_exponent
        return F.kl_div(mean_anchor_probs.log(), law / law.sum(), reduction="sum")


class PMSNCustomLoss(MSNLoss):
    """MSN whose prototypes are used as a function says: of the mean (K,), a distribution (K,).

    Shapes, returns and what is raised: MSNLoss.
    Source   Assran et al. 2022, PMSN, arXiv:2210.07277, as in lightly.loss.PMSNCustomLoss.

    >>> x = torch.eye(2)
    >>> round(PMSNCustomLoss(lambda mean: mean * 0 + 0.5, temperature=1e-2)(x, x, x).item(), 4)
    0.0
    """

    def __init__(
        self,
        target_distribution: Callable[[Tensor], Tensor],
        temperature: float = 0.1,
        sinkhorn_iterations: int = 3,
        regularization_weight: float = 1,
        gather_distributed: bool = False,
        *,
        process_group: Group = None,
    ) -> None:
        super().__init__(
            temperature,
            sinkhorn_iterations,
            regularization_weight,
            gather_distributed,
            process_group=process_group,
        )
        self.target_distribution = target_distribution

    def regularization_loss(self, mean_anchor_probs: Tensor) -> Tensor:
        """KL(target_distribution(mean), mean), of (K,)."""
        aim = self.target_distribution(mean_anchor_probs).to(mean_anchor_probs.device)
        return F.kl_div(mean_anchor_probs.log(), aim, reduction="sum")


def _check_sides(anchors: Tensor, targets: Tensor, prototypes: Tensor) -> None:
    sides = {"anchors": anchors, "targets": targets, "prototypes": prototypes}
    for name, x in sides.items():
        if x.ndim != 2 or 0 in x.shape or not x.is_floating_point():
            got = f"{tuple(x.shape)} {x.dtype}"
            raise ValueError(f"{name} must be (N, D), N and D at least 1, floats, got {got}")
        if x.shape[1] != anchors.shape[1] or x.dtype != anchors.dtype or x.device != anchors.device:
            want = f"of {anchors.shape[1]} features, {anchors.dtype} on {anchors.device}"
            raise ValueError(f"{name} must be {want}, got {tuple(x.shape)} {x.dtype} on {x.device}")
    if len(anchors) % len(targets):
        got = f"{len(anchors)} for {len(targets)}"
        raise ValueError(f"anchors must be as many as targets, or a multiple of them, got {got}")
