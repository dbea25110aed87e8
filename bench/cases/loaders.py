"""The loaders that the data cases time: ours, and a torch DataLoader with the usual transforms.

Each is a callable.  One call loads one epoch, moves every batch to the device and returns the views
of the last batch.  No loader prefetches between calls: ours starts its workers anew for each epoch;
the DataLoader keeps its workers (persistent_workers), which wait for the next epoch to begin.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


@dataclass(frozen=True)
class Setting:
    """spec: the Views to make.  batch: images in one.  workers: processes, or DALI's threads."""

    spec: Any
    batch: int
    workers: int
    device: torch.device

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def consume(self, batches: Iterable[Sequence[Tensor]]) -> list[Tensor]:
        """Move every batch to the device, and return the views of the last one."""
        views: list[Tensor] = []
        for batch in batches:
            views = [view.to(self.device, non_blocking=True) for view in batch]
        if self.cuda:
            torch.cuda.synchronize(self.device)
        return views


class OurLoader:
    """Our loader over `source`, by DALI or by torchvision.

    Its workers start with each epoch, which is part of the time.  On a CPU this process reads the
    files for DALI, whose threads leave no core to another process.
    """

    def __init__(self, setting: Setting, source: Any, *, dali: bool) -> None:
        from fastssl.data.loader import PretrainLoader
        from fastssl.data.render.backend import Rendering

        self.setting, self.epoch = setting, 0
        rendering = None
        if dali:
            rendering = Rendering(
                device=setting.device, threads=max(setting.workers, 1), readers=int(setting.cuda)
            )
        self.loader = PretrainLoader(
            source,
            setting.spec,
            batch_size=setting.batch,
            seed=0,
            workers=0 if dali else setting.workers,
            rendering=rendering,
        )

    def __call__(self, *_: Tensor) -> list[Tensor]:
        start = self.epoch * self.loader.steps_per_epoch
        self.epoch += 1
        stream = self.loader.stream(start, start + self.loader.steps_per_epoch)
        return self.setting.consume(batch["views"] for batch in stream)


class PlainLoader:
    """torch's DataLoader, shuffled, with workers that stay.

    after(batch) -> views: what is left to be done on the device.
    """

    def __init__(
        self,
        setting: Setting,
        data: Dataset,
        after: Callable[[Tensor], Sequence[Tensor]] | None = None,
    ) -> None:
        self.setting, self.after = setting, after
        self.loader = DataLoader(
            data,
            batch_size=setting.batch,
            shuffle=True,
            drop_last=True,
            num_workers=setting.workers,
            persistent_workers=setting.workers > 0,
            pin_memory=setting.cuda,
        )

    def __call__(self, *_: Tensor) -> list[Tensor]:
        with warnings.catch_warnings():  # Python 3.12 on warns of any fork beside threads
            warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)
            batches = iter(self.loader)
        if self.after is None:
            return self.setting.consume(batches)
        moved = (batch.to(self.setting.device, non_blocking=True) for batch in batches)
        return self.setting.consume(map(self.after, moved))


class Pictures(Dataset):
    """`transform` of each of a list: a path, decoded by Pillow, or an image as it is."""

    def __init__(self, images: Sequence[Any], transform: Callable[[Any], Any]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Any:
        image = self.images[i]
        if isinstance(image, Path):
            from PIL import Image

            with Image.open(image) as file:
                image = file.convert("RGB")
        return self.transform(image)


class PillowBlur:
    """A Gaussian blur of a Pillow image by Pillow, sigma uniform: three times as fast as v2's."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        self.sigma = sigma

    def __call__(self, image: Any) -> Any:
        from PIL.ImageFilter import GaussianBlur

        return image.filter(GaussianBlur(float(torch.empty(()).uniform_(*self.sigma))))


class TorchvisionViews:
    """The views of `spec` by torchvision.transforms.v2 on Pillow images, as authors' code has them.

    Pillow images are the fastest form there: a crop reads what it needs, and the blur is Pillow's,
    or with pillow_blur=False torchvision's own, a tenth of the view wide as in SimCLR's paper.
    """

    def __init__(self, spec: Any, *, pillow_blur: bool = True) -> None:
        from torchvision.transforms import v2

        finish = [
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(spec.mean, spec.std),
        ]
        self.views = [
            v2.Compose([*_operations(v2, view, pillow_blur), *finish]) for view in spec.crops
        ]

    def __call__(self, image: Any) -> list[Tensor]:
        return [view(image) for view in self.views]


def _operations(v2: Any, view: Any, pillow_blur: bool) -> list[Any]:
    mode = v2.InterpolationMode(view.interpolation)
    if view.crop_scale == (1.0, 1.0):
        return [v2.Resize(view.size, mode), v2.CenterCrop(view.size)]
    scale, ratio = view.crop_scale, view.crop_ratio
    operations = [v2.RandomResizedCrop(view.size, scale, ratio, interpolation=mode)]
    if view.flip:
        operations.append(v2.RandomHorizontalFlip(view.flip))
    if view.jitter:
        jitter = v2.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
        operations.append(v2.RandomApply([jitter], view.jitter))
    if view.grayscale:
        operations.append(v2.RandomGrayscale(view.grayscale))
    if view.blur:
        blur: Any = PillowBlur(view.blur_sigma)
        if not pillow_blur:
            blur = v2.GaussianBlur(view.size // 20 * 2 + 1, view.blur_sigma)
        operations.append(v2.RandomApply([blur], view.blur))
    if view.solarize:
        operations.append(v2.RandomSolarize(255 * view.solarize_threshold, view.solarize))
    return operations


class KorniaViews:
    """The views of `spec` by kornia on a batch (B, 3, H, W) uint8, where that is: on the GPU."""

    def __init__(self, spec: Any, device: torch.device) -> None:
        import kornia.augmentation as K

        self.views = [_kornia(K, view, spec).to(device) for view in spec.crops]

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> list[Tensor]:
        x = pixels.float() / 255
        return [view(x) for view in self.views]


def _kornia(K: Any, view: Any, spec: Any) -> nn.Sequential:
    size, mode = (view.size, view.size), view.interpolation
    operations: list[nn.Module] = [
        K.RandomResizedCrop(size, view.crop_scale, view.crop_ratio, resample=mode),
        nn.Hardtanh(0.0, 1.0),  # bicubic overshoots
    ]
    if view.flip:
        operations.append(K.RandomHorizontalFlip(view.flip))
    if view.jitter:
        strength = (view.brightness, view.contrast, view.saturation, view.hue)
        operations.append(K.ColorJitter(*strength, p=view.jitter))
    if view.grayscale:
        operations.append(K.RandomGrayscale(p=view.grayscale))
    if view.blur:
        taps = 2 * round(3 * view.blur_sigma[1]) + 1
        operations.append(K.RandomGaussianBlur((taps, taps), view.blur_sigma, p=view.blur))
    if view.solarize:
        operations.append(K.RandomSolarize(view.solarize_threshold, 0.0, p=view.solarize))
    mean, std = (torch.tensor(values) for values in (spec.mean, spec.std))
    return nn.Sequential(*operations, K.Normalize(mean, std))
