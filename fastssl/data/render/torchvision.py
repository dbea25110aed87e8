"""The views of one image with torchvision's functional operations: the portable back end.

`draw` turns a seed into the parameters of one view, `render` applies them; the spec in image.py
states the laws of the first and the meaning of the second.  `drawn_parameters` tells a method what
was drawn, as numbers in the order of PARAMETERS.  Images: (C, H, W), uint8 or float32.

After the crop (torchvision's native uint8 path) pixels are float32 in [0, 1], so nothing is
rounded between operations.  At 32 pixels a view costs its number of tensor operations, not its
pixels, and hue is half of it: whatever the draw leaves out is not run.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from fastssl.data.views.image import View, Views
from fastssl.data.views.rand_augment import apply_operation, draw_operations

_ADJUST = {
    "brightness": F.adjust_brightness,
    "contrast": F.adjust_contrast,
    "saturation": F.adjust_saturation,
    "hue": F.adjust_hue,
}
# The columns of `parameters`.  Lengths are shares of the image (the crop's) or of the view (the
# rest), the origin at the top left, x to the right, y down.  In brackets: what leaves things be.
PARAMETERS = (
    "left",  # of the crop (0)
    "top",  # (0)
    "width",  # of the crop (1)
    "height",  # (1)
    "flip",  # 1: left and right change places (0)
    "cos",  # of the angle that the view is turned by, clockwise, after the flip (1)
    "sin",  # (0)
    "shift_x",  # after the turn (0)
    "shift_y",  # (0)
    "brightness",  # factor minus 1 (0)
    "contrast",  # factor minus 1 (0)
    "saturation",  # factor minus 1 (0)
    "hue",  # turns (0)
    "grayscale",  # 1: without color (0)
    "sigma",  # of the blur (0)
    "solarize",  # 1: bright pixels are inverted (0)
)
_CROP_TRIES = 10
_MATRIX_BLUR = 128  # pixels; measured on one core: 52 us for 170 at 32, 134 for 405 at 96


class Drawn(NamedTuple):
    """The parameters of one view: the crop in source pixels, then one entry an operation.

    They apply in the order of image.py.
    """

    top: int
    left: int
    height: int
    width: int
    flip: bool
    angle: float  # degrees
    shift: tuple[float, float]  # output pixels, right and down
    jitter: tuple[tuple[str, float], ...]  # what, factor; in the order they apply
    grayscale: bool
    sigma: float  # output pixels; 0: no blur
    solarize: bool
    flip_vertical: bool = False
    turn: int = 0  # quarters, anticlockwise
    operations: tuple[tuple[str, float], ...] = ()  # of rand_augment: what, amount; in order
    erase: tuple[int, int, int, int] = (0, 0, 0, 0)  # top, left, height, width; output pixels


def _draw_box(
    scale: tuple[float, float], ratios: tuple[float, float], height: int, width: int, rng: Random
) -> tuple[int, int, int, int]:
    """Top, left, height, width.  Source: Szegedy et al. 2014, arXiv:1409.4842, section 6."""
    (small, large), (narrow, wide) = scale, ratios
    low, high = math.log(narrow), math.log(wide)
    for _ in range(_CROP_TRIES):
        area = height * width * (small + (large - small) * rng.random())
        ratio = math.exp(low + (high - low) * rng.random())
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.random() * (height - h + 1)), int(rng.random() * (width - w + 1))
            return top, left, h, w
    h, w = min(height, round(width / narrow)), min(width, round(height * wide))
    h, w = max(h, 1), max(w, 1)
    return (height - h) // 2, (width - w) // 2, h, w


def draw(view: View, height: int, width: int, seed: int) -> Drawn:
    """The parameters of one view of a height x width image: a pure function of its arguments.

    Only Random.random() is used: its sequence for a seed is what Python promises to keep.  Every
    operation draws its numbers whatever its probability, and the crop, which may need several
    tries, draws last: switching one operation on or off leaves the others as they were.
    """
    rng = Random(seed)
    u = [rng.random() for _ in range(17)]
    jitter: list[tuple[float, str, float]] = []
    if u[4] < view.jitter:
        for k, what in enumerate(("brightness", "contrast", "saturation")):
            if strength := getattr(view, what):
                low = max(0.0, 1 - strength)
                jitter.append((u[9 + k], what, low + (1 + strength - low) * u[5 + k]))
        if view.hue:
            jitter.append((u[12], "hue", view.hue * (2 * u[8] - 1)))
    low, high = view.blur_sigma
    reach = view.translate * view.size
    top, left, h, w = _draw_box(view.crop_scale, view.crop_ratio, height, width, rng)
    return Drawn(
        *(top, left, h, w),
        flip=u[0] < view.flip,
        angle=view.rotate * (2 * u[1] - 1),
        shift=(reach * (2 * u[2] - 1), reach * (2 * u[3] - 1)),
        jitter=tuple((what, factor) for _, what, factor in sorted(jitter)),
        grayscale=u[13] < view.grayscale,
        sigma=low + (high - low) * u[15] if u[14] < view.blur else 0.0,
        solarize=u[16] < view.solarize,
        **_draw_others(view, seed),
    )


def _draw_others(view: View, seed: int) -> dict[str, Any]:
    """What came to be drawn after the rest, each operation from a stream of its own."""
    others: dict[str, Any] = {}
    if view.flip_vertical:
        others["flip_vertical"] = Random(f"flip {seed}").random() < view.flip_vertical
    if view.turn:
        whether, which = (rng.random() for rng in [Random(f"turn {seed}")] for _ in range(2))
        others["turn"] = int(4 * which) if whether < view.turn else 0
    if view.rand_augment:
        own = view.rand_augment, view.rand_magnitude, view.rand_std
        others["operations"] = draw_operations(*own, Random(f"rand {seed}"))
    if view.erase:
        rng = Random(f"erase {seed}")
        if rng.random() < view.erase:
            sides = (view.size, view.size)
            others["erase"] = _draw_box(view.erase_scale, view.erase_ratio, *sides, rng)
    return others


@lru_cache(maxsize=256)
def _reflected(size: int, radius: int) -> Tensor:
    """Pixel numbers (size, 2 radius + 1) under a window at each pixel, reflected at the border."""
    at = torch.arange(size)[:, None] + torch.arange(-radius, radius + 1)
    return (size - 1) - ((size - 1) - at.abs()).abs()


def _blur(image: Tensor, sigma: float) -> Tensor:
    """A square image blurred: G image G^T with the Gaussian's banded (size, size) matrix G.

    Two small products take a third of the time of torchvision's convolution, to 1e-6 the same; for
    larger images the convolution wins, in two passes once the kernel is large.
    """
    size = image.shape[-1]
    radius = min(math.ceil(3 * sigma), size - 1)  # reflection reaches no further
    taps = 2 * radius + 1
    if size <= _MATRIX_BLUR:
        weights = torch.arange(-radius, radius + 1).square().mul(-0.5 / sigma**2).softmax(0)
        at = _reflected(size, radius)
        g = torch.zeros(size, size).scatter_add_(1, at, weights.expand(size, taps))
        return g @ image @ g.T
    if taps <= 11:
        return F.gaussian_blur(image, [taps, taps], [sigma, sigma])
    rows = F.gaussian_blur(image, [taps, 1], [sigma, sigma])
    return F.gaussian_blur(rows, [1, taps], [sigma, sigma])


# DALI's: see image.py on linear color.
_YIQ = torch.tensor(
    [[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]], dtype=torch.float64
)
_RGB = torch.linalg.inv(_YIQ)


def color_matrix(saturation: float, hue: float) -> Tensor:
    """M (3, 3) float32 of image.py: the colors of RGB scaled and turned, `hue` in turns.

    >>> bool((color_matrix(1.0, 0.0) - torch.eye(3)).abs().max() < 1e-6)
    True
    """
    cos, sin = (saturation * f(2 * math.pi * hue) for f in (math.cos, math.sin))
    turn = torch.tensor([[1, 0, 0], [0, cos, sin], [0, -sin, cos]], dtype=torch.float64)
    return (_RGB @ turn @ _YIQ).float()


def _recolored(image: Tensor, p: Drawn) -> Tensor:
    """The jitter and the grayscale of p as one linear map, clamped at the end."""
    change = dict(p.jitter)
    b, c = (change.get(what, 1.0) for what in ("brightness", "contrast"))
    saturation = 0.0 if p.grayscale else change.get("saturation", 1.0)
    shift = b * (1 - c) * image.mean((-2, -1), keepdim=True)
    if image.shape[-3] != 3:
        return (b * c * image + shift.mean(-3, keepdim=True)).clamp_(0, 1)
    turned = b * c * color_matrix(saturation, change.get("hue", 0.0))
    shift = (_YIQ[0].float()[:, None, None] * shift).sum(-3, keepdim=True)
    return (turned @ image.flatten(-2)).view_as(image).add_(shift).clamp_(0, 1)


def _adjusted(image: Tensor, what: str, factor: float) -> Tensor:
    """Brightness and contrast of any number of channels, which torchvision's are not for."""
    if what == "brightness":
        return (factor * image).clamp_(0, 1)
    if what == "contrast":
        mean = image.mean((-3, -2, -1), keepdim=True)
        return (factor * image + (1 - factor) * mean).clamp_(0, 1)
    return image


