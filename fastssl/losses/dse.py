"""DSE: dense features whose clusters are apart, and that use all their dimensions."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.kernels.common import accumulator, can_read_values, full_precision
from fastssl.losses._checks import (
    check_counts,
    check_embeddings,
    check_not_negative,
    check_positive,
)
from fastssl.losses._loss import Loss

TINY = 1e-12


class DSERegularizer(Loss):
    """-weight (dimensions + (apart - (spread of batch clusters + of image clusters) / 2) / size).

    Patches are clustered by k-means, those of each image into local_clusters, and those of each
    global_clusters // local_clusters images into global_clusters.  The spread of a cluster is the
    sum of singular values of its centered patches over sqrt(max(n - 1, D)), apart the mean distance
    of a patch to the nearest other center, size the mean distance to the mean patch, and
    dimensions exp(entropy of all patches' singular values) over their number.

    Shapes   representations (B, N, D): N patches of B images, any float dtype; normalized here
             unless normalize=False.
    Returns  scalar float32, to be added to a loss.  Clusters have no gradient.
    State    none.  k-means++ draws from torch's default generator.
    Raises   ValueError: another shape, an empty one; a weight < 0, numbers of clusters or
             max_kmeans_iters below 1, tol not > 0.
    Ranks    no collective: the structure of each rank's own patches.
    Source   Dai et al. 2025, arXiv:2510.17299, the regularizer, as in lightly.
    Differs  from lightly.loss.regularizer.DSERegularizer, whose value and gradient it has for the
             same clusters: the images' k-means run together, so that the same seed may cluster
             otherwise; distances are of differences, not of products.

    >>> x = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    >>> round(DSERegularizer(local_clusters=2, global_clusters=2)(x).item(), 4)  # -1 - 2
    -3.0
    """

    shown = ("weight", "normalize", "local_clusters", "global_clusters")

    def __init__(
        self,
        weight: float = 1.0,
        normalize: bool = True,
        local_clusters: int = 3,
        global_clusters: int = 24,
        max_kmeans_iters: int = 20,
        tol: float = 1e-4,
    ) -> None:
        super().__init__()
        check_not_negative(weight=weight)
        check_counts(
            local_clusters=local_clusters,
            global_clusters=global_clusters,
            max_kmeans_iters=max_kmeans_iters,
        )
        check_positive(tol=tol)
        self.weight, self.normalize = weight, normalize
        self.local_clusters, self.global_clusters = local_clusters, global_clusters
        self.max_kmeans_iters, self.tol = max_kmeans_iters, tol

    def forward(self, representations: Tensor) -> Tensor:
        check_embeddings("B, N, D", representations=representations)
        x = representations.to(accumulator(representations.dtype))
        if self.weight == 0:
            return x.new_zeros(())
        with full_precision(x.device):
            x = F.normalize(x, dim=2) if self.normalize else x
            size = (x - x.mean((0, 1))).norm(dim=2).mean() + TINY
            within = self._of_images(x)
            apart, spread = self._of_batch(x)
            dimensions = effective_dimensions(x.flatten(0, 1))
            dse = apart / size + dimensions - (spread + within) / (2 * size)
            return -self.weight * dse

    def _of_images(self, x: Tensor) -> Tensor:
        _, labels = self._clusters(x, self.local_clusters)
        terms = [
            torch.stack(spreads).mean()
            for image, own in zip(x, labels, strict=True)
            if (spreads := list(_spreads(image, own, self.local_clusters)))
        ]
        return torch.stack(terms).mean() if terms else x.new_zeros(())

    def _of_batch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        images = max(self.global_clusters // self.local_clusters, 1)
        whole = len(x) // images * images
        parts = [x[:whole].reshape(-1, images * x.shape[1], x.shape[2])]
        parts.append(x[whole:].reshape(1, -1, x.shape[2]))  # of the images that are left
        apart, spreads = [], []
        for part in parts:
            if part.numel() == 0:
                continue
            centers, labels = self._clusters(part, self.global_clusters)
            if centers.shape[1] > 1:
                far = torch.cdist(part.detach(), centers, compute_mode=EXACT)
                far.scatter_(2, labels.unsqueeze(2), torch.inf)
                other = far.argmin(2, keepdim=True).expand(-1, -1, x.shape[2])
                apart += (part - centers.gather(1, other)).norm(dim=2).mean(1).unbind()
            for group, own in zip(part, labels, strict=True):
                spreads += _spreads(group, own, self.global_clusters)
        far, spread = (torch.stack(t).mean() if t else x.new_zeros(()) for t in (apart, spreads))
        return far, spread

    @torch.no_grad()
    def _clusters(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Centers (G, k, D), and which is nearest to each of x (G, n, D): (G, n)."""
        x, (G, n, _) = x.detach(), x.shape
        centers = first_centers(x, min(k, n))
        done = torch.zeros(G, 1, 1, dtype=torch.bool, device=x.device)
        for _ in range(self.max_kmeans_iters):
            new = _means(x, torch.cdist(x, centers, compute_mode=EXACT).argmin(2), centers)
            moved = (new - centers).norm(dim=(1, 2), keepdim=True)
            centers = torch.where(done, centers, new)
            done |= moved < self.tol
            if can_read_values(x) and done.all():
                break
        return centers, torch.cdist(x, centers, compute_mode=EXACT).argmin(2)


EXACT = "donot_use_mm_for_euclid_dist"


def first_centers(x: Tensor, k: int) -> Tensor:
    """k-means++: k of the rows of each of x (G, n, D), drawn by their squared distance to those
    before."""
    G, n, D = x.shape
    at = torch.randint(n, (G, 1), device=x.device)
    centers, least = x.new_empty(G, k, D), x.new_full((G, n), torch.inf)
    for i in range(k):
        centers[:, i] = x[torch.arange(G, device=x.device), at[:, 0]]
        far = torch.cdist(x, centers[:, i : i + 1], compute_mode=EXACT)[..., 0]
        least = torch.minimum(least, far)
        if i + 1 < k:
            chance = least.square()
            chance = torch.where(chance.sum(1, keepdim=True) > 0, chance, 1)
            at = chance.multinomial(1)
    return centers


def _means(x: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
    """The mean of each cluster's rows; of an empty one, a row drawn."""
    G, n, D = x.shape
    sums = torch.zeros_like(centers).scatter_add_(1, labels.unsqueeze(2).expand(-1, -1, D), x)
    counts = F.one_hot(labels, centers.shape[1]).sum(1).unsqueeze(2)
    drawn = torch.randint(n, (G, centers.shape[1], 1), device=x.device).expand(-1, -1, D)
    return torch.where(counts > 0, sums / counts.clamp_min(1), x.gather(1, drawn))


def _spreads(x: Tensor, labels: Tensor, k: int) -> Iterator[Tensor]:
    """The spread of each cluster of more than one row."""
    counts = torch.bincount(labels, minlength=k).tolist()
    for rows in x[labels.argsort(stable=True)].split(counts):
        if len(rows) > 1:
            values = torch.linalg.svdvals(rows - rows.mean(0))
            yield values.sum() / math.sqrt(max(len(rows) - 1, rows.shape[1]))


def effective_dimensions(x: Tensor) -> Tensor:
    """exp(entropy of the singular values of x, as shares of their sum) over how many they are."""
    values = torch.linalg.svdvals(x)
    share = values / (values.sum() + TINY)
    return (-(share * (share + TINY).log()).sum()).exp() / min(x.shape)
