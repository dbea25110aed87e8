"""VICRegL: VICReg on whole images, and on pairs of their places that belong together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastssl.distributed import BUILT, Group, require_all_even, world_size
from fastssl.kernels.common import accumulator, full_precision
from fastssl.losses._checks import check_not_negative, check_within
from fastssl.losses._loss import Loss
from fastssl.losses._moments import variance_covariance
from fastssl.losses.vicreg import VICRegLoss, invariance, spread_reference, vicreg_reference

View = tuple[Tensor, Tensor]


class VICRegLLoss(Loss):
    """VICReg of the views' global features, and of their local ones, matched by nearest neighbors.

    The formula is `vicregl_reference`.  A pair is a global view and any other; of two global ones
    both orders count.  The local term of a pair is VICReg of the m places of either view that are
    nearest to their nearest place in the other, in order of distance, and those places: once by
    the features' distance, once by the grids'.

    Shapes   a view is (g, l): global features g (B, D), local features l (B, H, W, E); any float
             dtype.  Its grid (B, H, W, 2) says where its places lie in the image.  H and W may
             differ between global and local views.  num_matches (m_0, m_1): places past H W, None
             and -1 mean all.  Where places are equally near, which is taken is left open.
    Returns  scalar float32; the mean over ranks is the loss.  The pairs' matches are put side by
             side, as positions of one VICReg for each number of them.
    Raises   ValueError: other shapes, dtypes or devices, or other ones on another rank; views
             without grids; no pair of views; what VICRegLoss refuses.
    Ranks    as VICRegLoss: variances and covariances are the joined batch's, of a match by its
             place in the order of distance.
    Source   Bardes et al. 2022, VICRegL, arXiv:2210.01571; num_matches as in the authors'
             code, where the order of views decides, not their kind.
    Differs  from lightly.loss.VICRegLLoss, whose value and gradient it has in one process: gathers
             by default, and returns a scalar, not (1,).

    >>> z, grid = torch.eye(2), torch.zeros(2, 1, 1, 2)
    >>> view = (z, z.view(2, 1, 1, 2))
    >>> loss = VICRegLLoss(alpha=0.5)([view, view], [grid, grid])  # all views agree
    >>> vicreg = VICRegLoss(nu_param=0.5)(z, z)
    >>> torch.isclose(loss, 0.5 * vicreg + 0.5 * 2 * vicreg)
    tensor(True)
    """

    shown = ("alpha", "num_matches", "nu_param")

    def __init__(
        self,
        lambda_param: float = 25.0,
        mu_param: float = 25.0,
        nu_param: float = 1.0,
        alpha: float = 0.75,
        gather_distributed: bool = BUILT,
        eps: float = 1e-4,
        num_matches: tuple[int | None, int | None] = (20, 4),
        *,
        process_group: Group = None,
    ) -> None:
        super().__init__(gather_distributed, process_group)
        check_within(0, 1, alpha=alpha)
        check_not_negative(nu_param=nu_param)
        counts = [m for m in num_matches if m is not None]
        whole = all(isinstance(m, int) and (m == -1 or m >= 1) for m in counts)
        if len(num_matches) != 2 or not whole:
            raise ValueError(f"num_matches must be two counts, None or -1, got {num_matches}")
        self.alpha, self.num_matches, self.nu_param = alpha, tuple(num_matches), nu_param
        # Half of nu: here the views' covariance terms are averaged, in VICReg they are added.
        self.vicreg_loss = VICRegLoss(
            lambda_param,
            mu_param,
            nu_param / 2,
            gather_distributed,
            eps,
            process_group=process_group,
        )
        self.lambda_param, self.mu_param, self.eps = lambda_param, mu_param, eps

    def forward(
        self,
        global_view_features: Sequence[View],
        global_view_grids: Sequence[Tensor],
        local_view_features: Sequence[View] | None = None,
        local_view_grids: Sequence[Tensor] | None = None,
    ) -> Tensor:
        G = len(global_view_features)
        views = [*global_view_features, *(local_view_features or ())]
        grids = [*global_view_grids, *(local_view_grids or ())]
        if G != len(global_view_grids) or len(views) != len(grids):
            counts = f"{len(global_view_grids)} of {G}, {len(grids)} of {len(views)} in all"
            raise ValueError(f"every view must have a grid, got {counts}")
        if G < 1 or len(views) < 2:
            raise ValueError(f"want a global view and another, got {G} of {len(views)}")
        # First what all ranks refuse together: one that left alone would leave the others waiting.
        # A view that is no pair, or has no tensors, is a mistake of the program: on every rank.
        named: dict[str, Tensor] = {}
        for i, ((g, z), grid) in enumerate(zip(views, grids, strict=True)):
            named |= {f"global features of view {i}": g, f"local features of view {i}": z}
            named[f"grid of view {i}"] = grid
        require_all_even(self.process_group, **named)
        _check(views, grids, world_size(self.process_group))
        pairs = [(a, b) for a in range(G) for b in range(len(views)) if a != b]
        whole = self._whole([g for g, _ in views], pairs)
        local = self._local([z.flatten(1, 2) for _, z in views], grids, pairs)
        return self.alpha * whole + (1 - self.alpha) * local

    def _whole(self, features: list[Tensor], pairs: list[tuple[int, int]]) -> Tensor:
        same = torch.stack([invariance(features[a], features[b]) for a, b in pairs]).mean()
        terms = [variance_covariance(g, self.eps, self.process_group) for g in features]
        variance, covariance = torch.stack([torch.stack(t) for t in terms]).mean(0)
        return self.lambda_param * same + self.mu_param * variance + self.nu_param * covariance

    def _local(
        self, places: list[Tensor], grids: list[Tensor], pairs: list[tuple[int, int]]
    ) -> Tensor:
        matched: dict[int, list[View]] = {}  # by the number of matches
        asked = [(a, b, self.num_matches[0]) for a, b in pairs]
        asked += [(b, a, self.num_matches[1]) for a, b in pairs]
        where = [grid.flatten(1, 2) for grid in grids]
        for x, y, most in asked:
            for at in (places, where):
                pair = _match(places[x], places[y], at[x], at[y], most)
                matched.setdefault(pair[0].shape[1], []).append(pair)
        total = places[0].new_zeros((), dtype=torch.float32)
        for some in matched.values():
            x, y = (torch.cat(side, 1) for side in zip(*some, strict=True))
            total = total + len(some) * self.vicreg_loss(x, y)
        return total / (2 * len(pairs))


def _match(x: Tensor, y: Tensor, at_x: Tensor, at_y: Tensor, most: int | None) -> View:
    """The places of x nearest to y's, and their neighbors: x (B, P, E), y (B, Q, E) -> (B, m, E).

    at_x, at_y: what distances are taken between.
    """
    P = x.shape[1]
    most = P if most is None or most == -1 else min(most, P)
    with torch.no_grad(), full_precision(x.device):
        wide = accumulator(at_x.dtype)
        distance, neighbor = torch.cdist(at_x.to(wide), at_y.to(wide)).min(2)
        best = distance.topk(most, dim=1, largest=False).indices
        neighbor = neighbor.gather(1, best)
    return _rows(x, best), _rows(y, neighbor)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _check(views: Sequence[View], grids: Sequence[Tensor], world: int) -> None:
    (g0, l0), n = views[0], len(views[0][0]) * world
    for i, ((g, z), grid) in enumerate(zip(views, grids, strict=True)):
        shapes = f"{tuple(g.shape)}, {tuple(z.shape)} and {tuple(grid.shape)}"
        if g.ndim != 2 or z.ndim != 4 or grid.shape != (*z.shape[:3], 2):
            raise ValueError(f"view {i} must be (B, D), (B, H, W, E), (B, H, W, 2), got {shapes}")
        widths = g.shape == g0.shape and (len(z), z.shape[3]) == (len(l0), l0.shape[3])
        if not widths or len(z) != len(g) or 0 in g.shape or 0 in z.shape:
            raise ValueError(f"view {i} must have the rows and widths of view 0, got {shapes}")
        same = all(x.dtype == y.dtype and x.device == y.device for x, y in ((g, g0), (z, l0)))
        if not same or not all(x.is_floating_point() for x in (g, z, grid)):
            seen = f"{g.dtype}, {z.dtype} and {grid.dtype} on {g.device}"
            raise ValueError(f"view {i} must have view 0's float dtypes and device, got {seen}")
    if n < 2:
        raise ValueError(f"the joined batch must have at least 2 images, got {n}")


def vicregl_reference(
    views: Sequence[View],
    grids: Sequence[Tensor],
    num_global: int,
    weights: tuple[float, float, float] = (25.0, 25.0, 1.0),
    alpha: float = 0.75,
    num_matches: tuple[int, int] = (20, 4),
) -> Tensor:
    """The formula pair by pair, in one process; weights: lambda, mu and nu."""
    pairs = [(a, b) for a in range(num_global) for b in range(len(views)) if a != b]
    (weight, mu, nu), whole, local = weights, [g for g, _ in views], []
    same = torch.stack([(whole[a] - whole[b]).square().mean() for a, b in pairs]).mean()
    spread = torch.stack([torch.stack(spread_reference(g, 1e-4)) for g in whole]).mean(0)
    for a, b in pairs:
        for x, y, most in ((a, b, num_matches[0]), (b, a, num_matches[1])):
            features = [views[v][1].flatten(1, 2) for v in (x, y)]  # (B, places, E)
            for places in (features, [grids[v].flatten(1, 2) for v in (x, y)]):
                distance, nearest = torch.cdist(places[0], places[1]).min(2)
                best = distance.argsort(1)[:, :most]
                row = torch.arange(len(best), device=best.device)[:, None]
                pair = features[0][row, best], features[1][row, nearest.gather(1, best)]
                local.append(vicreg_reference(*pair, weight, mu, nu / 2))
    whole_loss = weight * same + mu * spread[0] + nu * spread[1]
    return alpha * whole_loss + (1 - alpha) * torch.stack(local).sum() / (2 * len(pairs))
