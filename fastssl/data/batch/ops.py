"""Operations on a whole training batch, after its views are made and before the method reads them.

    data.batch_ops: [{name: mixup, views: [1]}, {name: low_frequency}]

They run one after the other on the device, on the views as normalized; style and fields undo the
normalization and put it back.  All they draw comes from the samples' seeds: the result is a
function of the batch, and a run that is resumed goes on with the same numbers.
Partners and donors are of the rank's own share of the batch, over all its micro-batches: unlike
views, what these operations make depends on the number of ranks.  "label", "params" and "index"
are left as they are: labels of mixed images stay those of the first one, and parameters tell of
views before these operations.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from fastssl.data.batch import math as batch_math
from fastssl.data.views.image import Strength, check_order
from fastssl.random import hashes, uniform
from fastssl.registry import OneOf, Registry
from fastssl.section import Section

Batch = dict[str, Any]
Share = Annotated[float, Field(ge=0, le=1)]
_TAG = 0x6261746368  # apart from what methods draw from the same seeds


class BatchOp(Section):
    """Base of the operations.  A subclass says what becomes of one view of the batch.

    pixels: whether `changed` is to have values in [0, 1], the normalization undone.
    dims: how many dimensions a view must have without the batch; None: any.
    """

    if TYPE_CHECKING:
        name: Any
    pixels: ClassVar[bool] = False
    dims: ClassVar[int | None] = None

    views: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, description="Numbers of the views it changes; none given: all."
    )

    def changed(self, x: Tensor, seeds: Tensor, own: Tensor, progress: float) -> Tensor:
        """A view x (B, ...) changed.  seeds (B,) int64 are of the samples, own (B,) of the samples
        and this view; progress in [0, 1) is the run's."""
        raise TypeError(f"{type(self).__name__} does not define changed(...)")

    def sides(self, side: int) -> list[int]:
        """The sides that an image of `side` pixels has after the operation, during a run."""
        return [side]


class Mixup(BatchOp):
    """Each sample mixed with another of the batch: the same one, and as much, in all its views."""

    name: Literal["mixup"] = "mixup"
    alpha: Annotated[tuple[Share, Share], AfterValidator(check_order)] = Field(
        (0.0, 1.0), description="The sample's own share is uniform in this range: low, high."
    )
    per: Literal["batch", "sample"] = Field("batch", description="What has a share of its own.")

    def changed(self, x: Tensor, seeds: Tensor, own: Tensor, progress: float) -> Tensor:
        draws = uniform(seeds, 2)
        share = draws[:, 0] if self.per == "sample" else draws[:1, 0].expand(len(x))
        low, high = self.alpha
        return batch_math.mixup(x, draws[:, 1].argsort(stable=True), low + (high - low) * share)


class Noise(BatchOp):
    """Noise of the batch, another sample's deviation from its mean, and normal noise."""

    name: Literal["noise"] = "noise"
    in_batch: float = Field(0.1, ge=0, le=4, description="Factor of another sample's deviation.")
    gaussian: float = Field(
        0.0, ge=0, le=4, description="Standard deviation of normal noise, in normalized units."
    )

    def changed(self, x: Tensor, seeds: Tensor, own: Tensor, progress: float) -> Tensor:
        if self.in_batch:
            partner = uniform(own, 1)[:, 0].argsort(stable=True)
            x = batch_math.batch_noise(x, partner, self.in_batch)
        if self.gaussian:
            count = x[0].numel()
            draws = batch_math.normal(uniform(hashes(own, 1)[:, 0], count + count % 2))
            added = self.gaussian * draws[:, :count].view(x.shape)
            x = (x.float() + added).to(x.dtype)
        return x


class Style(BatchOp):
    """Every image takes the low-frequency amplitudes of one of the batch, another for each view."""

    name: Literal["style"] = "style"
    pixels, dims = True, 3
    square: float = Field(
        0.1, ge=0, le=1, description="Side of the low frequencies' square, of the spectrum's."
    )
    strength: Annotated[tuple[Share, Share], AfterValidator(check_order)] = Field(
        (1.0, 1.0), description="How far amplitudes go to the donor's, for a batch: low, high."
    )

    def changed(self, x: Tensor, seeds: Tensor, own: Tensor, progress: float) -> Tensor:
        draws = uniform(own[:1], 2)[0]
        low, high = self.strength
        donor = (draws[0] * len(x)).long()
        radius = int(self.square * min(x.shape[-2:]) / 2)
        return batch_math.style(x, donor, radius, low + (high - low) * draws[1])


