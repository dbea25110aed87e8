"""What a method is: an encoder that is kept, a loss on a batch, and a hook after each step.

A batch is a dict: "views" a list of float tensors, one a view, images (B, C, H, W) or what else the
source has (clips, signals, clouds, rows: fastssl.data.views.spec); "index" (B,)
int64, the samples' places in the data set; "label" (B,) int64 their classes, where they have any;
"seeds" (B,) int64, one random seed a sample, a pure function of (run seed, epoch, sample): what a
method draws at random, it draws from these.  A method that asks also gets "params", a list of
(B, P) float32, one tensor a view: what the view was drawn with, in the columns PARAMETERS, whose
units are those of fastssl.data.render.torchvision.PARAMETERS.
"""

from typing import Any, ClassVar

from torch import Tensor, nn

Batch = dict[str, Any]
PARAMETERS = (
    *("left", "top", "width", "height", "flip", "cos", "sin", "shift_x", "shift_y"),
    *("brightness", "contrast", "saturation", "hue", "grayscale", "sigma", "solarize"),
)


class Method(nn.Module):
    """Base of all methods.  A subclass sets `encoder` and writes `forward`.

    forward(batch) -> {"loss": 0-d float32, ...}: other entries are logged as they are.
    after_step(progress): called after each optimizer step, progress in [0, 1].
    preset: the augmentation preset of the method's paper.  views: how many views it reads.
    couples_batch: a sample's loss depends on the others of its batch, so accumulation changes it.
    needs_view_params: it reads "params", which batches have only where they are asked for.
    """

    preset: ClassVar[str]
    views: ClassVar[int]
    couples_batch: bool
    needs_view_params: ClassVar[bool] = False
    encoder: nn.Module

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        raise TypeError(f"{type(self).__name__} does not define forward(batch)")

    def after_step(self, progress: float) -> None:
        """Nothing to do, unless a method keeps a teacher, a queue or a schedule."""

    def features(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> pooled features (B, F) float32: what evaluation and users read."""
        return self.encoder(self.cast(images)).float()

    def cast(self, images: Tensor) -> Tensor:
        """`images` in the parameters' dtype, which the engine may have made bfloat16."""
        return images.to(next(self.parameters()).dtype)
