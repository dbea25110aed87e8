"""The views of one item of several streams: those of images that share have the same places.

The first stream draws from the sample's own seed, so that its views are those of a run of it alone;
every other from a hash of that seed and its name.  Places are shared as parts of the image: where
images have the same size, pixel by pixel the same; else to the nearest pixel.
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fastssl.data.render.torchvision import (
    Drawn,
    draw_views,
    parameters,
    render_views,
    shared,
)
from fastssl.data.views.image import Views
from fastssl.data.views.spec import apply
from fastssl.data.views.streams import StreamViews
from fastssl.random import SAMPLE, mix

_OWN = 2**63 - 1


def stream_seed(spec: StreamViews, name: str, seed: int) -> int:
    """The seed of one stream of a sample, not negative."""
    if name == spec.primary:
        return seed
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return int(mix(SAMPLE, seed, key)[0]) & _OWN


def draw_streams(
    spec: StreamViews, sizes: Mapping[str, tuple[int, int]], seed: int
) -> dict[str, list[Drawn]]:
    """The parameters of every view of each stream of images.

    sizes: height and width of each stream that is of images.
    """
    own: dict[str, list[Drawn]] = {}
    for name, (height, width) in sizes.items():
        views = spec.streams[name]
        assert isinstance(views, Views)
        own[name] = draw_views(views, height, width, stream_seed(spec, name, seed))
    found: dict[str, list[Drawn]] = {}
    for name, drawn in own.items():
        root = spec.root(name)
        if root == name:
            found[name] = drawn
            continue
        pairs = zip(_sides(spec, name), _sides(spec, root), strict=True)
        scales = [mine / theirs for mine, theirs in pairs]
        found[name] = [
            shared(p, q, sizes[name], sizes[root], scale)
            for p, q, scale in zip(drawn, own[root], scales, strict=True)
        ]
    return found


def _sides(spec: StreamViews, name: str) -> list[int]:
    views = spec.streams[name]
    assert isinstance(views, Views)
    return [view.size for view in views.crops]


def _sizes(spec: StreamViews, shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, int]]:
    return {
        name: (shapes[name][1], shapes[name][2])
        for name, views in spec.streams.items()
        if isinstance(views, Views)
    }


def apply_streams(
    spec: StreamViews, item: Mapping[str, Tensor], seed: int
) -> dict[str, list[Tensor]]:
    """Every view of each stream of one item: a pure function of its arguments.

    seed: a non-negative integer.  Raises ValueError for an item of another kind.
    """
    for name, views in spec.streams.items():
        if isinstance(views, Views) and item[name].ndim != 3:
            shape = list(item[name].shape)
            raise ValueError(f"stream {name!r}: want an image (C, H, W), got {shape}")
    drawn = draw_streams(spec, _sizes(spec, {name: x.shape for name, x in item.items()}), seed)
    made = {}
    for name, views in spec.streams.items():
        if isinstance(views, Views):
            made[name] = render_views(views, item[name], drawn[name])
        else:
            made[name] = apply(views, item[name], stream_seed(spec, name, seed))
    return made


def stream_parameters(
    spec: StreamViews, shapes: Mapping[str, Sequence[int]], seed: int
) -> dict[str, Tensor]:
    """What `apply_streams` does to the images of `shapes` (C, H, W): (V, P) float32 each stream of
    images, as `torchvision.drawn_parameters` has them."""
    found = {}
    for name, drawn in draw_streams(spec, _sizes(spec, shapes), seed).items():
        views = spec.streams[name]
        assert isinstance(views, Views)
        rows = [
            parameters(view, p, shapes[name]) for view, p in zip(views.crops, drawn, strict=True)
        ]
        found[name] = torch.from_numpy(np.array(rows, np.float32))
    return found
