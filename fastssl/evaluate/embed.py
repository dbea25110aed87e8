"""Features of a whole source, each rank embedding its share of the items."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastssl import distributed
from fastssl.data.errors import BadItem, DataError
from fastssl.data.loader import EvalLoader
from fastssl.data.sources.base import Source
from fastssl.data.views.spec import ViewSpec, apply, blank
from fastssl.random import EVALUATE, mix, sample_seed

Features = Callable[[Tensor], Tensor]  # views (B, ...) -> (B, F)


@dataclass(frozen=True)
class EmbedConfig:
    """views: their plain form is embedded.  batch_size: items a rank embeds at once.

    limit: at most so many.
    """

    views: ViewSpec
    batch_size: int = 256
    limit: int = 2**62
    workers: int = 0


@dataclass(frozen=True)
class Embedded:
    """Features (N, F) float32, labels (N,) int64 or None, index (N,) int64; all on the CPU.

    bad: (name, reason) of the items that could not be read, which are in none of them.
    """

    features: Tensor
    labels: Tensor | None
    index: Tensor
    bad: list[tuple[str, str]]


def embed(features: Features, source: Source, cfg: EmbedConfig) -> Embedded:
    """Every item of `source`, or a `subset` of `cfg.limit`.  Collective.

    Raises DataError when no item can be read.
    """
    if len(source) > cfg.limit:
        source = source.select(subset(source.labels, len(source), cfg.limit))
    batches = EvalLoader(
        source,
        cfg.views,
        cfg.batch_size,
        rank=distributed.rank(),
        world=distributed.world_size(),
        workers=cfg.workers,
    )
    parts: list[tuple[Tensor, Tensor]] = []
    bad: list[tuple[str, str]] = []
    for batch in batches:
        bad += batch["bad"]
        if len(batch["index"]):
            parts.append((features(batch["view"]).float().cpu(), batch["index"]))
    # Under ZeRO-3 a forward pass is collective: every rank runs as many as the one with most.
    one = blank(cfg.views.evaluation(), source.channels)
    for _ in range(max(distributed.gather_objects(len(parts))) - len(parts)):
        features(one)
    return _join(source, distributed.gather_objects((parts, bad)))


def subset(labels: Tensor | None, count: int, limit: int) -> np.ndarray:
    """At most `limit` of `count` indices, sorted: of every class its share, and one at least where
    there is room; which ones, a hash of the index says.  Always the same.

    labels (count,) int64, None: all of one class.  Where classes outnumber `limit`, the first ones.
    """
    order = np.argsort(mix(EVALUATE, 0, np.arange(count)), kind="stable")
    groups = np.zeros(count, np.int64) if labels is None else labels.numpy()
    by_class = order[np.argsort(groups[order], kind="stable")]
    sizes = np.bincount(groups)
    first, own = (np.cumsum(sizes) - sizes)[groups[by_class]], sizes[groups[by_class]]
    place = (np.arange(count) - first) / own  # within its class, in [0, 1)
    return np.sort(by_class[np.argsort(place, kind="stable")[:limit]])


def _join(source: Source, gathered) -> Embedded:
    parts = [part for rank_parts, _ in gathered for part in rank_parts]
    bad = [entry for _, rank_bad in gathered for entry in rank_bad]
    index = torch.cat([i for _, i in parts]) if parts else torch.empty(0, dtype=torch.int64)
    if not len(index):
        raise DataError(f"none of the {len(source)} items could be read: {bad[:3]}")
    order = index.argsort()
    index, x = index[order], torch.cat([f for f, _ in parts])[order]
    labels = None if source.labels is None else source.labels[index]
    return Embedded(x, labels, index, bad)


def two_views(features: Features, source: Source, views: ViewSpec, seed: int, count: int = 256):
    """Features of two random views of the same items: (n, F) each, n <= count, for alignment; None
    where none of those looked at can be read.

    Both are drawn by the first entry of `views`.  Collective under ZeRO-3.
    """
    pairs: list[list[Tensor]] = []
    for i in subset(source.labels, len(source), count).tolist():
        try:
            item = source.item(i)
        except BadItem:  # embed has counted and named it
            continue
        pairs.append([apply(views, item, sample_seed(seed, draw, i))[0] for draw in (0, 1)])
    if not pairs:
        return None
    a, b = (torch.stack(side) for side in zip(*pairs, strict=True))
    return features(a).float().cpu(), features(b).float().cpu()


def raw_input(views: Tensor, side: int = 32, samples: int = 1024) -> Tensor:
    """The views' own values as features (B, F): images and clips averaged down to `side` pixels a
    side or less, each frame by itself, signals (B, C, W) with a long W to `samples`."""
    if views.ndim >= 4 and views.shape[-1] > side:
        frames = views.flatten(1, -3)
        views = torch.nn.functional.adaptive_avg_pool2d(frames, side)
    elif views.ndim == 3 and views.shape[-1] > samples:
        views = torch.nn.functional.adaptive_avg_pool1d(views, samples)
    return views.flatten(1)
