"""Which views of an image are compared, where a spec makes more than two.

Views of the largest size are global, the others local; of two views both are global.  An image is
known by its global views: a local one is drawn to each of them, and to no other local one.
Source: Caron et al. 2020, SwAV, arXiv:2006.09882, section 3.2 (multi-crop).
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Z = TypeVar("Z")


def global_views(views: Sequence[Tensor]) -> list[int]:
    """The numbers of the global ones of views (B, C, *S).

    >>> import torch
    >>> [global_views([torch.ones(1, 3, s, s) for s in sizes]) for sizes in ((8, 8, 4), (8, 4))]
    [[0, 1], [0, 1]]
    """
    sizes = [view[0].numel() for view in views]
    return [v for v, size in enumerate(sizes) if size == max(sizes) or len(views) == 2]


def pairs(views: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Each global view with each other view, once: numbers (v, w), v < w."""
    chosen = set(global_views(views))
    return [(v, w) for w in range(len(views)) for v in range(w) if chosen & {v, w}]


def check_others(views: Sequence[Tensor]) -> None:
    """Raise ValueError for views that are not two or more."""
    if len(views) < 2:
        raise ValueError(f"views must be 2 or more, to be compared, got {len(views)}")


def queries(views: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Each view v with each other view g that is global: (v, g).

    Raises ValueError for a single view.
    """
    check_others(views)
    chosen = global_views(views)
    return [(v, g) for v in range(len(views)) for g in chosen if g != v]


def others(views: Sequence[Tensor]) -> list[list[float]]:
    """For each view a row: 1 for each global view that is not itself, else 0.

    Raises ValueError for a single view.
    """
    check_others(views)
    chosen = global_views(views)
    return [[float(g != v) for g in chosen] for v in range(len(views))]


def mean_over_pairs(
    loss: Callable[[Z, Z], Tensor], encoded: Sequence[Z], views: Sequence[Tensor]
) -> Tensor:
    """The mean of loss(encoded[v], encoded[w]) over `pairs` of views."""
    losses = [loss(encoded[v], encoded[w]) for v, w in pairs(views)]
    return sum(losses[1:], losses[0]) / len(losses)


def by_size(views: Sequence[Tensor]) -> list[list[int]]:
    """The numbers of the views, those of one shape together.

    >>> import torch
    >>> by_size([torch.ones(1, 3, s, s) for s in (8, 4, 8, 4)])
    [[0, 2], [1, 3]]
    """
    groups: dict[torch.Size, list[int]] = {}
    for v, view in enumerate(views):
        groups.setdefault(view.shape, []).append(v)
    return list(groups.values())


def encode_views(encoder: Callable[[Tensor], Tensor], views: Sequence[Tensor]) -> list[Tensor]:
    """The features (B, F) of every view: one call for those of one shape, unless a batch norm of
    the encoder's would see them together."""
    parts = encoder.modules() if isinstance(encoder, nn.Module) else ()
    if any(isinstance(module, _BatchNorm) for module in parts):
        return [encoder(view) for view in views]
    made: dict[int, Tensor] = {}
    for group in by_size(views):
        rows = encoder(torch.cat([views[v] for v in group]))
        made |= dict(zip(group, rows.chunk(len(group)), strict=True))
    return [made[v] for v in range(len(views))]
