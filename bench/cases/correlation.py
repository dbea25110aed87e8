"""The losses of correlations, beside the formula as written, the authors' own and lightly's.

B images, D features.  Floors as in losses.py: least products, inputs read and results written once.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.bench.cases.losses import two_views
from fastssl.bench.cases.rivals import beside, library, nbytes
from fastssl.bench.registry import Problem, Shape, Sweep, case, grid, shapes_of
from fastssl.kernels import cross_correlation, mixed_correlation, standardize
from fastssl.losses import BarlowTwinsLoss, MixedBarlowTwinsLoss, VICRegLoss

_LAMBDA, _MIXUP, _ALPHA = 5e-3, 5.0, 0.3
_SHAPES = shapes_of(
    "B D",
    quick=[(128, 512), (256, 1024)],
    cpu=[(64, 64), (256, 2048), (2048, 1024), (256, 8192), (1024, 8192)],
    cuda=[(256, 8192), (2048, 8192), (8192, 2048), (2048, 65536)],
) | {"grid": grid(16384)}
_SWEEPS = {
    "quick": [Sweep("B", (32, 64, 128), {"D": 256})],
    "cpu": [
        Sweep("B", (64, 256, 1024, 4096, 8192), {"D": 64}),
        Sweep("B", (64, 128, 256, 512, 1024, 2048, 4096, 8192), {"D": 1024}),
        Sweep("D", (64, 128, 256, 512, 1024, 2048, 4096), {"B": 256}),
    ],
    "cuda": [
        Sweep("B", (256, 512, 1024, 2048, 4096, 8192), {"D": 8192}),
        Sweep("D", (1024, 2048, 4096, 8192, 16384, 32768), {"B": 1024}),
    ],
}
_register = partial(
    case,
    shapes=_SHAPES,
    sweeps=_SWEEPS,
    gate_shape={"D": 2048},
    gpu_gate_shape={"D": 8192},
    dtypes=("float32", "bfloat16"),  # in float16 the formula as written overflows
)


@_register("barlow-twins", test="tests/losses/test_barlow_twins.py")
def barlow_twins(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """Barlow Twins: the cross-correlation of two views becomes the identity.

    Products: the D x D correlation is 2 B D^2 flops and its gradients 4 B D^2; the two symmetric
    B x B Gram matrices, half of each, 2 B^2 D and 4 B^2 D for the same number.  The floor has the
    cheaper: 2 B D min(B, D) and twice that.
    """
    inputs = two_views(shape, dtype, device)
    rivals = beside(BarlowTwinsLoss(_LAMBDA), barlow_reference)
    rivals["barlow authors"] = barlow_authors
    rivals["lightly"] = library("lightly.loss", lambda m: m.BarlowTwinsLoss(_LAMBDA))
    return _problem(shape, inputs, rivals, 2.0)


def barlow_reference(z_a: Tensor, z_b: Tensor) -> Tensor:
    """Barlow Twins' equation 1 with the D x D correlation, in the dtype it is given."""
    a, b = (standardize(z, eps=1e-5, impl="reference") for z in (z_a, z_b))
    diagonal, off_diagonal = cross_correlation(a, b, impl="reference")
    return (1 - diagonal / len(a)).square().sum() + _LAMBDA * off_diagonal / len(a) ** 2


def barlow_authors(z_a: Tensor, z_b: Tensor) -> Tensor:
    """As facebookresearch/barlowtwins has it: batch norm, the correlation, its off-diagonal copied.

    Without the diagonal a flat D x D matrix less its last element is D - 1 rows of D + 1, each led
    by a diagonal element.
    """
    a, b = (F.batch_norm(z, None, None, training=True) for z in (z_a, z_b))
    c, d = (a.T @ b).div_(len(a)), a.shape[1]
    off_diagonal = c.flatten()[:-1].view(d - 1, d + 1)[:, 1:].flatten()
    on_diagonal = torch.diagonal(c) - 1
    return on_diagonal.pow(2).sum() + _LAMBDA * off_diagonal.pow(2).sum()


