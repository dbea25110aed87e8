"""The views that papers train on: what each kind of view has beside the spec's defaults.

A preset is a function of the size of the (global) views in pixels that lists kinds of view, each a
dict of fields of `views.View`.  "Read" in a docstring: in the authors' code, not the paper alone.

Up to 32 pixels nothing is blurred, for two pixels of blur leave nothing to learn (SimCLR's CIFAR-10
has none), and the strong color changes have half their strength.
"""

from collections.abc import Callable
from typing import Any

Kinds = list[dict[str, Any]]
OLD_FIELDS = {  # of views: an old name, which is still read with a warning -> the new one
    "colour": "color",
    "solarise": "solarize",
    "solarise_threshold": "solarize_threshold",
}

_CROP = {"crop_ratio": (3 / 4, 4 / 3), "flip": 0.5}
_CUBIC = {**_CROP, "interpolation": "bicubic"}
_STRONG = {"jitter": 0.8, "brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
_HALF = {"jitter": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
_MILD = {"jitter": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}


def _blur(size: int, probability: float) -> dict[str, float]:
    return {"blur": probability if size > 32 else 0.0}


def _strong(size: int) -> dict[str, float]:
    return {**(_STRONG if size > 32 else _HALF), "grayscale": 0.2}


def _unequal(size: int, look: dict[str, Any]) -> Kinds:
    """BYOL's two views: the first always blurred, the second seldom, but at times solarized."""
    look = {"size": size, **look, **_MILD, "grayscale": 0.2}
    return [{**look, **_blur(size, 1.0)}, {**look, **_blur(size, 0.1), "solarize": 0.2}]


def _local(size: int, given: int | None) -> int:
    """The side of local views: 96 at 224, always a multiple of 8, unless another is given."""
    return max(8, round(size * 3 / 7 / 8) * 8) if given is None else given


def simclr(size: int) -> Kinds:
    """Chen et al. 2020, arXiv:2002.05709, appendix A (224 pixels) and B.9 (32: no blur).

    Up to 32 pixels its color changes have half the strength, as google-research/simclr says for
    CIFAR-10 (color_jitter_strength=0.5).
    """
    look = {**_CROP, **_strong(size), **_blur(size, 0.5)}
    return [{"size": size, "count": 2, "crop_scale": (0.08, 1.0), **look}]


def byol(size: int) -> Kinds:
    """Grill et al. 2020, arXiv:2006.07733, appendix B, table 6: two unequal views, bicubic."""
    return _unequal(size, {**_CUBIC, "crop_scale": (0.08, 1.0)})


def mocov2(size: int) -> Kinds:
    """Chen et al. 2020, arXiv:2003.04297: SimCLR's, crops from 0.2 on, half the color (read).

    SimSiam, arXiv:2011.10566, has the same.
    """
    look = {**_CROP, **_HALF, "grayscale": 0.2, **_blur(size, 0.5)}
    return [{"size": size, "count": 2, "crop_scale": (0.2, 1.0), **look}]


def mocov3(size: int) -> Kinds:
    """Chen, Xie & He 2021, arXiv:2104.02057: BYOL's, but crops from 0.2 on, bilinear (read)."""
    return _unequal(size, {**_CROP, "crop_scale": (0.2, 1.0)})


def barlow_twins(size: int) -> Kinds:
    """Zbontar et al. 2021, arXiv:2103.03230, section 2.2: BYOL's views (read)."""
    return byol(size)


def vicreg(size: int) -> Kinds:
    """Bardes et al. 2022, arXiv:2105.04906: BYOL's views (read)."""
    return byol(size)


def swav(size: int, local_count: int = 6, local_size: int | None = None) -> Kinds:
    """Caron et al. 2020, arXiv:2006.09882: two views and six small ones (read)."""
    small = _local(size, local_size)
    wide = {"size": size, "count": 2, "crop_scale": (0.14, 1.0), **_CROP, **_strong(size)}
    local = {"size": small, "crop_scale": (0.05, 0.14), **_CROP, **_strong(size)}
    return _crops([{**wide, **_blur(size, 0.5)}], {**local, **_blur(small, 0.5)}, local_count)


def dino(size: int, local_count: int = 8, local_size: int | None = None) -> Kinds:
    """Caron et al. 2021, arXiv:2104.14294: BYOL's two views and eight local ones (read)."""
    return _students(size, (0.4, 1.0), (0.05, 0.4), local_count, local_size)


def ibot(size: int, local_count: int = 10, local_size: int | None = None) -> Kinds:
    """Zhou et al. 2022, arXiv:2111.07832: DINO's views (read), the scales of its ViT-S."""
    return _students(size, (0.25, 1.0), (0.05, 0.25), local_count, local_size)


def dinov2(size: int, local_count: int = 8, local_size: int | None = None) -> Kinds:
    """Oquab et al. 2023, arXiv:2304.07193, as its source draws them (read): DINO's, other scales.

    Its GaussianBlur(p) blurs with probability 1 - p: the first view never, the second in nine of
    ten.  `dinov2_paper` has what its names say.
    """
    return _students(size, (0.32, 1.0), (0.05, 0.32), local_count, local_size, blurs=(0.0, 0.9))


def dinov3_gram(size: int, local_count: int = 8, local_size: int | None = None) -> Kinds:
    """Simeoni et al. 2025, arXiv:2508.10104, section 4.2: `dinov2`, and behind its two global views
    these once more, twice as large and as they are: what a Gram teacher reads (read).
    """
    wide, local = dinov2(size)[:2], dinov2(size, local_count, local_size)[2:]
    same = ("crop_scale", "crop_ratio", "interpolation", "flip")
    large = [{"size": 2 * size, **{k: v[k] for k in same}, "over": g} for g, v in enumerate(wide)]
    return [*wide, *large, *local]


def dinov2_paper(size: int, local_count: int = 8, local_size: int | None = None) -> Kinds:
    """`dinov2` with DINO's blurs: the first view always, the second in one of ten."""
    return _students(size, (0.32, 1.0), (0.05, 0.32), local_count, local_size)


def msn(size: int, local_count: int = 10, local_size: int | None = None) -> Kinds:
    """Assran et al. 2022, arXiv:2204.07141: a target, an anchor and ten focal anchors (read)."""
    small = _local(size, local_size)
    look = {**_CROP, **_HALF, "grayscale": 0.2}
    wide = {"size": size, "count": 2, "crop_scale": (0.3, 1.0), **look, **_blur(size, 0.5)}
    focal = {"size": small, "crop_scale": (0.05, 0.3), **look, **_blur(small, 0.5)}
    return _crops([wide], focal, local_count)


def _students(
    size: int,
    wide: tuple[float, float],
    narrow: tuple[float, float],
    count: int,
    local_size: int | None,
    blurs: tuple[float, float] = (1.0, 0.1),
) -> Kinds:
    small = _local(size, local_size)
    look = {**_CUBIC, **_MILD, "grayscale": 0.2, **_blur(small, 0.5)}
    local = {"size": small, "crop_scale": narrow, **look}
    two = _unequal(size, {**_CUBIC, "crop_scale": wide})
    two = [view | _blur(size, p) for view, p in zip(two, blurs, strict=True)]
    return _crops(two, local, count)


def _crops(wide: Kinds, local: dict[str, Any], count: int) -> Kinds:
    return [*wide, {**local, "count": count}] if count else wide


def mae(size: int) -> Kinds:
    """He et al. 2022, arXiv:2111.06377, appendix A.1: crop and flip only, bicubic."""
    return [{"size": size, "crop_scale": (0.2, 1.0), **_CUBIC}]


def simmim(size: int) -> Kinds:
    """Xie et al. 2022, arXiv:2111.09886, section 4.1: large crops and flips (read)."""
    return [{"size": size, "crop_scale": (0.67, 1.0), **_CROP}]


def ijepa(size: int) -> Kinds:
    """Assran et al. 2023, arXiv:2301.08243: crops alone, no flip (read)."""
    return [{"size": size, "crop_scale": (0.3, 1.0), "crop_ratio": (3 / 4, 4 / 3)}]


def crop_mae(size: int) -> Kinds:
    """Eymael et al. 2024, arXiv:2403.17823: a view, and one within it (read: its ImageNet run).

    The second has 0.3 to 0.6 of the first's area; each is flipped by itself.  The authors cut the
    second from the first as resized; here it is cut from the image, and its shape is the image's.
    """
    look = {"size": size, **_CROP}
    return [{**look, "crop_scale": (0.1, 1.0)}, {**look, "crop_scale": (0.3, 0.6), "within": 0}]


def clip(size: int) -> Kinds:
    """Radford et al. 2021, arXiv:2103.00020, section 2.4: one crop; open_clip's scale (read)."""
    return [{"size": size, "crop_scale": (0.9, 1.0), **_CUBIC, "flip": 0.0}]


def rand_augment(size: int) -> Kinds:
    """Touvron et al. 2021, DeiT, arXiv:2012.12877, table 9, as supervised training has it.

    RandAugment of two operations, magnitude 9 +- 0.5, and an erased rectangle in a quarter.
    """
    look = {"rand_augment": 2, "rand_magnitude": 9.0, "rand_std": 0.5, "erase": 0.25}
    return [{"size": size, "crop_scale": (0.08, 1.0), **_CUBIC, **look}]


def aerial(size: int) -> Kinds:
    """Crops, and the eight symmetries of a square alike: remote sensing, microscopy; no paper's."""
    symmetries = {"flip": 0.5, "turn": 1.0}
    return [{"size": size, "count": 2, "crop_scale": (0.2, 1.0), **_CROP, **symmetries}]


def plain(size: int) -> Kinds:
    """The largest centered square, resized: what evaluation sees."""
    return [{"size": size}]


_ALL = (simclr, barlow_twins, mae, crop_mae, dino, plain, byol, mocov3, vicreg, swav, ibot, msn)
_ALL = (*_ALL, dinov2, dinov2_paper, dinov3_gram, simmim, ijepa, clip, rand_augment, aerial, mocov2)
PRESETS: dict[str, Callable[..., Kinds]] = {preset.__name__: preset for preset in _ALL}
MULTI_CROP = {  # those that take local_count, local_size and local
    preset.__name__ for preset in (swav, dino, ibot, dinov2, dinov2_paper, dinov3_gram, msn)
}
