"""Augmentation alone: what one worker makes of pixels in memory, a batch of views.

B images of S x S pixels, two views of V x V each.  One thread for everybody, as torch gives a
worker of a DataLoader; but in this process, since workers would work ahead while others are timed.
Everything is on the CPU, also where the rest is measured on a GPU.  jpegs.py has all of it, from
files on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from fastssl.bench.cases.loaders import Pictures
from fastssl.bench.cases.rivals import Late, Rivals, has_packages, library, nbytes
from fastssl.bench.registry import OURS, REFERENCE, Absent, Problem, Shape, case, shapes_of

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class _Stream:
    """A batch of views a call, on one thread; what it is called with is not looked at."""

    def __init__(self, batches: Iterator[Sequence[Tensor]]) -> None:
        self._batches = batches

    def __call__(self, pixels: Tensor) -> list[Tensor]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return list(next(self._batches))
        finally:
            torch.set_num_threads(threads)


def _endless(images: Sequence[Any], transform: Callable[[Any], Any]) -> Iterator[Sequence[Tensor]]:
    """Epoch after epoch, each one batch of all images in random order."""
    loader = DataLoader(Pictures(images, transform), batch_size=len(images), shuffle=True)
    while True:
        yield from loader


def _ours(pixels: Tensor, side: int) -> _Stream:
    from fastssl.data.datasets import ArrayImages
    from fastssl.data.loader import PretrainLoader
    from fastssl.data.views.image import preset

    names = [str(i) for i in range(len(pixels))]
    labels = torch.zeros(len(pixels), dtype=torch.int64)
    source: Any = ArrayImages(pixels, labels, ("image",), names)
    spec = preset("simclr", side, mean=_MEAN, std=_STD)
    batches = PretrainLoader(source, spec, batch_size=len(pixels), seed=0)
    return _Stream(batch["views"] for batch in batches.stream(0, 1 << 40))


def _torchvision(v2: Any, pixels: Tensor, side: int) -> _Stream:
    """SimCLR's appendix A in torchvision's transforms, on tensors: one image after another, twice.

    A blur's kernel is a tenth of the view, as in the paper.
    """
    one = v2.Compose(
        [
            v2.RandomResizedCrop(side, scale=(0.08, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(side // 20 * 2 + 1, (0.1, 2.0))], p=0.5),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(_MEAN, _STD),
        ]
    )
    return _Stream(_endless(list(pixels), lambda image: (one(image), one(image))))


def _lightly(transforms: Any, pixels: Tensor, side: int) -> _Stream:
    from torchvision.transforms.v2.functional import to_pil_image

    both = transforms.SimCLRTransform(input_size=side)
    return _Stream(_endless([to_pil_image(image) for image in pixels], both))


@case(
    "data-simclr",
    test="tests/data/test_torch_views.py",
    shapes=shapes_of("B S V", quick=[(8, 96, 64)], cpu=[(32, 256, 224)], cuda=[(64, 256, 224)]),
    dtypes=("float32",),
)
def simclr(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """SimCLR's two views of each image of a batch, by one thread.

    Views are random: the gate asks for their shape and dtype, that normalized pixels stay inside
    what [0, 1] becomes, that mean and spread are the images' own, and that the two differ.
    "reference" is torchvision's transforms in a DataLoader.  Bytes: images read, views written.
    """
    B, S, V = shape["B"], shape["S"], shape["V"]
    coarse = torch.rand(B, 3, 8, 8)
    smooth = F.interpolate(coarse, size=(S, S), mode="bicubic").clamp(0, 1)
    pixels = (255 * smooth).to(torch.uint8)
    rivals: Rivals = {OURS: Absent("pip install 'fastssl-torch[train]'")}
    if has_packages("pydantic", "numpy", "torchvision"):
        rivals[OURS] = Late(lambda: _ours(pixels, V))
    v2 = library("torchvision.transforms.v2", lambda m: _torchvision(m, pixels, V))
    rivals[REFERENCE] = v2
    rivals["lightly"] = library("lightly.transforms", lambda m: _lightly(m, pixels, V))
    return Problem(
        inputs=(pixels,),
        rivals=rivals,
        bytes_moved={"run": nbytes(pixels) + 2 * B * 3 * V * V * 4.0},
        items=(B, "images"),
        check=looks_right(pixels, [V, V], B),
        rotate=False,
    )


def looks_right(
    pixels: Tensor, sides: Sequence[int], count: int
) -> Callable[[str, Sequence[Tensor]], str]:
    """The check: (rival, views) -> what is wrong with them, or "".

    pixels: (n, 3, H, W) uint8, what the views are of.  sides: of each view.  count: of a batch.
    """
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (_MEAN, _STD))
    low, high = -mean / std, (1 - mean) / std
    source = (pixels / 255 - mean) / std
    source_mean, source_std = source.mean(), source.std()
    del source

    def wrong(view: Tensor, side: int) -> str:
        size = (count, 3, side, side)
        if view.shape != size or view.dtype != torch.float32:
            return f"is {tuple(view.shape)} {view.dtype}, not {size} float32"
        if not torch.isfinite(view).all():
            return "is not finite"
        if (view < low - 1e-3).any() or (view > high + 1e-3).any():
            return "leaves the range that pixels in [0, 1] have"
        # Brightness alone moves an image's mean by about one deviation.
        away = float((view.mean() - source_mean).abs())
        if away > 4 / math.sqrt(count):
            return f"has a mean {away:.2f} deviations from the images'"
        spread = float(view.std() / source_std)
        return "" if 0.4 < spread < 2.5 else f"has {spread:.2f} times the images' spread"

    def check(name: str, outputs: Sequence[Tensor]) -> str:
        if len(outputs) != len(sides):
            return f"{len(outputs)} views came out, not {len(sides)}"
        views = [view.cpu() for view in outputs]
        for v, (view, side) in enumerate(zip(views, sides, strict=True)):
            if why := wrong(view, side):
                return f"view {v} {why}"
        same = (v for v in range(1, len(views)) if torch.equal(views[v - 1], views[v]))
        return next((f"views {v - 1} and {v} are the same" for v in same), "")

    return check
