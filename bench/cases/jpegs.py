"""The data pipeline whole: from photographs on disk to batches of views, an epoch a call.

N photographs of W x 3W/4 pixels (photos.py) in batches of B, each view V x V pixels, with so
many workers: processes of a DataLoader, or DALI's threads.  Everybody begins an epoch from a
standing start (loaders.py):

    fastssl                     by DALI, on the device that is measured
    fastssl torchvision         by torchvision's functions in worker processes, colors one by one
    fastssl torchvision linear  the same, all color changes in one linear map, as DALI's are
    reference                   torchvision.transforms.v2 on Pillow images, in a DataLoader; where
                                there is a blur, it is Pillow's, as in most authors' code
    torchvision blur            the same with torchvision's own blur
    lightly                     lightly's transform in a DataLoader
    kornia                      decoded in a DataLoader, the views made in batches on the GPU

Ceilings are cases beside: `data-jpeg-plain` reads and decodes, and augments nothing;
`data-array-simclr` augments what is decoded and in memory already.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from fastssl.bench.cases import loaders, photos
from fastssl.bench.cases.data import looks_right
from fastssl.bench.cases.loaders import OurLoader, PlainLoader, Setting
from fastssl.bench.cases.rivals import Late, Rivals, has_packages, library
from fastssl.bench.registry import OURS, REFERENCE, Absent, Problem, Shape, Sweep, case, shapes_of

_DALI = "pip install 'fastssl-torch[dali]'"
_TEST = "tests/data/test_dali.py"
_SHAPES = shapes_of(
    "N B W V workers",
    quick=[(32, 16, 160, 64, 1)],
    cpu=[(256, 64, 500, 224, 2)],
    cuda=[(2048, 256, 500, 224, 8)],
)


def _sweep(size: str, variable: str, *values: int) -> Sweep:
    (shape,) = _SHAPES[size]
    return Sweep(variable, values, {k: v for k, v in shape.items() if k != variable})


_SWEEPS = {
    "cpu": [_sweep("cpu", "workers", 1, 2, 4), _sweep("cpu", "W", 250, 500, 1000)],
    "cuda": [_sweep("cuda", "workers", 2, 4, 8, 16), _sweep("cuda", "W", 250, 500, 1000, 2000)],
}


class _Kind(NamedTuple):
    """preset: of fastssl's views.  lightly: of its transforms module and V, the same views."""

    preset: str
    lightly: Callable[[Any, int], Any] | None = None


_SIMCLR = _Kind("simclr", lambda m, V: m.SimCLRTransform(input_size=V))
_MAE = _Kind("mae", lambda m, V: m.MAETransform(input_size=V))


def _dino_by_lightly(m: Any, V: int) -> Any:
    local = max(8, round(V * 3 / 7 / 8) * 8)
    return m.DINOTransform(global_crop_size=V, local_crop_size=local, n_local_views=8)


_DINO = _Kind("dino", _dino_by_lightly)


def _problem(kind: _Kind, shape: Shape, device: torch.device, origin: str = "folder") -> Problem:
    """origin: where our loader finds the photos: "folder", "shards" or "arrays".

    The others read "arrays" too where ours does, and the folder in place of shards.
    """
    missing = Absent("pip install 'fastssl-torch[train]' scikit-learn")
    if not has_packages("pydantic", "torchvision", *photos.NEEDS):
        none: Rivals = dict.fromkeys((OURS, REFERENCE), missing)
        return Problem((torch.empty(1),), none, bytes_moved={"run": 1.0})
    spec = _spec(kind, shape)
    count, width = shape["N"], shape["W"]
    read = photos.nbytes(count, width)
    if origin == "arrays":
        read = count * 3 * width * photos.height(width)
    made = sum(3 * view.size**2 for view in spec.crops)
    return Problem(
        inputs=(torch.empty(read, dtype=torch.uint8),),  # what is read; nobody looks at it here
        rivals=_rivals(kind, shape, device, origin),
        bytes_moved={"run": read + 4.0 * count * made},
        items=(count, "images"),
        check=_make_check(shape, [view.size for view in spec.crops]),
        rotate=False,
        own_memory=False,
    )


def _spec(kind: _Kind, shape: Shape, **overrides: Any) -> Any:
    from fastssl.data.views.image import preset

    return preset(kind.preset, shape["V"], **overrides)


