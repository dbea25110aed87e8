"""RandAugment: operations of one image, drawn alike and applied one after the other.

An operation of magnitude m in [0, 10]; a sign +- is as likely either way:

    identity
    shear_x, shear_y           by +- 0.03 m of the height (the width)
    translate_x, translate_y   by +- 0.0453 m (15 / 331) of the side
    rotate                     by +- 3 m degrees
    brightness, contrast, saturation, sharpness    factor 1 +- 0.09 m
    posterize                  to 8 - round(0.4 m) bits a channel
    solarize                   v -> 1 - v where v >= 1 - m / 10; m = 0: nowhere
    autocontrast, equalize     stretched or made flat over [0, 1] (equalize in 256 steps)

Moves are bilinear, black where nothing moved in.  One-channel images pass saturation unchanged.
Source: Cubuk et al. 2019, RandAugment, arXiv:1909.13719, section 3; the ranges are torchvision's,
of which those of AutoAugment's authors differ a little in translations and posterization; random
magnitudes are timm's (rand-m9-mstd0.5).
"""

import math
from random import Random

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

_BILINEAR = InterpolationMode.BILINEAR
Operation = tuple[str, float]  # what, amount

OPERATIONS = (
    *("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness"),
    *("saturation", "contrast", "sharpness", "posterize", "solarize", "autocontrast", "equalize"),
)
_STEP = {  # of a signed operation, the amount a unit of magnitude
    **{"shear_x": 0.03, "shear_y": 0.03, "translate_x": 15 / 331, "translate_y": 15 / 331},
    **{"rotate": 3.0, "brightness": 0.09, "saturation": 0.09, "contrast": 0.09, "sharpness": 0.09},
}
_FACTORS = ("brightness", "saturation", "contrast", "sharpness")


def draw_operations(count: int, magnitude: float, std: float, rng: Random) -> tuple[Operation, ...]:
    """`count` operations and their amounts: a shear as a tangent, a translation in sides, a turn in
    degrees, a factor, bits, a threshold; 0 where there is none.

    >>> draw_operations(2, 9.0, 0.0, Random(3))
    (('translate_x', 0.4078549848942598), ('contrast', 0.19000000000000006))
    """
    return tuple(_operation(magnitude, std, rng) for _ in range(count))


def _operation(magnitude: float, std: float, rng: Random) -> Operation:
    """One operation, of four draws whatever it is."""
    which, sign, radius, angle = (rng.random() for _ in range(4))
    what = OPERATIONS[int(which * len(OPERATIONS))]
    normal = math.sqrt(-2 * math.log(1 - radius)) * math.cos(2 * math.pi * angle)
    m = min(10.0, max(0.0, magnitude + std * normal))
    if what in _STEP:
        amount = math.copysign(_STEP[what] * m, sign - 0.5)
        return what, 1 + amount if what in _FACTORS else amount
    if what == "posterize":
        return what, float(8 - round(0.4 * m))
    return what, 1 - m / 10 if what == "solarize" else 0.0


def apply_operation(image: Tensor, what: str, amount: float) -> Tensor:
    """`image` (..., C, H, W) float32 in [0, 1], after the operation."""
    height, width = image.shape[-2:]
    if what == "rotate":
        return F.rotate(image, amount, interpolation=_BILINEAR)
    if what.startswith("translate"):
        shift = [amount * width, 0.0] if what == "translate_x" else [0.0, amount * height]
        return F.affine(image, 0.0, shift, 1.0, [0.0, 0.0], interpolation=_BILINEAR)
    if what.startswith("shear"):
        degrees = math.degrees(math.atan(amount))
        shear = [degrees, 0.0] if what == "shear_x" else [0.0, degrees]
        return F.affine(image, 0.0, [0.0, 0.0], 1.0, shear, interpolation=_BILINEAR)
    return _recolored(image, what, amount)


def _recolored(image: Tensor, what: str, amount: float) -> Tensor:
    if what == "brightness":
        return F.adjust_brightness(image, amount)
    if what == "contrast":
        return F.adjust_contrast(image, amount)
    if what == "saturation":
        return F.adjust_saturation(image, amount) if image.shape[-3] == 3 else image
    if what == "sharpness":
        return F.adjust_sharpness(image, amount)
    if what == "posterize":
        return F.posterize(image, int(amount)) if amount < 8 else image
    if what == "solarize":
        return torch.where(image >= amount, 1 - image, image) if amount < 1 else image
    if what == "autocontrast":
        return F.autocontrast(image)
    return F.equalize(image) if what == "equalize" else image
