"""Which library makes the views of images: DALI (dali.py) where it can, else torchvision."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, NamedTuple

import torch

from fastssl.data.errors import DataError
from fastssl.data.sources.base import EncodedSource, Source
from fastssl.data.streams import stream, streams_of
from fastssl.data.views.image import Views
from fastssl.data.views.streams import AnyViews, StreamViews, specs_of

Backend = Literal["auto", "torch", "dali"]


@dataclass(frozen=True)
class Rendering:
    """How DALI makes views.

    device: a CUDA device, or the CPU.  threads: DALI's own.  readers: processes that read files and
    draw; 0: this one does.  half: float16, not float32.  channels_last: the batches' memory format.
    """

    device: torch.device = torch.device("cpu")
    threads: int = 2
    readers: int = 0
    half: bool = False
    channels_last: bool = False


class Choice(NamedTuple):
    backend: Literal["torch", "dali"]
    note: str  # what a user should know of it, or ""


def _not_installed() -> str:
    try:
        found = find_spec("nvidia.dali")
    except ModuleNotFoundError:  # nothing of nvidia's is installed
        found = None
    return "" if found else "nvidia-dali is not installed: pip install 'fastssl-torch[dali]'"


def _unfit(views: AnyViews, source: Source) -> str:
    """Why DALI has no part in these data, or ""."""
    if isinstance(views, StreamViews):
        found = {name: _unfit(own, stream(source, name)) for name, own in views.streams.items()}
        return next((f"stream {name!r}: {why}" for name, why in found.items() if why), "")
    if not isinstance(views, Views):
        return f"views of {views.kind}s are torch's alone"
    if getattr(source, "floats", False):
        return "images of float32 are torch's alone"
    if source.channels not in (1, 3):
        return f"images of {source.channels} channel(s) are torch's alone"
    if any(view.rand_augment for view in views.views):
        return "rand_augment is torchvision's alone"
    return ""


def choose_backend(
    asked: Backend, views: AnyViews, source: Source, missing: Callable[[], str] = _not_installed
) -> Choice:
    """The back end for these views of this source.

    "auto" is DALI where it is installed and the source has encoded images, in every stream; where
    only the installation is wanting, the note says so.  missing() -> why DALI is not there, or "".
    Raises DataError where "dali" is asked for and cannot be had.
    """
    unfit = _unfit(views, source)
    files = [stream(source, name) for name in streams_of(source)] or [source]
    encoded = all(isinstance(own, EncodedSource) for own in files)
    if asked == "torch" or (asked == "auto" and (unfit or not encoded)):
        return Choice("torch", "")
    reason = unfit or missing()
    if reason and asked == "dali":
        raise DataError(f"data.backend=dali: {reason}, or give data.backend=torch")
    if reason:
        return Choice("torch", f"views are made by torchvision: {reason}")
    kinds = [kind for own in specs_of(views) if isinstance(own, Views) for kind in own.views]
    mixed = any(view.color == "sequential" and view.jitter for view in kinds)
    return Choice("dali", _LINEAR if mixed else "")


_LINEAR = (
    "views are made by DALI, all color changes of one in a single linear map: "
    "data.overrides.color=linear names it, data.backend=torch makes them one after the other"
)
