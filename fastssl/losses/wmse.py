"""W-MSE: views that agree once their batch is whitened."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.distributed import Group, all_reduce_sum, require_even, world_size
from fastssl.kernels.common import FirstOrder, accumulator, finished, first_order, full_precision
from fastssl.losses._checks import check_counts, check_within
from fastssl.losses._loss import Loss


def norm_mse_loss(x0: Tensor, x1: Tensor) -> Tensor:
    """2 - 2 cos(x0, x1) along the last dimension, averaged: |u0 - u1|^2 of rows of length one."""
    return 2 - 2 * (F.normalize(x0, dim=-1) * F.normalize(x1, dim=-1)).sum(-1).mean()


class Whitening2d(nn.Module):
    """Rows less their mean, by the inverse Cholesky factor of their covariance.

        y = L^-1 (x - mean),   L L^T = (1 - eps) cov(x) + eps I

    Shapes   x (N, num_features), any float dtype; y likewise, its covariance I at eps = 0.  In eval
             mode mean and covariance are the running ones.
    State    running_mean (1, num_features, 1, 1) and running_variance (num_features, num_features),
             in state_dict, if track_running_stats: each training batch moves them by momentum.
    Raises   ValueError: another width, one row in training, num_features below 1, momentum or eps
             outside of 0..1.  A covariance that is not positive definite, of too few rows or of
             features that depend on each other, gives nan.
    Ranks    each rank's rows are whitened by themselves; the running statistics move by the mean of
             the ranks'.
    Source   Ermolov et al. 2021, W-MSE, arXiv:2007.06346, eq. 4.
    Differs  from lightly.loss.Whitening2d, whose values, gradients and state it has: that raises
             for such a covariance, for which a GPU has to be waited for; sums in float32 whatever
             the dtype, and returns x's.

    >>> y = Whitening2d(1)(torch.tensor([[1.0], [3.0]]))  # by the root of the variance, 2
    >>> y.flatten().tolist()
    [-0.7071067690849304, 0.7071067690849304]
    """

    running_mean: Tensor
    running_variance: Tensor

    def __init__(
        self,
        num_features: int,
        momentum: float = 0.01,
        track_running_stats: bool = True,
        eps: float = 0,
        *,
        process_group: Group = None,
    ) -> None:
        super().__init__()
        check_counts(num_features=num_features)
        check_within(0, 1, momentum=momentum, eps=eps)
        self.num_features, self.momentum, self.eps = num_features, momentum, eps
        self.track_running_stats, self.process_group = track_running_stats, process_group
        if track_running_stats:
            self.register_buffer("running_mean", torch.zeros(1, num_features, 1, 1))
            self.register_buffer("running_variance", torch.eye(num_features))

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 2 or x.shape[1] != self.num_features or not x.is_floating_point():
            want = f"(N, {self.num_features}) and floating-point"
            raise ValueError(f"x must be {want}, got {tuple(x.shape)} {x.dtype}")
        return self.whiten(x.unsqueeze(0)).squeeze(0)

    def whiten(self, x: Tensor) -> Tensor:
        """Each of S batches x (S, N, num_features) by itself, one after the other."""
        S, N, D = x.shape
        running = self.track_running_stats and not self.training
        if not running and N < 2:
            raise ValueError(f"x must have at least 2 rows, got {N}")
        with full_precision(x.device):
            wide = x.to(accumulator(x.dtype))
            if running:
                c = wide - self.running_mean.view(D)
                factor = _cholesky(self._shrunk(self.running_variance.to(wide)))
                return _by(factor, c).to(x.dtype)
            y, mean, covariance = _Whiten.call(wide, self.eps)
            if self.track_running_stats:
                self._move(mean, covariance)
            return y.to(x.dtype)

    def _shrunk(self, covariance: Tensor) -> Tensor:
        return _shrunk(covariance, self.eps)

    @torch.no_grad()
    def _move(self, mean: Tensor, covariance: Tensor) -> None:
        """One step of the running statistics for each of S batches."""
        W = world_size(self.process_group)
        for name, now in (("running_mean", mean), ("running_variance", covariance)):
            kept, m = getattr(self, name), self.momentum
            share = m * (1 - m) ** torch.arange(len(now) - 1, -1, -1, device=now.device)
            step = torch.tensordot(share.to(now), now, 1)
            step = all_reduce_sum(step, self.process_group) / W
            moved = kept * (1 - m) ** len(now) + step.view_as(kept)
            kept.copy_(moved)


def _shrunk(covariance: Tensor, eps: float) -> Tensor:
    if not eps:
        return covariance
    shrunk = covariance * (1 - eps)
    shrunk.diagonal(dim1=-2, dim2=-1).add_(eps)
    return shrunk


def _cholesky(matrix: Tensor) -> Tensor:
    """The lower factor; nan where there is none."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return factor.masked_fill((failed != 0)[..., None, None], torch.nan)


def _by(factor: Tensor, c: Tensor) -> Tensor:
    """c L^-T."""
    return torch.linalg.solve_triangular(factor.mT, c, upper=True, left=False)


