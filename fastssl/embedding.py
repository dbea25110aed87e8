"""Features of a whole source, each rank embedding its share of the images."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastssl import distributed
from fastssl.data.datasets import ImageSource
from fastssl.data.errors import BadImage, DataError
from fastssl.data.loader import EvalLoader
from fastssl.data.seeds import sample_seed
from fastssl.data.torch_views import apply
from fastssl.data.views import Views

Features = Callable[[Tensor], Tensor]  # images (B, C, H, W) -> (B, F)


@dataclass(frozen=True)
class EmbedConfig:
    """size: side in pixels.  batch_size: images a rank embeds at once.  limit: at most so many."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    batch_size: int = 256
    limit: int = 2**62
    workers: int = 0


@dataclass(frozen=True)
class Embedded:
    """Features (N, F) float32, labels (N,) int64 or None, index (N,) int64; all on the CPU.

    bad: (name, reason) of the images that could not be read, which are in none of them.
    """

    features: Tensor
    labels: Tensor | None
    index: Tensor
    bad: list[tuple[str, str]]


def embed(features: Features, source: ImageSource, cfg: EmbedConfig) -> Embedded:
    """Every image of `source`, or `cfg.limit` evenly spaced ones.  Collective.

    Raises DataError when no image can be read.
    """
    if len(source) > cfg.limit:
        source = source.select((np.arange(cfg.limit) * len(source)) // cfg.limit)
    batches = EvalLoader(
        source,
        cfg.size,
        cfg.batch_size,
        mean=cfg.mean,
        std=cfg.std,
        rank=distributed.rank(),
        world=distributed.world_size(),
        workers=cfg.workers,
    )
    parts: list[tuple[Tensor, Tensor]] = []
    bad: list[tuple[str, str]] = []
    for batch in batches:
        bad += batch["bad"]
        if len(batch["index"]):
            parts.append((features(batch["image"]).float().cpu(), batch["index"]))
    # Under ZeRO-3 a forward pass is collective: every rank runs as many as the one with most.
    blank = torch.zeros(1, source.channels, cfg.size, cfg.size)
    for _ in range(max(distributed.gather_objects(len(parts))) - len(parts)):
        features(blank)
    return _join(source, distributed.gather_objects((parts, bad)))


def _join(source: ImageSource, gathered) -> Embedded:
    parts = [part for rank_parts, _ in gathered for part in rank_parts]
    bad = [entry for _, rank_bad in gathered for entry in rank_bad]
    index = torch.cat([i for _, i in parts]) if parts else torch.empty(0, dtype=torch.int64)
    if not len(index):
        raise DataError(f"none of the {len(source)} images could be read: {bad[:3]}")
    order = index.argsort()
    index, x = index[order], torch.cat([f for f, _ in parts])[order]
    labels = None if source.labels is None else source.labels[index]
    return Embedded(x, labels, index, bad)


def two_views(features: Features, source: ImageSource, views: Views, seed: int, count: int = 256):
    """Features of two random views of the same images: (n, F) each, n <= count, for alignment; None
    where none of those looked at can be read.

    Both are drawn by the first entry of `views`.  Collective under ZeRO-3.
    """
    pairs: list[list[Tensor]] = []
    for i in range(0, len(source), max(1, -(-len(source) // count))):
        try:
            image = source.image(i)
        except BadImage:  # embed has counted and named it
            continue
        pairs.append([apply(views, image, sample_seed(seed, draw, i))[0] for draw in (0, 1)])
    if not pairs:
        return None
    a, b = (torch.stack(side) for side in zip(*pairs, strict=True))
    return features(a).float().cpu(), features(b).float().cpu()


def pixels(images: Tensor, side: int = 32) -> Tensor:
    """The images' own pixels as features (B, C s s), averaged down to s <= `side` a side."""
    if images.shape[-1] > side:
        images = torch.nn.functional.adaptive_avg_pool2d(images, side)
    return images.flatten(1)