def _jittered(image: Tensor, p: Drawn) -> Tensor:
    """The jitter and the grayscale of p, one after the other."""
    color = image.shape[-3] == 3
    for what, factor in p.jitter:
        if image.shape[-3] not in (1, 3):
            image = _adjusted(image, what, factor)
        elif color or what in ("brightness", "contrast"):
            image = _ADJUST[what](image, factor)
    if p.grayscale and color:
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    return image


def render(view: View, image: Tensor, p: Drawn) -> Tensor:
    """One view, (C, size, size) float32 in [0, 1], of a uint8 (C, H, W) image, to be normalized; of
    a float32 one in its own units.

    Images may stand behind other dimensions (..., C, H, W): all are treated alike.
    """
    box, side = (p.top, p.left, p.height, p.width), [view.size, view.size]
    out = F.resized_crop(image, *box, side, interpolation=InterpolationMode(view.interpolation))
    if p.flip:
        out = F.horizontal_flip(out)
    if p.flip_vertical:
        out = F.vertical_flip(out)
    if p.turn:
        out = torch.rot90(out, p.turn, (-2, -1))
    out = F.to_dtype(out, torch.float32, scale=True)
    if view.rotate or view.translate:
        bilinear = InterpolationMode.BILINEAR
        out = F.affine(out, p.angle, list(p.shift), 1.0, [0.0, 0.0], interpolation=bilinear)
    for what, amount in p.operations:
        out = apply_operation(out, what, amount)
    if p.jitter or p.grayscale:
        out = (_recolored if view.color == "linear" else _jittered)(out, p)
    if p.sigma:
        out = _blur(out, p.sigma)
    if p.solarize:
        out = F.solarize(out, view.solarize_threshold)
    return out


