"""The augmentation spec: which random views of an image a run trains on.

The spec names distributions, not a library's classes: every back end draws from the same laws.
Operations in order, each a no-op by default:

    crop        area ~ U(crop_scale) of the image, log(width / height) ~ U(log crop_ratio), place
                uniform; 10 tries to fit, else the largest centered crop within crop_ratio;
                resized to size x size with antialiasing, bilinear or (clamped) bicubic;
                `within` another view: that view's crop stands for the image
                `over` another view: its crop, flips and turn are that view's
    flip        left-right, with probability flip; then upside down, with probability flip_vertical
    turn        with probability turn: by 0, 1, 2 or 3 quarters
    move        angle ~ U(-rotate, rotate) degrees, shifts ~ U(-translate, translate) * size;
                bilinear, black where nothing moved in
    rand        rand_augment operations one after the other, each of RandAugment's fourteen as
                likely, magnitude ~ N(rand_magnitude, rand_std) cut to [0, 10] (rand_augment.py)
    jitter      with probability jitter: factors ~ U(max(0, 1 - s), 1 + s) of brightness, contrast
                and saturation, hue shift ~ U(-hue, hue) turns, as `color` says:
                sequential  in random order, each clamped to [0, 1], the hue that of HSV
                linear      all at once, clamped at the end (see below)
    grayscale   ITU-R 601 luma in every channel, with probability grayscale
    blur        with probability blur: Gaussian, sigma ~ U(blur_sigma) pixels of the *output*, cut
                at 3 sigma, reflected at the border
    solarize    with probability solarize: v -> 1 - v where v >= solarize_threshold
    normalize   (v - mean) / std, v in [0, 1]
    erase       with probability erase: 0 in a rectangle, its area ~ U(erase_scale) of the view,
                log(width / height) ~ U(log erase_ratio), place uniform; the largest in the middle
                where 10 tries do not fit

Images may have any number of channels.  Where these are not three, they pass saturation, hue and
grayscale unchanged, and contrast is around the mean over all of them; RandAugment is for one or
three.  Images of float32, as depths in meters, are in units of their own: nothing divides them by
255, `mean` and `std` are in those units, and what changes colors is refused, for it clamps to
[0, 1].

Linear color.  Without their clamps, and with the hue turned in the plane of YIQ's I and Q, the
four changes commute: saturation s and hue h keep the luma and leave grays as they are, contrast c
mixes with the mean luma mu, which only brightness b moves.  In any order they make

    x -> b c M x + b (1 - c) mu      M = A^-1 diag(1, s R(-2 pi h)) A,  R(t) the turn by t

    A = [.299 .587 .114; .596 -.274 -.321; .211 -.523 .311]      RGB -> YIQ

with mu the mean over pixels of .299 r + .587 g + .114 b of what comes to it; grayscale is
s = 0; one 3 x 3 product a pixel.  h > 0 turns red to yellow, as in HSV.  A is rounded: I and Q of
white are 0.001, so grays stay gray to 0.01 alone.  These are the numbers of DALI's color_twist.
"""

import re
import warnings
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from fastssl.data.views.presets import MULTI_CROP, OLD_FIELDS, PRESETS


def check_order(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"the low end {pair[0]} is above the high end {pair[1]}")
    return pair


def _some(values: tuple[float, ...]) -> tuple[float, ...]:
    if not values:
        raise ValueError("want one number, or one for each channel, got none")
    return values


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLACES = ("crop_scale", "crop_ratio", "within", "flip", "flip_vertical", "turn")
PLACES += ("rotate", "translate")
Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0, le=2)]
Area = Annotated[float, Field(gt=0, le=1)]
Ratio = Annotated[float, Field(ge=0.1, le=10)]
Spread = Annotated[float, Field(gt=0)]
Sigma = Annotated[float, Field(gt=0, le=20)]


