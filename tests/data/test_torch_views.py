"""Views: each operation against its formula in numpy, each draw against its law."""

import colorsys
import itertools
import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from fastssl.data.render.torchvision import (
    PARAMETERS,
    Drawn,
    apply,
    draw,
    drawn_parameters,
    parameters,
    render,
)
from fastssl.data.views.image import View, Views, preset

IDENTITY = Drawn(0, 0, 24, 24, False, 0.0, (0.0, 0.0), (), False, 0.0, False)
VIEW = View(size=24)


def image(channels=3, height=24, width=24):
    g = torch.Generator().manual_seed(channels * height + width)
    return torch.randint(0, 256, (channels, height, width), generator=g, dtype=torch.uint8)


def unit(x):
    return x.double().numpy() / 255


def luma(x):
    return (0.2989 * x[0] + 0.587 * x[1] + 0.114 * x[2])[None]


def hue_shifted(x, turns):
    out = np.empty_like(x)
    for r, c in np.ndindex(*x.shape[1:]):
        h, s, v = colorsys.rgb_to_hsv(*x[:, r, c])
        out[:, r, c] = colorsys.hsv_to_rgb((h + turns) % 1, s, v)
    return out


def blurred(x, sigma):
    radius = min(math.ceil(3 * sigma), x.shape[-1] - 1)
    w = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    w /= w.sum()
    for axis in (1, 2):
        pad = [(radius, radius) if a == axis else (0, 0) for a in range(3)]
        x = np.apply_along_axis(np.convolve, axis, np.pad(x, pad, mode="reflect"), w, "valid")
    return x


FORMULAS = {
    "flip": (dict(flip=True), lambda x: x[:, :, ::-1]),
    "brightness": (dict(jitter=(("brightness", 1.4),)), lambda x: (1.4 * x).clip(0, 1)),
    "contrast": (
        dict(jitter=(("contrast", 1.7),)),
        lambda x: (1.7 * x - 0.7 * luma(x).mean()).clip(0, 1),
    ),
    "saturation": (
        dict(jitter=(("saturation", 0.3),)),
        lambda x: (0.3 * x + 0.7 * luma(x)).clip(0, 1),
    ),
    "hue": (dict(jitter=(("hue", -0.13),)), lambda x: hue_shifted(x, -0.13)),
    "order": (
        dict(jitter=(("contrast", 1.7), ("brightness", 1.4))),
        lambda x: (1.4 * (1.7 * x - 0.7 * luma(x).mean()).clip(0, 1)).clip(0, 1),
    ),
    "grayscale": (dict(grayscale=True), lambda x: luma(x).repeat(3, 0)),
    "solarize": (dict(solarize=True), lambda x: np.where(x >= 0.5, 1 - x, x)),
    "blur": (dict(sigma=1.1), lambda x: blurred(x, 1.1)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_operation_is_its_formula(name):
    changes, formula = FORMULAS[name]
    got = render(VIEW, image(), IDENTITY._replace(**changes))
    assert got.shape == (3, 24, 24) and got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), formula(unit(image())), atol=2e-6)