@lru_cache(maxsize=64)
def _column(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)


def _span(start: int, length: int, side: int, of: int) -> tuple[int, int]:
    """Where a stretch of an image of `of` pixels lies in one of `side` pixels: start, length."""
    first, end = (min(round(at * side / of), side) for at in (start, start + length))
    first = min(first, side - 1)
    return first, max(end - first, 1)


def shared(
    own: Drawn, other: Drawn, size: tuple[int, int], of: tuple[int, int], scale: float
) -> Drawn:
    """`own` at the place of `other`: its crop, flips, turn and move.

    size, of: height and width of the image of `own`, and of that of `other`.  scale: the side of
    the view of `own` over that of `other`.
    """
    top, height = _span(other.top, other.height, size[0], of[0])
    left, width = _span(other.left, other.width, size[1], of[1])
    return own._replace(
        **{"top": top, "left": left, "height": height, "width": width},
        flip=other.flip,
        flip_vertical=other.flip_vertical,
        turn=other.turn,
        angle=other.angle,
        shift=(other.shift[0] * scale, other.shift[1] * scale),
    )


def draw_views(views: Views, height: int, width: int, seed: int) -> list[Drawn]:
    """The parameters of every view, one for each of `views.crops`, of a height x width image.

    View v draws from (seed, v).  Crops are in pixels of the image, those within another view's too.
    """
    drawn: list[Drawn] = []
    for v, view in enumerate(views.crops):
        key = (seed << 16) | v
        if view.over is not None:
            whole, scale = (height, width), view.size / views.crops[view.over].size
            own = draw(view, height, width, key)
            drawn.append(shared(own, drawn[view.over], whole, whole, scale))
            continue
        if view.within is None:
            drawn.append(draw(view, height, width, key))
            continue
        outer = drawn[view.within]
        inner = draw(view, outer.height, outer.width, key)
        drawn.append(inner._replace(top=outer.top + inner.top, left=outer.left + inner.left))
    return drawn


