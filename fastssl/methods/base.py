"""What a method is: an encoder that is kept, a loss in two halves, and what a step leaves behind.

    loss(encode(batch), batch)        between the halves a row is a sample, and nothing else

A batch is a tree: a dictionary of tensors, lists and dictionaries whose leaves have B as their
first dimension.  From the loader it has "views", a list of float tensors, one a view, images
(B, C, H, W) or what else the source has (clips, signals, clouds, rows: fastssl.data.views.spec);
"index" (B,) int64, the samples' places in the data set; "label" (B,) int64 their classes, where
they have any; "seeds" (B,) int64, one random seed a sample, a pure function of (run seed, epoch,
sample): what a method draws at random, it draws from these.  A method that asks also gets "params",
a list of (B, P) float32, one tensor a view: what the view was drawn with, in the columns
PARAMETERS, whose units are those of fastssl.data.render.torchvision.PARAMETERS.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastssl.models import frozen_in

Batch = dict[str, Any]
Encoded = Any  # a tree whose leaves have a row for each sample
PARAMETERS = (
    *("left", "top", "width", "height", "flip", "cos", "sin", "shift_x", "shift_y"),
    *("brightness", "contrast", "saturation", "hue", "grayscale", "sigma", "solarize"),
)


class Method(nn.Module):
    """Base of all methods.  A subclass sets `encoder`, and writes `loss` and what else it needs.

    preset: the augmentation preset of the method's paper.
    views: how many views it reads; a pair: at least, and at most (None: any number).
    couples_batch: a sample's loss depends on the others of its batch, so a mean over micro-batches
        is another loss.
    loss_reads_views: `loss` reads the values of batch["views"], not their shapes alone: of a large
        batch it gets no more than the shapes otherwise.
    needs_view_params: it reads "params", which batches have only where they are asked for.
    has_teacher: it learns from a frozen network, the configuration's `teacher`, and is built as
        Class(encoder, cfg, teacher); its `networks` have that as "teacher".
    streams: (): one stream, whatever its name; names: these, the first the primary one, and
    `encoder` is built of a dictionary by them; None: two or more, as data.streams names them.  Of
    several, "views" and "params" are dictionaries of lists, by stream.
    """

    preset: ClassVar[str]
    views: ClassVar[int | tuple[int, int | None]]
    couples_batch: bool
    loss_reads_views: ClassVar[bool] = False
    needs_view_params: ClassVar[bool] = False
    has_teacher: ClassVar[bool] = False
    streams: ClassVar[tuple[str, ...] | None] = ()
    encoder: nn.Module

    def prepare(self, batch: Batch) -> Batch:
        """The batch that the rest reads, where images are mixed with one another.  Without
        parameters, and without gradient.  It gets the rank's batch before that is cut; a
        micro-batch only where each has a loss of its own (engine.large_batch=plain)."""
        return batch

    def encode(self, batch: Batch) -> Encoded:
        """The expensive part, each sample by itself: by default the features of every view."""
        return [self.encoder(self.cast(view)) for view in batch["views"]]

    def targets(self, batch: Batch) -> Encoded:
        """What the loss compares with and no gradient flows into, each sample by itself.

        Where a method has any, `loss` finds them as batch["targets"].
        """
        return None

    def loss(self, encoded: Encoded, batch: Batch) -> dict[str, Any]:
        """{"loss": 0-d float32, ...}: heads, and all that compares samples with one another.

        Other 0-d entries are logged as they are.  "keep", a tree, is what `on_step` will need; of
        micro-batches its rows are joined.  Nothing is remembered here: the step may be skipped.
        """
        raise TypeError(f"{type(self).__name__} does not define loss(encoded, batch)")

    def on_step(self, keep: Any, progress: float) -> None:
        """Called after each step that was applied, once, and never for one that was skipped.

        Teachers, queues, centers and schedules move here and nowhere else.  keep: what `loss` gave
        as "keep", without gradient; None where it gives none.  progress in (0, 1]: of the run.
        """

    @property
    def prepares(self) -> bool:
        """Whether it has something to do to a whole batch."""
        return type(self).prepare is not Method.prepare

    @property
    def has_targets(self) -> bool:
        """Whether it has anything to compare with that no gradient flows into."""
        return type(self).targets is not Method.targets

    def forward(self, batch: Batch, part: str = "all", encoded: Encoded = None) -> Any:
        """What an engine calls.

        part: "encode", "targets" or "loss", the latter of `encoded`; "all" of them one after
        another, `prepare` included; or "prepared", where that has been called.
        """
        if part == "encode":
            return self.encode(batch)
        if part == "targets":
            with torch.no_grad():
                return self.targets(batch)
        if part == "loss":
            return self.loss(encoded, batch)
        if part == "all":
            batch = self.prepare(batch)
        encoded = self.encode(batch)
        with torch.no_grad():
            targets = self.targets(batch)
        return self.loss(encoded, batch if targets is None else {**batch, "targets": targets})

    def networks(self) -> dict[str, nn.Module]:
        """What can be evaluated and exported, by name, the primary one first.

        Each maps views to features (B, F), and stands in every checkpoint.  A method with a teacher
        gives its encoder too, as "teacher".
        """
        return {"encoder": self.encoder}

    def train(self, mode: bool = True) -> Any:
        """As of any module; but a frozen network stays in evaluation mode."""
        super().train(mode)
        for network in frozen_in(self):
            network.eval()
        return self

    def features(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> pooled features (B, F) float32: what evaluation and users read."""
        return self.encoder(self.cast(images)).float()

    def cast(self, images: Tensor) -> Tensor:
        """`images` in the parameters' dtype, which the engine may have made bfloat16."""
        return images.to(next(self.parameters()).dtype)
