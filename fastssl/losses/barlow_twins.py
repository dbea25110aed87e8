"""Barlow Twins and Mixed Barlow Twins over the correlation primitives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastssl.distributed import BUILT, Group
from fastssl.kernels import cross_correlation, mixed_correlation, standardize
from fastssl.kernels.common import ahead
from fastssl.losses import _ahead
from fastssl.losses._checks import check_batch, check_not_negative
from fastssl.losses._loss import Loss
from fastssl.losses._moments import widen


class BarlowTwinsLoss(Loss):
    """The cross-correlation of two views' embeddings should be the identity.

    The formula is `barlow_twins_reference`, times `scale`.

    Shapes   z_a, z_b (B, D): the two views of the same B images, row by row; any float dtype.
    Options  scale: solo-learn multiplies by 0.025 (its lambda, and the official one: 0.0051).
             unbiased: standardize by the unbiased variance, as mix-bt does, whose perfect C_ii is
             then (N - 1) / N.  eps: added to the variance.  The attribute `plan` is "auto", or
             the plan of `fastssl.kernels.cross_correlation` to take.
    Returns  scalar float32, 0 <= loss up to rounding; the same on every rank.  No D x D matrix is
             made when N < 0.75 D: see `fastssl.kernels.cross_correlation`.
    Raises   ValueError: other shapes, dtypes or devices, or other ones on another rank; fewer than
             2 images in the joined batch; lambda_param, scale or eps < 0 or not finite.
    Ranks    statistics and correlations are the joined batch's: so are the value, and the mean over
             ranks of the gradient.  gather_distributed=False: each rank's batch alone, as in the
             official code without SyncBatchNorm.  C then has the noise of B rows, not of W B, so
             the off-diagonal sum is too large by about D^2 (1/B - 1/(W B)), and the gradient pushes
             against correlations that the joined batch has not.
    16 bits  On CUDA the standardized rows are rounded to z's dtype and multiplied so, summed in
             float32; elsewhere they are float32.  The gradient errs by less than under autocast
             (`python -m fastssl.bench.precision`); float32 views have float32 products.
    Edges    A constant column stays finite: it becomes zeros, and adds (1 - 0)^2.
    On a CPU in one process the gradient is made with the loss, and backward only multiplies.
    Source   Zbontar et al. 2021, Barlow Twins, arXiv:2103.03230, eq. 1 and algorithm 1.
    Differs  from lightly.loss.BarlowTwinsLoss, whose value and gradient it has in one process:
             gathers by default, and across ranks its statistics are the joined batch's, where
             lightly standardizes per rank and then averages C.

    >>> z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    >>> round(BarlowTwinsLoss()(z, z).item(), 4), round(BarlowTwinsLoss()(z, -z).item(), 3)
    (0.0, 8.0)
    """

    plan = "auto"
    shown = ("lambda_param", "gather_distributed")

    def __init__(
        self,
        lambda_param: float = 5e-3,
        gather_distributed: bool = BUILT,
        *,
        scale: float = 1.0,
        unbiased: bool = False,
        eps: float = 1e-5,
        process_group: Group = None,
    ) -> None:
        super().__init__(gather_distributed, process_group)
        check_not_negative(lambda_param=lambda_param, scale=scale, eps=eps)
        self.lambda_param, self.scale = lambda_param, scale
        self.unbiased, self.eps = unbiased, eps

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        group, plain = self.process_group, self.plan == "auto" and self.eps > 0
        if plain and _ahead.fits(group, z_a, z_b, least=2):
            return ahead(self._alone, z_a, z_b)
        n = check_batch(group, least=2, z_a=z_a, z_b=z_b)
        a, b = (self._standardize(z) for z in (z_a, z_b))
        C = cross_correlation(a, b, plan=self.plan, process_group=group)
        return self._weigh(C.diagonal, C.off_diagonal_sq, n)

    def _alone(self, views: Sequence[Tensor], need: Sequence[bool]) -> _ahead.Gradients:
        """Value and gradients of one process.

        With y = c / deviation the gradient to c is (dy - y mean(y dy)) / deviation; nothing goes
        through the mean, as the columns of dy sum to zero when those of y do.
        """
        c = _ahead.centered(views)
        n = c.shape[1] - self.unbiased
        total = c.square().sum(1, keepdim=True).div_(n).add_(self.eps)
        inverse = total.rsqrt().add_(total, alpha=0)  # nan of an infinite variance
        by = self._by_features if _ahead.has_few_features(views[0]) else self._by_rows
        return by(c, inverse, n)

    def _by_features(self, c: Tensor, inverse: Tensor, n: int) -> _ahead.Gradients:
        """Through the D x D correlations C of centered views c (2, N, D), inverse (2, 1, D)."""
        (a, b), (inverse_a, inverse_b), N = c.unbind(), inverse.unbind(), c.shape[1]
        scales = inverse_a.T * inverse_b
        C = torch.addmm(c[0, 0, 0], a.T, b, beta=0, alpha=1 / N).mul_(scales)
        diagonal = C.diagonal()
        gap = diagonal - 1
        own = gap * diagonal
        diagonal.zero_()
        squares = C.square()
        others = torch.stack([squares.sum(1), squares.sum(0)])
        value = _ahead.square(gap).add_(others[0].sum(), alpha=self.lambda_param).mul_(self.scale)
        own = others.mul_(self.lambda_param).add_(own).mul_(-2 * self.scale / n)  # - y dy
        own = inverse.square_().squeeze(1).mul_(own)
        C.mul_(self.lambda_param)
        diagonal.copy_(gap)
        C.mul_(scales)
        options = {"beta": 0, "alpha": 2 * self.scale / N}
        da = torch.addmm(value, b, C.T, **options).addcmul_(a, own[0])
        return value, (da, torch.addmm(value, a, C, **options).addcmul_(b, own[1]))

    def _by_rows(self, c: Tensor, inverse: Tensor, n: int) -> _ahead.Gradients:
        """The same through the N x N products of rows: |C|^2 is the sum of both views' products."""
        y, N = c.mul_(inverse), c.shape[1]
        (a, b), (gram_a, gram_b) = y.unbind(), torch.bmm(y, y.mT).unbind()
        diagonal = (a * b).sum(0).div_(N)
        gap = diagonal - 1
        off = (gram_a * gram_b).sum().div_(N * N).sub_(_ahead.square(diagonal))
        value = _ahead.square(gap).add_(off, alpha=self.lambda_param).mul_(self.scale)
        gap.sub_(diagonal, alpha=self.lambda_param).mul_(2 * self.scale / N)
        weight = 2 * self.scale * self.lambda_param / N**2
        gradients = []
        for mine, other, gram, scale in zip((a, b), (b, a), (gram_b, gram_a), inverse, strict=True):
            dy = torch.addmm(value, gram, mine, beta=0, alpha=weight).addcmul_(other, gap)
            own = (dy * mine).sum(0).div_(n)
            gradients.append(dy.addcmul_(mine, own, value=-1).mul_(scale))
        return value, gradients

    def _standardize(self, z: Tensor) -> Tensor:
        options = {"unbiased": self.unbiased, "process_group": self.process_group}
        return standardize(widen(z), eps=self.eps, **options)

    def _weigh(self, diagonal: Tensor, off_diagonal_sq: Tensor, n: int) -> Tensor:
        """The loss of a cross-correlation summed over n rows."""
        on_diagonal = (diagonal * (1 / n) - 1).square().sum()
        loss = torch.add(on_diagonal, off_diagonal_sq, alpha=self.lambda_param / n**2)
        return loss if self.scale == 1 else self.scale * loss