def apply(views: Views, image: Tensor, seed: int) -> list[Tensor]:
    """Every view of one image: `views.count` tensors, (C, size, size) float32, normalized.

    image: (C, H, W) uint8, or float32 as it is.  seed: a non-negative integer; view v draws from
    (seed, v), so the same seed gives the same views, and torch's global generator is not touched.
    Raises ValueError for an image of another shape or dtype.
    """
    _check_image(views, image)
    _, height, width = image.shape
    return render_views(views, image, draw_views(views, height, width, seed))


def _check_image(views: Views, image: Tensor) -> None:
    if image.ndim != 3 or image.dtype not in (torch.uint8, torch.float32):
        got = f"{image.dtype} {list(image.shape)}"
        raise ValueError(f"image: want uint8 or float32 (C, H, W), got {got}")
    if image.dtype == torch.float32:
        views.check(image.shape[0], floats=True)


def render_views(views: Views, image: Tensor, drawn: Sequence[Drawn]) -> list[Tensor]:
    """`apply`, with the parameters of each view as they are given."""
    _check_image(views, image)
    mean, std = map(_column, views.normalization(image.shape[0]))
    out = []
    for view, p in zip(views.crops, drawn, strict=True):
        out.append(erased((render(view, image, p) - mean).div_(std), p))
    return out


def erased(view: Tensor, p: Drawn) -> Tensor:
    """`view` (..., H, W), normalized, with 0 written into p's rectangle."""
    top, left, height, width = p.erase
    view[..., top : top + height, left : left + width] = 0
    return view


def parameters(view: View, p: Drawn, shape: Sequence[int]) -> list[float]:
    """One number for each of PARAMETERS: what `render` does to an image of `shape` (C, H, W).

    An operation left out has its neutral value, as color changes have on one-channel images.  An
    upside-down flip is a left-right one and half a turn, and quarter turns are part of the angle.
    Neither the order of the color changes nor an erased rectangle is told.
    Raises ValueError for a view with operations of RandAugment, which have no columns.

    >>> view = View(size=8, rotate=90)
    >>> p = draw(view, 20, 10, seed=3)
    >>> parameters(view, p, (3, 20, 10))[:4]
    [0.0, 0.25, 1.0, 0.5]
    """
    if view.rand_augment:
        raise ValueError(
            f"rand_augment={view.rand_augment}: its operations cannot be told to a method that "
            "follows its views' parameters; give 0"
        )
    channels, height, width = shape
    change = dict(p.jitter)
    color = (change.get("saturation", 1.0) - 1, change.get("hue", 0.0), float(p.grayscale))
    angle = math.radians(p.angle - 90 * p.turn + 180 * p.flip_vertical)
    return [
        *(p.left / width, p.top / height, p.width / width, p.height / height),
        *(float(p.flip != p.flip_vertical), math.cos(angle), math.sin(angle)),
        *(shift / view.size for shift in p.shift),
        *(change.get(what, 1.0) - 1 for what in ("brightness", "contrast")),
        *(color if channels == 3 else (0.0, 0.0, 0.0)),
        *(p.sigma / view.size, float(p.solarize)),
    ]


def drawn_parameters(views: Views, shape: Sequence[int], seed: int) -> Tensor:
    """What `apply` does to an image of `shape` (C, H, W) for this seed: (V, P) float32.

    One row a view, one column for each of PARAMETERS.  The views are drawn again, which costs a
    thirtieth of rendering them at 48 pixels.
    """
    _, height, width = shape
    drawn = draw_views(views, height, width, seed)
    rows = [parameters(view, p, shape) for view, p in zip(views.crops, drawn, strict=True)]
    return torch.tensor(rows, dtype=torch.float32)