class _Whiten(FirstOrder):
    """y = c L^-T of c = x - mean, L L^T = (1 - eps) c^T c / (N - 1) + eps I; x (S, N, D).

    With g = dy, and T = tril(g^T y) made symmetric from below its diagonal:
    dc = (g - (1 - eps) / (N - 1) y T) L^-1, of which the mean is taken away.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        mean = x.mean(1, keepdim=True)
        c = x - mean
        covariance = (c.mT @ c).div_(x.shape[1] - 1)
        factor = _cholesky(_shrunk(covariance, eps))
        y = finished(_by(factor, c))
        ctx.save_for_backward(y, factor)
        ctx.rate = (1 - eps) / (x.shape[1] - 1)
        mean = mean.squeeze(1)
        ctx.mark_non_differentiable(mean, covariance)
        return y, mean, covariance

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor, None]:
        y, factor = ctx.saved_tensors
        lower = (g.mT @ y).tril_()
        T = lower + lower.tril(-1).mT
        dc = torch.baddbmm(g, y, T, alpha=-ctx.rate)
        dc = torch.linalg.solve_triangular(factor, dc, upper=False, left=False)
        return dc - dc.mean(1, keepdim=True), None


class WMSELoss(Loss):
    """The distance of an image's views, each view whitened over sub-batches of w_size images.

    The sub-batches are drawn anew by torch.randperm, of the CPU's generator, w_iter times; the loss
    is the mean over draws and pairs of views of loss_fn, of the whitened views (B, D) in order.

    Shapes   input (num_samples B, embedding_dim): num_samples views of B images, view after view;
             B a multiple of w_size; any float dtype.
             loss_fn: of two (B, D), a scalar; by default `norm_mse_loss`.
    Returns  scalar float32; of two views whitened alike 0 <= loss <= 4.
    State    whitening: a Whitening2d.
    Memory   all sub-batches of all views are whitened at once; kept are they and a factor each.
    Raises   ValueError: another shape, or another one on another rank; B that is not a multiple of
             w_size; w_size below 2 embedding_dim; numbers out of range.
    Ranks    sub-batches are of each rank's own rows: the mean over ranks of value and gradient is
             the joined batch's with those sub-batches.
    Source   Ermolov et al. 2021, arXiv:2007.06346, eq. 3 and section 3.1.
    Differs  from lightly.loss.WMSELoss, whose value, gradient, draws and state it has: what lightly
             refuses by a RuntimeError is a ValueError; Whitening2d as there.

    >>> z = torch.randn(16, 2)
    >>> round(WMSELoss(2, w_size=8)(torch.cat([z[:8], 2 * z[:8] + 1])).item(), 4)  # alike, whitened
    0.0
    """

    shown = ("w_iter", "w_size", "num_samples")

    def __init__(
        self,
        embedding_dim: int = 128,
        momentum: float = 0.01,
        eps: float = 0.0,
        track_running_stats: bool = True,
        w_iter: int = 1,
        w_size: int = 256,
        loss_fn: Callable[[Tensor, Tensor], Tensor] = norm_mse_loss,
        num_samples: int = 2,
        *,
        process_group: Group = None,
    ) -> None:
        super().__init__(process_group=process_group)
        check_counts(embedding_dim=embedding_dim, w_iter=w_iter)
        check_counts(2, num_samples=num_samples)
        check_counts(2 * embedding_dim, w_size=w_size)
        stats = momentum, track_running_stats, eps
        self.whitening = Whitening2d(embedding_dim, *stats, process_group=process_group)
        self.w_iter, self.w_size, self.num_samples = w_iter, w_size, num_samples
        self.loss_f = loss_fn
        self.num_pairs = num_samples * (num_samples - 1) // 2

    def forward(self, input: Tensor) -> Tensor:
        require_even(input, self.process_group, "input")
        V, D, w = self.num_samples, self.whitening.num_features, self.w_size
        if input.ndim != 2 or input.shape[1] != D or not input.is_floating_point():
            got = f"{tuple(input.shape)} {input.dtype}"
            raise ValueError(f"input must be (N, {D}) and floating-point, got {got}")
        B = len(input) // V
        if len(input) % (V * w) or not B:
            want = f"a multiple of num_samples x w_size, {V} x {w}"
            raise ValueError(f"input must have {want}, rows, got {len(input)}")
        with full_precision(input.device):
            views = input.to(accumulator(input.dtype)).view(V, B, D)
            total = torch.stack([self._drawn(views) for _ in range(self.w_iter)]).sum()
        return total / (self.w_iter * self.num_pairs)

    def _drawn(self, views: Tensor) -> Tensor:
        """The sum over pairs of views (V, B, D), whitened in new sub-batches."""
        V, B, D = views.shape
        order, parts = torch.randperm(B, device="cpu").to(views.device), B // self.w_size
        if parts > 1:  # one has the same rows in any order
            views = views[:, order].view(V, parts, self.w_size, D)
            views = views.transpose(0, 1)  # one sub-batch after the other, its views in turn
        z = self.whitening.whiten(views.reshape(-1, self.w_size, D))
        if parts > 1:
            z = z.view(parts, V, self.w_size, D).transpose(0, 1).reshape(V, B, D)
            z = z[:, order.argsort()]
        pairs = [self.loss_f(z[i], z[j]) for i in range(V - 1) for j in range(i + 1, V)]
        return torch.stack(pairs).sum()


def whitening_reference(x: Tensor, eps: float = 0.0) -> Tensor:
    """The formula by the inverse of the factor; x (N, D)."""
    c = x - x.mean(0)
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    factor = torch.linalg.cholesky((1 - eps) * (c.T @ c) / (len(x) - 1) + eps * eye)
    return c @ torch.linalg.inv(factor).T