class MixedBarlowTwinsLoss(BarlowTwinsLoss):
    """Barlow Twins, and mixed images should have mixed embeddings.

    The formula is `mixed_barlow_twins_reference`, times `scale`: the authors' distance between the
    cross-correlations of the mixed embeddings with either view's and the mixtures of the views'
    own, in two products for their seven.

    Shapes   z_a, z_b, z_m (B, D): embeddings of two views of the same images and of the mixture.
             perm (B,) int64: which row of this rank's z_b each image was mixed with.  alpha: a
             number, or a 0-d or (B, 1) tensor.
    Options  mixup: the weight of the regularizer, their s; the others as in BarlowTwinsLoss.  The
             authors' lambda is 0.0078125 at D = 1024 and their variance unbiased (unbiased=True).
    Returns  scalar float32; the same on every rank.  By Grams 1.5 times the products of Barlow
             Twins (`fastssl.kernels.mixed_correlation`).
    Raises   as BarlowTwinsLoss; ValueError for a perm that is not (B,) int64, mixup < 0, and an
             alpha, given as a number, outside of [0, 1].
    Ranks    as BarlowTwinsLoss: mixing is within a rank, statistics are the joined batch's.
    Source   Bandara et al. 2023, Guarding Barlow Twins Against Overfitting with Mixed Samples,
             arXiv:2312.02151, section 3.2.

    >>> z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    >>> perm = torch.tensor([1, 0, 3, 2])
    >>> loss = MixedBarlowTwinsLoss()
    >>> round(loss(z, z, z, perm, 1.0).item(), 4)  # not mixed at all
    0.0
    >>> round(loss(z, z, z.flip(1), perm, 1.0).item(), 4)  # 5 * 0.005 * (2 * 4)
    0.2
    """

    def __init__(self, lambda_param: float = 5e-3, mixup: float = 5.0, **options: Any) -> None:
        super().__init__(lambda_param, **options)
        check_not_negative(mixup=mixup)
        self.mixup = mixup

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, z_a: Tensor, z_b: Tensor, z_m: Tensor, perm: Tensor, alpha: float | Tensor
    ) -> Tensor:
        n = check_batch(self.process_group, least=2, z_a=z_a, z_b=z_b, z_m=z_m)
        if perm.shape != z_a.shape[:1] or perm.dtype != torch.int64:
            got = f"{tuple(perm.shape)} {perm.dtype}"
            raise ValueError(f"perm must be ({len(z_a)},) int64, got {got}")
        if not isinstance(alpha, Tensor) and not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be within [0, 1], got {alpha}")
        a, b, m = (self._standardize(z) for z in (z_a, z_b, z_m))
        r = m - alpha * a - (1 - alpha) * b[perm]
        terms = mixed_correlation(a, b, r, plan=self.plan, process_group=self.process_group)
        weight = self.scale * self.mixup * self.lambda_param / n**2
        return self._weigh(terms.diagonal, terms.off_diagonal_sq, n) + weight * terms.residual_sq


