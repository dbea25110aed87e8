"""LeJEPA and LeWM: a prediction, and embeddings that are to be an isotropic Gaussian."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.distributed import BUILT, Group, all_reduce_sum, require_all_even, world_size
from fastssl.kernels.common import accumulator, full_precision
from fastssl.losses._checks import (
    check_counts,
    check_embeddings,
    check_not_negative,
    check_positive,
    check_within,
)
from fastssl.losses._loss import Loss
from fastssl.losses._slices import Waves, draw_directions


class SIGReg(Loss):
    """How far embeddings are from an isotropic Gaussian, along random directions.

        N integral of |mean_n exp(i t x_n) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt

    over t in [-t_max, t_max] by the trapezoidal rule, `knots` of them at t >= 0; x_n = z_n . a for
    num_vectors directions a of length one, of which the mean is taken.  The formula is
    `sigreg_reference`.

    Shapes   proj (..., N, D), any float dtype: sets of N samples, each judged by itself.
    Returns  scalar float32, 0 <= loss: the mean over sets and directions.
    State    none.  Directions are drawn from torch's default generator, at every call anew.
    Memory   two sums a set, direction and knot, and one chunk, each way.
    Raises   ValueError: no (..., N, D) of floats, or other shapes on other ranks; knots below 2, a
             num_vectors below 1, a t_max not > 0.
    Ranks    the samples of a set are those of all ranks, along the first rank's directions; the
             mean over ranks of value and gradient is the joined batch's.
             gather_distributed=False: each rank its own, along directions of its own.
    Source   Balestriero & LeCun 2025, LeJEPA, arXiv:2511.08544, algorithm 1: the Epps-Pulley test.
    Differs  from lightly.loss.SIGReg, whose value and gradient it has in one process under the same
             seed: gathers by default, and works in float32 for 16-bit inputs.

    >>> alike = torch.zeros(4, 3)  # sum over knots of (1 - phi)^2 phi dt, times 4
    >>> round(SIGReg()(alike).item(), 4)
    1.6082
    """

    shown = ("gather_distributed",)
    t: Tensor
    phi: Tensor
    weights: Tensor

    def __init__(
        self,
        *,
        knots: int = 17,
        t_max: float = 3.0,
        num_vectors: int = 1024,
        gather_distributed: bool = BUILT,
        process_group: Group = None,
    ) -> None:
        super().__init__(gather_distributed, process_group)
        check_counts(2, knots=knots)
        check_counts(num_vectors=num_vectors)
        check_positive(t_max=t_max)
        self.num_vectors, self.step = num_vectors, t_max / (knots - 1)
        t, phi, weights = _knots(knots, t_max)
        self.register_buffer("t", t)
        self.register_buffer("phi", phi)
        self.register_buffer("weights", weights)

    def forward(self, proj: Tensor) -> Tensor:
        require_all_even(self.process_group, proj=proj)
        check_embeddings("..., N, D", proj=proj)
        return self.of(proj)

    def of(self, *sets: Tensor) -> Tensor:
        """The loss of sets (..., N, D) of as many samples, checked, along the same directions."""
        group, first = self.process_group, sets[0]
        with full_precision(first.device):
            a = draw_directions(first, self.num_vectors, group)
            flat = [z.reshape(-1, *z.shape[-2:]) for z in sets]
            K = len(self.t) - 1  # at t = 0 nothing differs
            sums = torch.cat([Waves.call(z, a, self.step, K) for z in flat], 1)
            n = first.shape[-2] * world_size(group)
            cos, sin = all_reduce_sum(sums, group) / n
            phi, weights = (x[1:].to(sums.dtype) for x in (self.phi, self.weights))
            return (((cos - phi).square() + sin.square()) @ weights).mean() * n


def _knots(knots: int, t_max: float) -> tuple[Tensor, Tensor, Tensor]:
    """Where the integral is taken, the Gaussian's value there, and both halves' weights."""
    t = torch.linspace(0, t_max, knots)
    phi = (-t.square() / 2).exp()
    weights = torch.full_like(t, 2 * t_max / (knots - 1))
    weights[[0, -1]] /= 2
    return t, phi, weights * phi


class LeJEPALoss(Loss):
    """Views near the mean of their image's global ones, and all of them an isotropic Gaussian.

        loss = lambda_param SIGReg(all) + (1 - lambda_param) mean of (view - mean of globals)^2

    Shapes   local_proj (L, N, D), global_proj (G, N, D): views of the same N images; any float
             dtype, one for both.  L and G at least 1.
    Returns  scalar float32, 0 <= loss.
    Raises   ValueError: other shapes, dtypes or devices, or other ones on another rank; a
             lambda_param outside [0, 1]; what SIGReg refuses.
    Ranks    as SIGReg; the second term has no collective.
    Source   Balestriero & LeCun 2025, LeJEPA, arXiv:2511.08544.
    Differs  from lightly.loss.LeJEPALoss as SIGReg does: gathers by default.

    >>> z = torch.zeros(1, 4, 3)
    >>> round(LeJEPALoss(0.25)(local_proj=z, global_proj=z).item(), 4)  # a quarter of SIGReg's
    0.402
    """

    shown = ("lambda_param",)

    def __init__(
        self,
        lambda_param: float = 0.05,
        gather_distributed: bool = BUILT,
        sigreg_knots: int = 17,
        sigreg_t_max: float = 3.0,
        sigreg_num_vectors: int = 1024,
        *,
        process_group: Group = None,
    ) -> None:
        super().__init__(gather_distributed, process_group)
        check_within(0, 1, lambda_param=lambda_param)
        self.lambda_param = lambda_param
        self.sigreg = _sigreg(self, sigreg_knots, sigreg_t_max, sigreg_num_vectors)

    def forward(self, *, local_proj: Tensor, global_proj: Tensor) -> Tensor:
        check_views(self.process_group, local_proj, global_proj)
        apart = spread_of_views(local_proj, global_proj)
        return (
            self.lambda_param * self.sigreg.of(global_proj, local_proj)
            + (1 - self.lambda_param) * apart
        )


class LeWMLoss(Loss):
    """The next frames' embeddings predicted, and all embeddings an isotropic Gaussian.

        loss = mean of (predicted - target)^2 + lambda_param SIGReg(embeddings by frame)

    Shapes   predicted, target (B, T', D): of the same frames, mostly T' = T - 1; embeddings
             (B, T, D) of all frames: the B clips are the samples, at each frame by itself.  Any
             float dtype.  normalize: the first term is of layer-normed features.
    Returns  scalar float32, 0 <= loss.  No gradient to target.
    Raises   ValueError: other shapes, dtypes or devices, or other ones on another rank; a
             lambda_param < 0; what SIGReg refuses.
    Ranks    as SIGReg; the first term has no collective.
    Source   LeWorldModel 2026, arXiv:2603.19312.
    Differs  from lightly.loss.LeWMLoss as SIGReg does: gathers by default; dtypes must agree.

    >>> z = torch.zeros(4, 2, 3)
    >>> round(LeWMLoss(1.0)(predicted=z[:, :1] + 2, target=z[:, 1:], embeddings=z).item(), 4)
    5.6082
    """

    shown = ("lambda_param", "normalize")

    def __init__(
        self,
        lambda_param: float = 0.1,
        normalize: bool = False,
        gather_distributed: bool = BUILT,
        sigreg_knots: int = 17,
        sigreg_t_max: float = 3.0,
        sigreg_num_vectors: int = 1024,
        *,
        process_group: Group = None,
    ) -> None:
        super().__init__(gather_distributed, process_group)
        check_not_negative(lambda_param=lambda_param)
        self.lambda_param, self.normalize = lambda_param, normalize
        self.sigreg = _sigreg(self, sigreg_knots, sigreg_t_max, sigreg_num_vectors)

    def forward(self, *, predicted: Tensor, target: Tensor, embeddings: Tensor) -> Tensor:
        require_all_even(
            self.process_group, predicted=predicted, target=target, embeddings=embeddings
        )
        check_embeddings("B, T, D", predicted=predicted, target=target)
        check_embeddings("B, T, D", embeddings=embeddings)
        sides = [(len(x), x.shape[2], x.dtype, x.device) for x in (embeddings, predicted)]
        if sides[0] != sides[1]:
            got = f"{tuple(embeddings.shape)} {embeddings.dtype} on {embeddings.device}"
            want = f"{len(predicted)} clips of {predicted.shape[2]} features as predicted"
            raise ValueError(f"embeddings must have {want}, dtype and device too, got {got}")
        acc = accumulator(predicted.dtype)
        with full_precision(predicted.device):
            p, t = predicted.to(acc), target.detach().to(acc)
            if self.normalize:
                p, t = (F.layer_norm(x, x.shape[-1:]) for x in (p, t))
            apart = F.mse_loss(p, t)
        return apart + self.lambda_param * self.sigreg.of(embeddings.transpose(0, 1))


def _sigreg(loss: Loss, knots: int, t_max: float, num_vectors: int) -> SIGReg:
    """Refuses by the names that the arguments have there."""
    check_counts(2, sigreg_knots=knots)
    check_counts(sigreg_num_vectors=num_vectors)
    check_positive(sigreg_t_max=t_max)
    return SIGReg(
        knots=knots,
        t_max=t_max,
        num_vectors=num_vectors,
        process_group=loss.process_group,
    )


def check_views(group: Group, local_proj: Tensor, global_proj: Tensor) -> None:
    """Refuse what are not (V, N, D) views of the same images, on every rank alike."""
    require_all_even(group, local_proj=local_proj, global_proj=global_proj)
    check_embeddings("V, N, D", local_proj=local_proj)
    check_embeddings("V, N, D", global_proj=global_proj)
    sides = [(x.shape[1:], x.dtype, x.device) for x in (local_proj, global_proj)]
    if sides[0] != sides[1]:
        got = " and ".join(f"{tuple(x[0])} {x[1]} on {x[2]}" for x in sides)
        raise ValueError(
            f"local_proj and global_proj must share images, features, dtype and device, got {got}"
        )


def spread_of_views(local_proj: Tensor, global_proj: Tensor) -> Tensor:
    """The mean over all views of (view - mean of the global ones)^2."""
    acc = accumulator(global_proj.dtype)
    with full_precision(global_proj.device):
        mean = global_proj.mean(0, dtype=acc)
        terms = [
            F.mse_loss(z.to(acc), mean.expand_as(z), reduction="sum")
            for z in (global_proj, local_proj)
        ]
        return (terms[0] + terms[1]) / (global_proj.numel() + local_proj.numel())


def sigreg_reference(
    proj: Tensor, directions: Tensor, knots: int = 17, t_max: float = 3.0
) -> Tensor:
    """The formula in one process, with all (..., N, S, knots) angles; directions (D, S)."""
    t, phi, weights = (x.to(proj) for x in _knots(knots, t_max))
    angles = (proj @ directions).unsqueeze(-1) * t
    error = (angles.cos().mean(-3) - phi).square() + angles.sin().mean(-3).square()
    return (error @ weights).mean() * proj.shape[-2]