class Fields(BatchOp):
    """Brightness, contrast, saturation and place vary over an image as Gaussian random fields."""

    name: Literal["fields"] = "fields"
    pixels, dims = True, 3
    brightness: Strength = Field(0.2, description="Standard deviation of the factor's change.")
    contrast: Strength = Field(0.2, description="Standard deviation of the factor's change.")
    saturation: Strength = Field(0.2, description="Standard deviation of the factor's change.")
    displacement: float = Field(
        0.02, ge=0, le=0.5, description="Standard deviation of a pixel's shift, of the side."
    )
    decay: float = Field(4.0, ge=0, le=10, description="Power of the frequency in the spectrum.")
    cutoff: int = Field(8, ge=1, le=64, description="Largest frequency, cycles a side.")

    def changed(self, x: Tensor, seeds: Tensor, own: Tensor, progress: float) -> Tensor:
        names = ("displacement", "displacement", *batch_math.COLORS)
        count = 2 * batch_math.modes(self.cutoff)
        n = batch_math.normal(uniform(own, len(names) * count)).view(len(x), len(names), 2, -1)
        on = [i for i, name in enumerate(names) if getattr(self, name)]
        size = (x.shape[-2], x.shape[-1])
        g = batch_math.random_fields(n[:, on], size, self.cutoff, self.decay)
        fields: dict[str, Tensor] = {}
        for name in dict.fromkeys(names[i] for i in on):
            rows = [j for j, i in enumerate(on) if names[i] == name]
            fields[name] = getattr(self, name) * g[:, rows]
        return batch_math.vary(x, fields)


class LowFrequency(BatchOp):
    """Images shrink to their low frequencies, less and less as training goes on.

    The method must take images of every side: a convolutional network does, a timm ViT with
    model.kwargs.dynamic_img_size=true; a run whose encoder does not is refused.
    """

    name: Literal["low_frequency"] = "low_frequency"
    dims = 3
    stages: tuple[tuple[Share, Annotated[float, Field(gt=0, le=1)]], ...] = Field(
        ((0.6, 5 / 7), (0.8, 6 / 7), (1.0, 1.0)),
        min_length=1,
        description="Until which progress of the run, which share of the side; then all of it.",
    )
    multiple: int = Field(32, ge=2, multiple_of=2, description="Sides are multiples of this.")

    def side(self, side: int, progress: float) -> int:
        """The side that images of `side` pixels have at `progress`."""
        share = next((share for until, share in self.stages if progress < until), 1.0)
        if share == 1:
            return side
        return min(side, max(1, round(side * share / self.multiple)) * self.multiple)

    def sides(self, side: int) -> list[int]:
        starts = (0.0, *(until for until, _ in self.stages))
        return sorted({self.side(side, start) for start in starts if start < 1})

    def changed(self, x: Tensor, seeds: Tensor, own: Tensor, progress: float) -> Tensor:
        return batch_math.low_frequency(x, self.side(x.shape[-1], progress))


BATCH_OPS: Registry[type[BatchOp]] = Registry("batch_op", "data.batch_ops.name")


def register_batch_op(op: type[BatchOp]) -> type[BatchOp]:
    """A class decorator: a `BatchOp` that data.batch_ops can name.

    Raises PluginError where there is one of that name.
    """
    BATCH_OPS.add(op.model_fields["name"].default, op, op)
    return op


for _op in (Mixup, Noise, Style, Fields, LowFrequency):
    register_batch_op(_op)
AnyBatchOp = Annotated[BatchOp, OneOf(BATCH_OPS)]
Normalization = tuple[tuple[float, ...], tuple[float, ...]]


def check_batch_ops(ops: Sequence[BatchOp], shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """The sides that square images come to have, of those that `ops` change; none: as they were.

    shapes: of the views, without the batch.  Raises ValueError for a view that there is not, and
    for an operation on views that are no images.
    """
    sides: set[int] = set()
    for op in ops:
        name = getattr(op, "name", "")
        for v in range(len(shapes)) if op.views is None else op.views:
            if v >= len(shapes):
                raise ValueError(
                    f"batch_ops: {name} is to change view {v} of {len(shapes)}: from 0"
                )
            if op.dims is not None and len(shapes[v]) != op.dims:
                raise ValueError(f"batch_ops: {name} is for images, got a view {shapes[v]}")
            sides |= set(op.sides(shapes[v][-1])) - {shapes[v][-1]}
    return sorted(sides)


@torch.no_grad()
def apply_batch_ops(
    ops: Sequence[BatchOp],
    batch: Batch,
    progress: float,
    normalization: Normalization | None = None,
    device: torch.device | str | None = None,
) -> Batch:
    """The batch with its views changed by `ops`, one after the other; others of its keys are kept.

    batch: "views", tensors (B, ...), and "seeds" (B,) int64.  progress: of the run, in [0, 1).
    normalization: mean and std of the views' channels.  device: where to do it; none: where it is.
    """
    if not ops:
        return batch
    views = [view.to(device, non_blocking=True) for view in batch["views"]]
    seeds = batch["seeds"].to(device, non_blocking=True) ^ _TAG
    for k, op in enumerate(ops):
        keys = hashes(seeds, (k + 1) * (len(views) + 1))[:, -len(views) - 1 :]
        for v, view in enumerate(views):
            if op.views is None or v in op.views:
                given = op, view, keys[:, -1], keys[:, v], progress
                views[v] = _on_pixels(normalization, *given) if op.pixels else _changed(*given)
    return {**batch, "views": views}


def _changed(op: BatchOp, view: Tensor, seeds: Tensor, own: Tensor, progress: float) -> Tensor:
    return op.changed(view, seeds, own, progress)


def _on_pixels(normalization: Normalization | None, op: BatchOp, view: Tensor, *given) -> Tensor:
    if normalization is None:
        return _changed(op, view, *given)
    mean, std = (torch.tensor(v, device=view.device)[:, None, None] for v in normalization)
    pixels = view.float() * std + mean
    return ((_changed(op, pixels, *given) - mean) / std).to(view.dtype)