def _problem(shape: Shape, inputs: tuple[Tensor, ...], rivals: dict, units: float) -> Problem:
    """units: of B D min(B, D) operations that the forward's products take; backward twice that."""
    product = units * shape["B"] * shape["D"] * min(shape["B"], shape["D"])
    leaves = [x for x in inputs if x.requires_grad]
    return Problem(
        inputs=inputs,
        rivals=rivals,
        flops={"fwd": product, "bwd": 2 * product},
        bytes_moved={"fwd": nbytes(*inputs) + 4, "bwd": nbytes(*inputs) + nbytes(*leaves)},
        items=(shape["B"], "images"),
    )


@_register("mixed-barlow-twins", test="tests/losses/test_barlow_twins.py")
def mixed_barlow_twins(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """Mixed Barlow Twins: and mixed images have mixed embeddings.

    Products: three symmetric Grams for the two of Barlow Twins, and half as many gradients more.
    """
    z_a, z_b = two_views(shape, dtype, device)
    perm = torch.randperm(shape["B"], device=device)
    mixed = _ALPHA * z_a.detach() + (1 - _ALPHA) * z_b.detach()[perm]
    z_m = (mixed + 0.4 * torch.randn_like(mixed)).requires_grad_()
    loss = MixedBarlowTwinsLoss(_LAMBDA, _MIXUP)
    rivals = beside(partial(_mixed_ours, loss), mixed_reference)
    rivals["mix-bt authors"] = mixed_authors
    return _problem(shape, (z_a, z_b, z_m, perm), rivals, 3.0)


def _mixed_ours(loss, z_a: Tensor, z_b: Tensor, z_m: Tensor, perm: Tensor) -> Tensor:
    return loss(z_a, z_b, z_m, perm, _ALPHA)


def mixed_reference(z_a: Tensor, z_b: Tensor, z_m: Tensor, perm: Tensor) -> Tensor:
    """The formula in D x D matrices, in the dtype it is given."""
    a, b, m = (standardize(z, eps=1e-5, impl="reference") for z in (z_a, z_b, z_m))
    r, n = m - _ALPHA * a - (1 - _ALPHA) * b[perm], len(a)
    diagonal, off_diagonal, residual = mixed_correlation(a, b, r, impl="reference")
    squares = off_diagonal + _MIXUP * residual
    return (1 - diagonal / n).square().sum() + _LAMBDA * squares / n**2


def mixed_authors(z_a: Tensor, z_b: Tensor, z_m: Tensor, perm: Tensor) -> Tensor:
    """As wgcban/mix-bt has it: seven D x D products.  With Barlow Twins' biased deviations."""
    a, b, m = (F.batch_norm(z, None, None, training=True) for z in (z_a, z_b, z_m))
    n, loss = len(a), barlow_authors(z_a, z_b)
    for side in (a, b):
        target = _ALPHA * (a.T @ side) / n + (1 - _ALPHA) * (b[perm].T @ side) / n
        loss = loss + _MIXUP * _LAMBDA * (m.T @ side / n - target).square().sum()
    return loss


@_register("vicreg", test="tests/losses/test_vicreg.py")
def vicreg(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """VICReg: features vary, do not repeat each other, and agree between views.

    Products: two symmetric matrices, of covariances or Grams, half of each computed, and one
    gradient each.
    """
    inputs = two_views(shape, dtype, device)
    rivals = beside(VICRegLoss(), vicreg_reference)
    rivals["lightly"] = library("lightly.loss", lambda m: m.VICRegLoss())
    return _problem(shape, inputs, rivals, 2.0)


def vicreg_reference(z_a: Tensor, z_b: Tensor) -> Tensor:
    """Equations 1 to 6 of Bardes et al. 2022, arXiv:2105.04906, in the dtype it is given."""
    loss = 25 * F.mse_loss(z_a, z_b)
    for z in (z_a, z_b):
        loss = loss + 12.5 * F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()
        c = z - z.mean(0)
        covariance = c.T @ c / (len(z) - 1)
        off_diagonal = covariance - covariance.diagonal().diag()
        loss = loss + off_diagonal.square().sum() / z.shape[1]
    return loss