def barlow_twins_reference(
    z_a: Tensor, z_b: Tensor, lambda_param: float, unbiased: bool = False, eps: float = 1e-5
) -> Tensor:
    """The formula by the whole matrix C (D, D), in one process; scale 1."""
    a, b = (_standardize_reference(z, unbiased, eps) for z in (z_a, z_b))
    C = a.T @ b / len(a)
    off_diagonal = C - C.diagonal().diag()
    return (1 - C.diagonal()).square().sum() + lambda_param * off_diagonal.square().sum()


def mixed_barlow_twins_reference(
    z_a: Tensor,
    z_b: Tensor,
    z_m: Tensor,
    perm: Tensor,
    alpha: float | Tensor,
    lambda_param: float,
    mixup: float,
    unbiased: bool = False,
) -> Tensor:
    """The formula by whole matrices (D, D), in one process; scale 1."""
    a, b, m = (_standardize_reference(z, unbiased, 1e-5) for z in (z_a, z_b, z_m))
    R = m - alpha * a - (1 - alpha) * b[perm]
    extra = ((R.T @ a).square().sum() + (R.T @ b).square().sum()) / len(a) ** 2
    plain = barlow_twins_reference(z_a, z_b, lambda_param, unbiased)
    return plain + mixup * lambda_param * extra


def _standardize_reference(z: Tensor, unbiased: bool, eps: float) -> Tensor:
    return (z - z.mean(0)) / (z.var(0, correction=int(unbiased)) + eps).sqrt()