@pytest.mark.parametrize("size, sigma", [(8, 2.9), (32, 0.2), (100, 2.0), (130, 1.0), (130, 2.5)])
@pytest.mark.parametrize("channels", [1, 3])
def test_blur_on_every_path(size, sigma, channels):
    x = image(channels, size, size)
    p = IDENTITY._replace(height=size, width=size, sigma=sigma)
    got = render(View(size=size), x, p)
    np.testing.assert_allclose(got.numpy(), blurred(unit(x), sigma), atol=2e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_crop_is_pillows(channels):
    x = image(channels, 40, 60)
    p = IDENTITY._replace(top=5, left=9, height=30, width=41)
    got = render(VIEW, x, p).mul(255)
    box = (9, 5, 50, 35)
    for c in range(channels):
        want = Image.fromarray(x[c].numpy()).crop(box).resize((24, 24), Image.Resampling.BILINEAR)
        assert np.abs(got[c].numpy() - np.asarray(want, float)).max() <= 1.01


def test_quarter_turn_and_shift():
    turned = render(View(size=24, rotate=90), image(), IDENTITY._replace(angle=-90.0))
    np.testing.assert_allclose(turned.numpy(), np.rot90(unit(image()), axes=(1, 2)), atol=1e-4)
    moved = render(View(size=24, translate=0.5), image(), IDENTITY._replace(shift=(3.0, -2.0)))
    want = np.zeros((3, 24, 24))
    want[:, :22, 3:] = unit(image())[:, 2:, :-3]
    np.testing.assert_allclose(moved.numpy(), want, atol=1e-4)


def test_one_channel_passes_color_unchanged():
    color = (("hue", 0.4), ("saturation", 0.1))
    x = image(1)
    got = render(VIEW, x, IDENTITY._replace(jitter=color, grayscale=True))
    np.testing.assert_allclose(got.numpy(), unit(x), atol=1e-6)


def test_plain_view_is_the_centered_square_normalized():
    views = Views(views=(View(size=24),), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    (got,) = apply(views, image(3, 24, 36), seed=3)
    mean, std = (np.array(v)[:, None, None] for v in (views.mean, views.std))
    want = (unit(image(3, 24, 36))[:, :, 6:30] - mean) / std
    np.testing.assert_allclose(got.numpy(), want, atol=3e-6)


def test_normalization_of_one_channel_by_three_is_their_average():
    views = Views(views=(View(size=24),), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    (got,) = apply(views, image(1), seed=3)
    np.testing.assert_allclose(got.numpy(), (unit(image(1)) - 0.2) / 0.6, atol=2e-6)


def test_whole_view_applies_its_drawn_operations_in_order():
    view = preset("simclr", 24, blur=1, jitter=1, grayscale=0.5, solarize=1, flip=1).views[0]
    for seed in range(4):
        p = draw(view, 24, 24, seed)
        x = unit(torch.round(render(VIEW, image(), IDENTITY._replace(**_crop(p))) * 255))
        x = x[:, :, ::-1]
        for what, factor in p.jitter:
            if what == "hue":
                x = hue_shifted(x, factor)
            else:
                other = {"brightness": 0 * x, "contrast": luma(x).mean(), "saturation": luma(x)}
                x = (factor * x + (1 - factor) * other[what]).clip(0, 1)
        x = luma(x).repeat(3, 0) if p.grayscale else x
        x = blurred(x, p.sigma)
        want = np.where(x >= 0.5, 1 - x, x)
        got = render(view, image(), p).numpy()
        near = np.abs(x - 0.5) > 1e-4  # at the threshold a rounding decides
        np.testing.assert_allclose(got[near], want[near], atol=1e-4)


def _crop(p):
    return {key: getattr(p, key) for key in ("top", "left", "height", "width")}


def test_views_come_in_order_and_differ():
    views = preset("dino", 48, local_count=3)
    got = apply(views, image(3, 60, 50), seed=11)
    assert [tuple(v.shape) for v in got] == [(3, 48, 48)] * 2 + [(3, 24, 24)] * 3
    assert not torch.equal(got[0], got[1]) and not torch.equal(got[3], got[4])


def test_no_view_of_one_seed_is_one_of_the_next():
    views = Views(views=(View(size=16, count=4, rotate=180),))
    got = [view for seed in range(4) for view in apply(views, image(), seed)]
    assert len({view.numpy().tobytes() for view in got}) == 16


def test_pure_in_the_seed_and_no_global_generator_touched():
    views = preset("simclr", 32, blur=0.5)
    states = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    once, again, other = (apply(views, image(), seed) for seed in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert not torch.equal(once[0], other[0])
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all() and states[2] == random.getstate()


def test_the_image_is_not_written_to():
    x = image()
    before = x.clone()
    apply(preset("simclr", 24, solarize=1), x, 1)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    "image, words",
    [
        (torch.zeros(24, 24, dtype=torch.uint8), "image: want uint8 or float32 .C, H, W"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "got torch.int64"),
        (torch.zeros(4, 8, 8, dtype=torch.uint8), "mean has 3 numbers .* images have 4 channels"),
        (torch.zeros(3, 8, 8), "images are float32, in units of their own: give mean and std"),
    ],
)
def test_other_images_are_refused(image, words):
    with pytest.raises(ValueError, match=words):
        apply(preset("plain", 8), image, 0)


N = 6000


def draws(height=512, width=512, **fields):
    view = View(size=32, **fields)
    return [draw(view, height, width, seed) for seed in range(N)]


def assert_uniform(values, low, high):
    u = (np.sort(values) - low) / (high - low)
    assert u.min() >= 0 and u.max() <= 1
    distance = np.abs(u - (np.arange(len(u)) + 0.5) / len(u)).max()
    assert distance < 1.95 / math.sqrt(len(u))  # Kolmogorov and Smirnov, p = 0.001


def test_crop_area_is_uniform():
    got = draws(4096, 4096, crop_scale=(0.1, 0.9))
    assert all(p.height == p.width for p in got)
    assert_uniform([p.height**2 / 4096**2 for p in got], 0.0995, 0.9005)


def test_crop_ratio_and_place_are_uniform():
    got = draws(4096, 4096, crop_scale=(0.2, 0.3), crop_ratio=(0.5, 2))
    assert_uniform([math.log(p.width / p.height) for p in got], -0.694, 0.694)
    assert_uniform([p.top / (4096 - p.height) for p in got], 0, 1)
    assert_uniform([p.left / (4096 - p.width) for p in got], 0, 1)
    assert_uniform([p.height * p.width / 4096**2 for p in got], 0.1995, 0.3005)


def test_crop_law_with_refusals_is_torchvisions():
    scale, ratio = (0.3, 1.0), (3 / 4, 4 / 3)
    blank = torch.zeros(3, 60, 100)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        crop = v2.RandomResizedCrop(8, scale, ratio)
        theirs = [crop.make_params([blank]) for _ in range(3000)]
    ours = draws(60, 100, crop_scale=scale, crop_ratio=ratio)
    for key in ("top", "left", "height", "width"):
        a, b = (np.sort(x) for x in ([getattr(p, key) for p in ours], [t[key] for t in theirs]))
        at = np.unique(np.concatenate([a, b]))
        gap = np.searchsorted(a, at, "right") / len(a) - np.searchsorted(b, at, "right") / len(b)
        assert np.abs(gap).max() < 1.95 * math.sqrt(1 / len(a) + 1 / len(b)), key


@pytest.mark.parametrize("height, width", [(1, 1), (3, 1000), (1000, 3), (8, 8), (224, 500)])
def test_crop_stays_inside(height, width):
    view = preset("simclr", 8).views[0]
    for seed in range(300):
        p = draw(view, height, width, seed)
        assert 0 <= p.top <= height - p.height and 0 <= p.left <= width - p.width
        assert p.height > 0 and p.width > 0


@pytest.mark.parametrize(
    "height, width, crop", [(100, 10, (43, 0, 13, 10)), (10, 100, (0, 43, 10, 13))]
)
def test_crop_that_never_fits_is_the_largest_within_the_ratios(height, width, crop):
    assert draw(View(size=8, crop_ratio=(3 / 4, 4 / 3)), height, width, 0)[:4] == crop


def test_probabilities_and_their_independence():
    got = draws(
        flip=0.3, jitter=0.7, brightness=1, grayscale=0.2, blur=0.4, solarize=0.6, contrast=0.4
    )
    seen = np.array(
        [[p.flip, bool(p.jitter), p.grayscale, p.sigma > 0, p.solarize] for p in got], float
    )
    want = np.array([0.3, 0.7, 0.2, 0.4, 0.6])
    assert (np.abs(seen.mean(0) - want) < 4 * np.sqrt(want * (1 - want) / N)).all()
    off = np.corrcoef(seen.T) - np.eye(5)
    assert np.abs(off).max() < 4 / math.sqrt(N)


def test_never_and_always():
    got = draws(flip=1, jitter=1, hue=0.1, grayscale=0, blur=1, solarize=0)
    assert all(p.flip and p.jitter and p.sigma for p in got)
    assert not any(p.grayscale or p.solarize for p in got)


def test_factor_laws_and_random_order():
    got = draws(jitter=1, brightness=0.4, contrast=1.5, saturation=0.2, hue=0.1)
    factors = [dict(p.jitter) for p in got]
    assert_uniform([f["brightness"] for f in factors], 0.6, 1.4)
    assert_uniform([f["contrast"] for f in factors], 0, 2.5)
    assert_uniform([f["saturation"] for f in factors], 0.8, 1.2)
    assert_uniform([f["hue"] for f in factors], -0.1, 0.1)
    together = np.corrcoef([[f[key] for f in factors] for key in sorted(factors[0])])
    assert np.abs(together - np.eye(4)).max() < 4 / math.sqrt(N)
    orders = [tuple(what for what, _ in p.jitter) for p in got]
    counts = [orders.count(o) for o in itertools.permutations(factors[0])]
    assert sum(counts) == N
    assert sum((c - N / 24) ** 2 / (N / 24) for c in counts) < 49.7  # chi-squared, 23, p = 0.001


def test_blur_rotation_and_shift_laws():
    got = draws(blur=1, blur_sigma=(0.5, 1.5), rotate=20, translate=0.25)
    assert_uniform([p.sigma for p in got], 0.5, 1.5)
    assert_uniform([p.angle for p in got], -20, 20)
    for axis in (0, 1):
        assert_uniform([p.shift[axis] for p in got], -8, 8)


def test_one_operation_leaves_the_others_as_they_were():
    full = preset("simclr", 32, blur=0.5, solarize=0.5).views[0]
    less = full.model_copy(update={"flip": 0.0, "jitter": 0.0})
    for seed in range(50):
        a, b = (draw(view, 40, 50, seed) for view in (full, less))
        assert a._replace(flip=b.flip, jitter=b.jitter) == b


def named(view, p, shape):
    return dict(zip(PARAMETERS, parameters(view, p, shape), strict=True))


@pytest.mark.parametrize("seed", range(6))
def test_parameters_say_where_each_pixel_came_from(seed):
    """On an image that holds its own coordinates, a view's pixels are what the parameters say."""
    height, width = 40, 56
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ramps = torch.stack([4 * x, 4 * y, 0 * x]).to(torch.uint8)
    view = preset("plain", 32, rotate=180, translate=0.2, crop_scale=(0.4, 0.7), flip=0.5)
    (view,) = view.views
    p = draw(view, height, width, seed)
    told = named(view, p, ramps.shape)
    at = (torch.arange(32) + 0.5) / 32 - 0.5
    v = torch.stack([at.expand(32, 32), at[:, None].expand(32, 32)], -1)
    v = v - torch.tensor([told["shift_x"], told["shift_y"]])
    turn = torch.tensor([[told["cos"], -told["sin"]], [told["sin"], told["cos"]]])
    u = v @ turn  # turned back
    if told["flip"]:
        u[..., 0] = -u[..., 0]
    left, top = (told["left"] + told["width"] / 2) * width, (told["top"] + told["height"] / 2) * 40
    source = u * torch.tensor([told["width"] * width, told["height"] * height])
    source += torch.tensor([left, top]) - 0.5  # a pixel's value stands at its center
    got = render(view, ramps, p)[:2].permute(1, 2, 0) * 255 / 4
    inside = (u.abs() < 0.42).all(-1)
    assert inside.sum() > 300
    assert (got - source)[inside].abs().max() < 0.4


def test_parameters_of_known_changes():
    jitter = (("hue", -0.1), ("contrast", 0.7), ("saturation", 1.5), ("brightness", 1.25))
    p = IDENTITY._replace(jitter=jitter, grayscale=True, sigma=1.2, solarize=True, shift=(6.0, -3))
    got = named(VIEW, p, (3, 24, 24))
    want = {"brightness": 0.25, "contrast": -0.3, "saturation": 0.5, "hue": -0.1, "sigma": 0.05}
    want |= {"grayscale": 1, "solarize": 1, "shift_x": 0.25, "shift_y": -0.125}
    assert {key: got[key] for key in want} == pytest.approx(want)
    gray = named(VIEW, p, (1, 24, 24))
    assert [gray[key] for key in ("saturation", "hue", "grayscale")] == [0, 0, 0]
    assert gray["brightness"] == 0.25 and gray["solarize"] == 1


def test_parameters_of_nothing_done_are_neutral():
    neutral = dict.fromkeys(PARAMETERS, 0.0) | {"width": 1.0, "height": 1.0, "cos": 1.0}
    assert named(VIEW, IDENTITY, (3, 24, 24)) == neutral
    (row,) = drawn_parameters(preset("plain", 24), (3, 24, 24), 5)
    assert row.tolist() == list(neutral.values())


def test_drawn_parameters_are_those_of_the_views_that_apply_makes():
    views = preset("dino", 48, local_count=2, rotate=30, solarize=0.5)
    x = image(3, 60, 50)
    rows = drawn_parameters(views, x.shape, 11)
    assert rows.shape == (4, len(PARAMETERS)) and rows.dtype == torch.float32
    made = apply(views, x, 11)
    mean, std = (torch.tensor(v)[:, None, None] for v in (views.mean, views.std))
    for v, (view, row) in enumerate(zip(views.crops, rows, strict=True)):
        p = draw(view, 60, 50, (11 << 16) | v)
        assert torch.equal((render(view, x, p) - mean) / std, made[v])
        torch.testing.assert_close(row, torch.tensor(parameters(view, p, x.shape)))
    assert len({tuple(row) for row in rows[:, :4].tolist()}) == 4