class View(BaseModel):
    """One kind of view; `count` of them are drawn independently from each image."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    size: int = Field(ge=4, le=4096, description="height and width of the view, pixels")
    count: int = Field(default=1, ge=1, le=64, description="how many such views of each image")
    crop_scale: Annotated[tuple[Area, Area], AfterValidator(check_order)] = Field(
        default=(1.0, 1.0), description="crop area as a fraction of the image's: low, high"
    )
    crop_ratio: Annotated[tuple[Ratio, Ratio], AfterValidator(check_order)] = Field(
        default=(1.0, 1.0), description="crop width / height: low, high"
    )
    within: int | None = Field(
        default=None,
        ge=0,
        description="number, among all views and from 0, of an earlier view: crop within its crop",
    )
    over: int | None = Field(
        default=None,
        ge=0,
        description="number, among all views and from 0, of an earlier view: at its very place, in "
        "a size and with colors of its own",
    )
    interpolation: Literal["bilinear", "bicubic"] = Field(
        default="bilinear", description="of the crop's resize, with antialiasing"
    )
    flip: Probability = Field(default=0.0, description="probability of a left-right flip")
    flip_vertical: Probability = Field(
        default=0.0, description="probability of an upside-down flip"
    )
    turn: Probability = Field(
        default=0.0, description="probability of a turn by 0 to 3 quarters, each as likely"
    )
    rotate: float = Field(
        default=0.0, ge=0, le=180, description="largest rotation, degrees either way"
    )
    translate: float = Field(
        default=0.0, ge=0, le=0.5, description="largest shift, fraction of size"
    )
    rand_augment: int = Field(
        default=0, ge=0, le=16, description="how many operations of RandAugment"
    )
    rand_magnitude: float = Field(
        default=9.0, ge=0, le=10, description="mean magnitude of RandAugment's operations"
    )
    rand_std: float = Field(
        default=0.5, ge=0, le=10, description="standard deviation of the magnitudes"
    )
    jitter: Probability = Field(
        default=0.0, description="probability of the four color changes below"
    )
    brightness: Strength = Field(default=0.0, description="brightness factor is within 1 +- this")
    contrast: Strength = Field(default=0.0, description="contrast factor is within 1 +- this")
    saturation: Strength = Field(default=0.0, description="saturation factor is within 1 +- this")
    hue: float = Field(default=0.0, ge=0, le=0.5, description="largest hue shift, turns either way")
    color: Literal["sequential", "linear"] = Field(
        default="sequential", description="the changes one by one, or as one linear map: faster"
    )
    grayscale: Probability = Field(default=0.0, description="probability of dropping color")
    blur: Probability = Field(default=0.0, description="probability of a Gaussian blur")
    blur_sigma: Annotated[tuple[Sigma, Sigma], AfterValidator(check_order)] = Field(
        default=(0.1, 2.0), description="standard deviation of the blur, output pixels: low, high"
    )
    solarize: Probability = Field(
        default=0.0, description="probability of inverting the bright pixels"
    )
    solarize_threshold: Probability = Field(
        default=0.5, description="inverted from this value, in [0, 1]"
    )
    erase: Probability = Field(default=0.0, description="probability of a rectangle erased")
    erase_scale: Annotated[tuple[Area, Area], AfterValidator(check_order)] = Field(
        default=(0.02, 0.33), description="its area as a fraction of the view's: low, high"
    )
    erase_ratio: Annotated[tuple[Ratio, Ratio], AfterValidator(check_order)] = Field(
        default=(0.3, 3.3), description="its width / height: low, high"
    )


class Views(BaseModel):
    """All views of an image, in the order in which a batch holds them, and their normalization."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    kind: ClassVar[str] = "image"

    views: tuple[View, ...] = Field(min_length=1, description="the kinds of view, in order")
    mean: Annotated[tuple[float, ...], AfterValidator(_some)] = Field(
        default=IMAGENET_MEAN,
        description="subtracted, in [0, 1]: one number, or one a channel; of one channel three "
        "stand for their average",
    )
    std: Annotated[tuple[Spread, ...], AfterValidator(_some)] = Field(
        IMAGENET_STD, description="divided by, after the mean: one number, or one a channel"
    )

    @model_validator(mode="after")
    def _of_earlier_views(self) -> "Views":
        first = 0
        for view in self.views:
            for key in ("within", "over"):
                other = getattr(view, key)
                if other is not None and other >= first:
                    raise ValueError(
                        f"{key}={other} of view {first} is not an earlier view: give 0 to "
                        f"{first - 1}"
                        if first
                        else f"{key}={other}: the first view has no earlier one, give none"
                    )
            if view.over is not None:
                self._check_place(first, view, self.crops[view.over])
            first += view.count
        return self

    def _check_place(self, number: int, view: View, other: View) -> None:
        for key in PLACES:
            if key != "within" and getattr(view, key) != getattr(other, key):
                raise ValueError(
                    f"view {number} lies over={view.over}, whose {key} is {getattr(other, key)}, "
                    f"and has {key}={getattr(view, key)}: give it the same"
                )
        if view.within is not None or view.rand_augment or other.rand_augment:
            raise ValueError(f"over={view.over} of view {number}: without within and rand_augment")

    @property
    def count(self) -> int:
        """How many views of an image there are in all."""
        return sum(view.count for view in self.views)

    @property
    def crops(self) -> tuple[View, ...]:
        """The spec of each single view, in order: `views` repeated by their counts."""
        return tuple(view for view in self.views for _ in range(view.count))

    def normalization(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std, `channels` numbers each: their average for one channel, one repeated.

        Raises ValueError where there are others.
        """
        given = (self.mean, self.std)
        for name, values in zip(("mean", "std"), given, strict=True):
            if len(values) not in (1, channels) and (channels, len(values)) != (1, 3):
                known = " (ImageNet's)" if values in (IMAGENET_MEAN, IMAGENET_STD) else ""
                raise ValueError(
                    f"{name} has {len(values)} numbers{known}, and images have {channels} channels:"
                    f" give one, or {channels}"
                )
        one = (v if len(v) == channels else (sum(v) / len(v),) for v in given)
        mean, std = (v * channels if len(v) == 1 else v for v in one)
        return mean, std

    def check(self, channels: int, *, floats: bool = False) -> None:
        """Raise ValueError where these views are not for images of so many channels, or of float32.

        floats: their values are float32, in units of their own.
        """
        self.normalization(channels)
        if channels not in (1, 3) and any(view.rand_augment for view in self.views):
            raise ValueError(f"rand_augment is for 1 or 3 channels, and images have {channels}")
        if not floats:
            return
        for name in ("rand_augment", "jitter", "grayscale", "solarize"):
            if any(getattr(view, name) for view in self.views):
                raise ValueError(
                    f"{name} is for bytes, and images are float32, in units of their own: set it "
                    "to 0, or name another preset, as mae"
                )
        of_colors = channels == 1 and 3 in (len(self.mean), len(self.std))
        if self.mean == IMAGENET_MEAN or self.std == IMAGENET_STD or of_colors:
            raise ValueError(
                "images are float32, in units of their own: give mean and std in these, one number "
                "each or one a channel"
            )

    def shapes(self, channels: int) -> list[tuple[int, ...]]:
        """(channels, size, size) of each view."""
        return [(channels, view.size, view.size) for view in self.crops]

    def evaluation(self) -> "Views":
        """The largest centered square at the first view's size, normalized."""
        first = self.views[0]
        plain = View(size=first.size, interpolation=first.interpolation)
        return Views(views=(plain,), mean=self.mean, std=self.std)

    def shown(self, view: Tensor) -> Tensor:
        """Images (..., C, H, W) in [0, 1]: their first channel, unless they have 1 or 3.  What goes
        beyond is in units of its own, and stretched by its extremes."""
        norm = self.normalization(view.shape[-3])
        mean, std = (torch.tensor(v)[:, None, None] for v in norm)
        pixels = view * std + mean
        pixels = pixels if pixels.shape[-3] in (1, 3) else pixels[..., :1, :, :]
        low, high = pixels.aminmax()
        if high > 2:  # of bytes a view is in [0, 1], or by bicubic a little beyond
            pixels = (pixels - low) / (high - low).clamp(min=1e-12)
        return pixels.clamp(0, 1)


def rename_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of views, also those of single ones, with old names as their new ones, with a warning.

    Raises ValueError where both names of one are given.
    """
    found: dict[str, Any] = {}
    for key, value in fields.items():
        new = OLD_FIELDS.get(key, key)
        if new != key:
            if new in fields:
                raise ValueError(f"{key} is the old name of {new}, and both are given: drop {key}")
            warnings.warn(f"{key} is called {new} now", FutureWarning, stacklevel=3)
        found[new] = rename_fields(value) if isinstance(value, Mapping) else value
    return found


def unknown(what: str, got: str, valid: list[str]) -> ValueError:
    """The error for an unknown name, which suggests the closest valid one."""
    close = get_close_matches(got, valid, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"valid are {', '.join(valid)}"
    return ValueError(f"unknown {what} {got!r}: {hint}")


def preset(name: str, size: int, **overrides: Any) -> Views:
    """The views a paper trains on, at `size` pixels.

    overrides: of every view any field of View but size, and mean, std; then of one view alone, with
    the size, a mapping `view0`, `view1`, ..., by its number among all views.  swav, dino, ibot and
    msn also take local_count (0 drops the local views), local_size, and a mapping `local` for all
    local views.  In a run: data.overrides.blur=0 data.overrides.view1.solarize=0.3.
    Raises ValueError for an unknown name or override, naming the closest, or a value out of bounds.

    >>> preset("dino", 224).count, preset("mae", 224).views[0].crop_scale
    (10, (0.2, 1.0))
    >>> [view.blur for view in preset("simclr", 64, blur=0.3, view1={"blur": 0}).views]
    [0.3, 0.0]
    """
    overrides = rename_fields(overrides)
    if name not in PRESETS:
        raise unknown("preset", name, list(PRESETS))
    own = ("local_count", "local_size", "local") if name in MULTI_CROP else ()
    common = [field for field in View.model_fields if field != "size"]
    alone = {key: value for key, value in overrides.items() if re.fullmatch(r"view\d+", key)}
    for key in overrides:
        if key not in (*common, "mean", "std", *own, *alone):
            raise unknown(f"override of preset {name!r}", key, [*common, "mean", "std", *own])
    options = {key: overrides[key] for key in ("local_count", "local_size") if key in overrides}
    changes = {key: value for key, value in overrides.items() if key in common}
    norm = {key: value for key, value in overrides.items() if key in ("mean", "std")}
    kinds = [{**kind, **changes} for kind in PRESETS[name](size, **options)]
    if "local" in overrides:
        if options.get("local_count") == 0:
            raise ValueError(f"local={overrides['local']!r} with local_count=0: drop one of them")
        kinds[-1] |= _fields(name, "local", overrides["local"])
    views = Views.model_validate({"views": kinds, **norm})
    return _changed(name, views, alone) if alone else views


def _fields(name: str, key: str, changes: Any) -> Mapping[str, Any]:
    """An override that is a mapping of fields, checked."""
    if not isinstance(changes, Mapping):
        raise ValueError(f"{key}={changes!r} of preset {name!r}: give a mapping of a view's fields")
    valid = [field for field in View.model_fields if field != "count"]
    for field in changes:
        if field not in valid:
            raise unknown(f"override {key!r} of preset {name!r}", field, valid)
    return changes


def _changed(name: str, views: Views, alone: dict[str, Any]) -> Views:
    """`views` with the fields of single ones set anew; the others of its kind stay together."""
    singles = [{**view.model_dump(), "count": 1} for view in views.crops]
    kinds: list[dict[str, Any]] = []
    for key, changes in alone.items():
        if (number := int(key.removeprefix("view"))) >= len(singles):
            raise ValueError(f"{key} of preset {name!r}: give view0 to view{len(singles) - 1}")
        singles[number] |= _fields(name, key, changes)
    for single in singles:
        if kinds and {**kinds[-1], "count": 1} == single:
            kinds[-1]["count"] += 1
        else:
            kinds.append(single)
    return Views.model_validate({"views": kinds, "mean": views.mean, "std": views.std})
