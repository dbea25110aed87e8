"""View specs: which random views of an item a run trains on, whatever the kind of its items.

kind      item of a source            one view of it                spec
image     uint8 (C, H, W)             float32 (C, size, size)       Views (image.py)
clip      uint8 (C, T, H, W)          float32 (C, frames, s, s)     ClipViews (clip.py)
volume    uint8 or float32            float32 (C, depth, s, s)      VolumeViews (volume.py)
          (C, D, H, W)
signal    float32 (C, W)              float32 (C, length)           SignalViews (signal.py)
cloud     float32 (N, 3)              float32 (points, 3)           CloudViews (cloud.py)
row       float32 (F,)                float32 (F,)                  TableViews (table.py)
"""

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from fastssl.data.views.clip import ClipViews
from fastssl.data.views.cloud import CloudViews
from fastssl.data.views.image import PRESETS, Views, preset, unknown
from fastssl.data.views.signal import SignalViews
from fastssl.data.views.table import TableViews
from fastssl.data.views.volume import VolumeViews
from fastssl.registry import PluginError, Registry


class ViewSpec(Protocol):
    """The views of an item.  Frozen, and picklable: workers hold a copy."""

    kind: ClassVar[str]

    @property
    def count(self) -> int:
        """How many views of an item there are."""
        ...

    def shapes(self, channels: int) -> list[tuple[int, ...]]:
        """The shape of each view of an item with so many channels, without the batch."""
        ...

    def evaluation(self) -> "ViewSpec":
        """The spec of one view that nothing random has part in: what evaluation sees."""
        ...

    def shown(self, view: Tensor) -> Tensor:
        """Views (n, ...) as pictures show them: the normalization undone."""
        ...


# preset: (size, **overrides) -> spec, of items that are no images, and of what others add.
VIEWS: Registry[Callable[..., ViewSpec]] = Registry("view", "data.augment")
for _kind in (ClipViews, SignalViews, CloudViews, TableViews, VolumeViews):
    VIEWS.add(_kind.named, _kind.preset, module=_kind.__module__)


def register_views(name: str) -> Callable[[Callable[..., ViewSpec]], Callable[..., ViewSpec]]:
    """A decorator: function(size, **overrides) makes the `ViewSpec` that data.augment=name asks
    for, which has `apply(item, seed)` -> a tensor each view, a pure function, beside the rest.

    size: data.image_size.  overrides: data.overrides; raise ValueError for unknown ones.
    Raises PluginError where there is a preset of that name.
    """

    def add(made: Callable[..., ViewSpec]) -> Callable[..., ViewSpec]:
        if name in PRESETS:
            raise PluginError(f"{made.__module__} names views {name!r}, as a preset of images is")
        VIEWS.add(name, made)
        return made

    return add


def view_spec(name: str, size: int, **overrides: Any) -> ViewSpec:
    """The views that preset `name` makes at `size` (pixels, samples, points), with overrides.

    Raises ValueError for an unknown name or override, naming the closest, or a value out of bounds.

    >>> view_spec("mae", 32).shapes(3)
    [(3, 32, 32)]
    """
    if name in PRESETS:
        return preset(name, size, **overrides)
    if name not in VIEWS:
        raise unknown("preset", name, [*PRESETS, *VIEWS.names()])
    return VIEWS[name](size, **overrides)


def apply(spec: ViewSpec, item: Tensor, seed: int) -> list[Tensor]:
    """Every view of one item, a tensor each: a pure function of its arguments.

    seed: a non-negative integer.  Raises ValueError for an item of another kind.
    """
    if isinstance(spec, Views):
        from fastssl.data.render import torchvision  # seconds to import, which a recipe need not

        return torchvision.apply(spec, item, seed)
    return spec.apply(item, seed)  # type: ignore[attr-defined]


def blank(spec: ViewSpec, channels: int, count: int = 1) -> Tensor:
    """`count` views of zeros: the first kind of view of an item with so many channels."""
    return torch.zeros(count, *spec.shapes(channels)[0])