def _rivals(kind: _Kind, shape: Shape, device: torch.device, origin: str) -> Rivals:
    spec = _spec(kind, shape)
    setting = Setting(spec, shape["B"], shape["workers"], device)

    def ours(where: str, *, dali: bool, **overrides: Any) -> Late:
        own = Setting(_spec(kind, shape, **overrides), setting.batch, setting.workers, device)
        return Late(lambda: OurLoader(own, _source(shape, where), dali=dali))

    def plain(transform: Any) -> PlainLoader:
        return PlainLoader(setting, loaders.Pictures(_pictures(shape, origin), transform))

    def kornia(_: Any) -> PlainLoader:
        from torchvision.transforms.v2 import PILToTensor

        pictures = loaders.Pictures(_pictures(shape, origin), PILToTensor())
        return PlainLoader(setting, pictures, after=loaders.KorniaViews(spec, device))

    rivals: Rivals = {OURS: Absent(f"{_DALI}; {OURS} torchvision runs without")}
    if _has_dali():
        rivals[OURS] = ours(origin, dali=True, color="linear")
    rivals[OURS + " torchvision"] = ours(origin, dali=False)
    if any(view.jitter for view in spec.views):
        rivals[OURS + " torchvision linear"] = ours(origin, dali=False, color="linear")
    if origin == "shards":
        rivals[OURS + " folder"] = rivals[OURS]
        if _has_dali():
            rivals[OURS + " folder"] = ours("folder", dali=True, color="linear")
    rivals[REFERENCE] = Late(lambda: plain(loaders.TorchvisionViews(spec)))
    if any(view.blur for view in spec.views):
        rivals["torchvision blur"] = Late(
            lambda: plain(loaders.TorchvisionViews(spec, pillow_blur=False))
        )
    by_lightly = kind.lightly
    if by_lightly is not None:
        rivals["lightly"] = library(
            "lightly.transforms", lambda module: plain(by_lightly(module, shape["V"]))
        )
    if device.type == "cuda":
        rivals["kornia"] = library("kornia", kornia, remedy="pip install kornia")
    return rivals


def _has_dali() -> bool:
    try:
        return find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # nothing of nvidia's is installed
        return False


def _source(shape: Shape, origin: str) -> Any:
    """Our source of the photos."""
    from fastssl.data.datasets import ArrayImages
    from fastssl.data.sources.folder import scan_folder
    from fastssl.data.sources.webdataset import WebDatasetSource

    size = shape["N"], shape["W"]
    if origin == "arrays":
        pixels, names = photos.pixels(*size), [path.name for path in photos.files(*size)]
        labels = torch.zeros(len(pixels), dtype=torch.int64)
        return ArrayImages(pixels, labels, ("photo",), names)
    if origin == "shards":
        (source,) = WebDatasetSource(path=str(photos.shards(*size)), labels=False).open()
    else:
        (source,) = scan_folder(photos.folder(*size))
    return source


def _pictures(shape: Shape, origin: str) -> list[Any]:
    """What the others read: paths, or Pillow images in memory."""
    if origin != "arrays":
        return list(photos.files(shape["N"], shape["W"]))
    from torchvision.transforms.v2.functional import to_pil_image

    return [to_pil_image(image) for image in photos.pixels(shape["N"], shape["W"])]


def _make_check(shape: Shape, sides: list[int]) -> Callable[[str, Any], str]:
    """The check of `looks_right`, which learns what the photos are like when it is first asked."""
    asked: list[Callable[[str, Any], str]] = []

    def check(name: str, outputs: Any) -> str:
        if not asked:
            asked.append(looks_right(photos.pixels(shape["N"], shape["W"]), sides, shape["B"]))
        return asked[0](name, outputs)

    return check


_register = partial(case, test=_TEST, shapes=_SHAPES, dtypes=("float32",))


@_register("data-jpeg-simclr", sweeps=_SWEEPS)
def simclr(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """SimCLR's two views of each JPEG file of a folder, an epoch of them."""
    return _problem(_SIMCLR, shape, device)


@_register("data-jpeg-mae")
def mae(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """MAE's one view, a crop and a flip, of each JPEG file of a folder, an epoch of them."""
    return _problem(_MAE, shape, device)


@_register("data-jpeg-dino")
def dino(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """DINO's two views and eight small ones of each JPEG file of a folder, an epoch of them."""
    return _problem(_DINO, shape, device)


@_register("data-jpeg-plain")
def plain(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """What reading and decoding alone take: each JPEG file resized to one view, an epoch of them.

    Nothing is random, so that no pipeline with a crop of most of the photo can be much faster.
    """
    return _problem(_Kind("plain"), shape, device)


@_register("data-array-simclr")
def arrays(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """What augmenting alone takes: SimCLR's two views of each decoded image in memory, an epoch."""
    return _problem(_SIMCLR, shape, device, "arrays")


@_register("data-shard-simclr")
def shards(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """SimCLR's two views of the same JPEG files in WebDataset shards, beside the folder's."""
    return _problem(_SIMCLR, shape, device, "shards")
