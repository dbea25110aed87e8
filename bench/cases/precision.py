"""What 16-bit embeddings cost Barlow Twins: errors of loss and gradient against float64.

    python -m fastssl.bench.precision

Three ways to the same loss of the same bfloat16 views: standardized rows in float32 (any device but
CUDA), rows rounded to bfloat16 and summed in float32 (CUDA), and the authors' code under autocast,
which rounds the correlation too.  Inputs: random; of rank 16; trained (a linear encoder after 300
steps on noisy pairs, where correlations are down to the noise of the batch); and orthogonal, the
perfect case that no batch reaches, where all gradient left is rounding's size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.bench.cases.correlation import barlow_authors
from fastssl.kernels import cross_correlation, standardize
from fastssl.losses import BarlowTwinsLoss

SHAPES = ((256, 1024), (1024, 256))
INPUTS = ("random", "rank 16", "trained", "orthogonal")


def _inputs(kind: str, N: int, D: int) -> tuple[Tensor, Tensor]:
    """Two views (N, D) bfloat16."""
    noise = 0.03 if kind == "orthogonal" else 0.5
    x = torch.randn(N, D)
    if kind == "rank 16":
        x = torch.randn(N, 16) @ torch.randn(16, D)
    elif kind == "orthogonal":
        side = max(N, D)
        x = torch.linalg.qr(torch.randn(side, side)).Q[:N, :D] * N**0.5
    elif kind == "trained":
        return _train(N, D)
    first, second = (x + noise * torch.randn(N, D) for _ in range(2))
    return first.bfloat16(), second.bfloat16()


def _train(N: int, D: int, steps: int = 300) -> tuple[Tensor, Tensor]:
    encoder = torch.nn.Linear(512, D)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-3)
    mixing = torch.randn(64, 512) / 8  # pairs differ in all 512 directions, and share 64

    def pair() -> list[Tensor]:
        x = torch.randn(N, 64) @ mixing
        return [encoder(x + 0.3 * torch.randn(N, 512)) for _ in range(2)]

    for _ in range(steps):
        optimizer.zero_grad()
        BarlowTwinsLoss()(*pair()).backward()
        optimizer.step()
    first, second = (z.detach().bfloat16() for z in pair())
    return first, second


def _rows_in_bfloat16(z_a: Tensor, z_b: Tensor) -> Tensor:
    """By rows in bfloat16."""
    loss = BarlowTwinsLoss()
    a, b = (standardize(z, eps=loss.eps) for z in (z_a, z_b))
    correlation = cross_correlation(a, b)
    return loss._weigh(correlation.diagonal, correlation.off_diagonal_sq, len(a))


def _autocast(z_a: Tensor, z_b: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return barlow_authors(z_a, z_b)


def _step(loss, views: tuple[Tensor, ...]) -> tuple[float, Tensor]:
    leaves = [z.clone().requires_grad_() for z in views]
    value = loss(*leaves)
    gradients = torch.autograd.grad(value, leaves)
    return value.item(), torch.cat([g.flatten().double() for g in gradients])


def main() -> None:
    """Print the table."""
    print("| N x D | inputs | rows | loss | gradient | 1 - cosine |\n| " + "--- | " * 6)
    for N, D in SHAPES:
        for kind in INPUTS:
            torch.manual_seed(0)
            views = _inputs(kind, N, D)
            value, truth = _step(BarlowTwinsLoss(), tuple(z.double() for z in views))
            ways = {
                "float32": BarlowTwinsLoss(),
                "bfloat16": _rows_in_bfloat16,
                "autocast": _autocast,
            }
            for name, loss in ways.items():
                inputs = views if name != "autocast" else tuple(z.float() for z in views)
                rounded, grad = _step(loss, inputs)
                error = ((grad - truth).norm() / truth.norm()).item()
                cosine = 1 - F.cosine_similarity(grad, truth, 0).item()
                print(
                    f"| {N} x {D} | {kind} | {name} | {abs(rounded / value - 1):.0e} "
                    f"| {error:.0e} | {cosine:.0e} |"
                )


if __name__ == "__main__":
    main()
