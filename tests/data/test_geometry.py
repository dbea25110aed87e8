"""Crops within crops, bicubic crops, flips, quarter turns, and erased rectangles."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.data.render.torchvision import (
    PARAMETERS,
    Drawn,
    apply,
    draw,
    draw_views,
    drawn_parameters,
    parameters,
    render,
)
from fastssl.data.views.image import View, Views, preset

IDENTITY = Drawn(0, 0, 24, 24, False, 0.0, (0.0, 0.0), (), False, 0.0, False)
N = 4000


def image(height=24, width=24, channels=3):
    g = torch.Generator().manual_seed(height * width)
    return torch.randint(0, 256, (channels, height, width), generator=g, dtype=torch.uint8)


def test_a_view_within_another_lies_in_its_crop_and_has_its_share():
    views = preset("crop_mae", 32)
    shares, places = [], []
    for seed in range(N):
        a, b = draw_views(views, 500, 700, seed)
        assert a.top <= b.top and b.top + b.height <= a.top + a.height
        assert a.left <= b.left and b.left + b.width <= a.left + a.width
        shares.append(b.height * b.width / (a.height * a.width))
        places.append((b.top - a.top) / max(a.height - b.height, 1))
    shares, places = np.sort(shares), np.sort(places)
    fits = (shares > 0.29) & (shares < 0.61)
    assert fits.mean() > 0.99  # else none of 10 tries fits, and it is as large as it can be
    u = np.arange(N) / N
    assert np.abs((shares - 0.3) / 0.3 - u).max() < 0.06 and np.abs(places - u).max() < 0.06


def test_crop_mae_at_scale_of_the_image():
    """The first view's area is uniform, as without a second."""
    views, alone = preset("crop_mae", 32), Views(views=preset("crop_mae", 32).views[:1])
    for seed in range(50):
        assert draw_views(views, 60, 80, seed)[0] == draw_views(alone, 60, 80, seed)[0]


def test_views_within_are_drawn_from_their_own_keys():
    views = preset("dino", 32, local_count=3, local={"within": 1})
    for seed in range(40):
        drawn = draw_views(views, 90, 70, seed)
        outer = drawn[1]
        for v in (2, 3, 4):
            inner = draw(views.crops[v], outer.height, outer.width, (seed << 16) | v)
            at = {"top": inner.top + outer.top, "left": inner.left + outer.left}
            assert drawn[v] == inner._replace(**at)
        assert drawn[:2] == [draw(views.crops[v], 90, 70, (seed << 16) | v) for v in (0, 1)]


def test_a_view_over_another_is_at_its_place_in_its_own_size():
    views = preset("dinov3_gram", 16, local_count=2)
    assert [view.size for view in views.crops] == [16, 16, 32, 32, 8, 8]
    x = image(60, 50)
    for seed in range(8):
        drawn = draw_views(views, 60, 50, seed)
        for g in (0, 1):
            assert drawn[2 + g][:7] == drawn[g][:7] and not drawn[2 + g].jitter
        plain = draw_views(preset("dinov2", 16, local_count=2), 60, 50, seed)
        assert drawn[:2] == plain[:2]
        made = apply(views, x, seed)
        box = render(View(size=32, interpolation="bicubic"), x, drawn[2]._replace(flip=False))
        box = box.flip(-1) if drawn[2].flip else box
        norm = (torch.tensor(v)[:, None, None] for v in (views.mean, views.std))
        mean, std = norm
        assert torch.equal(made[2], (box - mean) / std)
    with pytest.raises(ValueError, match="lies over=0, whose crop_scale is .* and has crop_scale"):
        preset("dinov3_gram", 16, view2={"crop_scale": (0.5, 1.0)})
    with pytest.raises(ValueError, match="over=0: the first view has no earlier one"):
        Views(views=(View(size=8, over=0),))


def test_apply_and_the_parameters_follow_the_crops_within():
    views = preset("crop_mae", 16, flip=0.0)
    x = image(50, 60)
    for seed in range(5):
        made, rows = apply(views, x, seed), drawn_parameters(views, x.shape, seed)
        for view, p, got, row in zip(
            views.crops, draw_views(views, 50, 60, seed), made, rows, strict=True
        ):
            norm = (torch.tensor(v)[:, None, None] for v in (views.mean, views.std))
            mean, std = norm
            assert torch.equal(got, (render(view, x, p) - mean) / std)
            box = [p.left / 60, p.top / 50, p.width / 60, p.height / 50]
            torch.testing.assert_close(row[:4], torch.tensor(box))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [12, 40])
def test_bicubic_is_pillows_clamped(channels, size):
    x = image(33, 41, channels)
    p = IDENTITY._replace(top=3, left=5, height=25, width=21)
    got = render(View(size=size, interpolation="bicubic"), x, p)
    for c in range(channels):
        crop = Image.fromarray(x[c].numpy()).crop((5, 3, 26, 28))
        want = np.asarray(crop.resize((size, size), Image.Resampling.BICUBIC)) / 255
        assert np.abs(got[c].numpy() - want).max() < 1.01 / 255
    assert size < 25 or (got.min() == 0 and got.max() == 1)
    assert not torch.equal(got, render(View(size=size), x, p))


def test_evaluation_keeps_the_interpolation():
    assert preset("mae", 32).evaluation().views[0].interpolation == "bicubic"
    assert preset("ijepa", 32).evaluation().views[0].interpolation == "bilinear"


def test_flips_and_turns_are_numpys():
    x = image().numpy() / 255
    p = IDENTITY._replace(flip=True, flip_vertical=True, turn=3)
    want = np.rot90(x[:, ::-1, ::-1], 3, axes=(1, 2))
    np.testing.assert_allclose(render(View(size=24), image(), p).numpy(), want, atol=1e-6)
    (turned,) = (render(View(size=24), image(), IDENTITY._replace(turn=1)),)
    np.testing.assert_allclose(turned.numpy(), np.rot90(x, axes=(1, 2)), atol=1e-6)


def test_flips_and_turns_have_their_rates():
    view = View(size=24, flip_vertical=0.3, turn=0.6)
    drawn = [draw(view, 24, 24, seed) for seed in range(N)]
    up = sum(p.flip_vertical for p in drawn) / N
    turns = Counter(p.turn for p in drawn)
    assert abs(up - 0.3) < 4 * math.sqrt(0.21 / N)
    for quarters, want in ((0, 0.4 + 0.15), (1, 0.15), (2, 0.15), (3, 0.15)):
        assert abs(turns[quarters] / N - want) < 4 * math.sqrt(want * (1 - want) / N)
    both = np.corrcoef([p.flip_vertical for p in drawn], [p.turn for p in drawn])[0, 1]
    assert abs(both) < 4 / math.sqrt(N)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("turn", [0, 1, 2, 3])
def test_the_parameters_tell_every_symmetry(flip, up, turn):
    """On an image of its own coordinates the pixels lie where cos, sin and flip put them."""
    at = (torch.arange(24) + 0.5) / 24 - 0.5
    ramps = torch.stack([at.expand(24, 24), at[:, None].expand(24, 24), 0 * at.expand(24, 24)])
    x = ((ramps + 0.5) * 255).round().byte()
    p = IDENTITY._replace(flip=flip, flip_vertical=up, turn=turn)
    told = dict(zip(PARAMETERS, parameters(View(size=24), p, x.shape), strict=True))
    v = torch.stack([at.expand(24, 24), at[:, None].expand(24, 24)], -1)
    u = v @ torch.tensor([[told["cos"], -told["sin"]], [told["sin"], told["cos"]]])
    if told["flip"]:
        u[..., 0] = -u[..., 0]
    got = render(View(size=24), x, p)[:2].permute(1, 2, 0) - 0.5
    torch.testing.assert_close(got, u, atol=5e-3, rtol=0)


def test_erased_rectangles_have_their_law():
    view = View(size=200, erase=0.4, erase_scale=(0.1, 0.3), erase_ratio=(0.5, 2.0))
    boxes = [draw(view, 30, 30, seed).erase for seed in range(N)]
    some = np.array([box for box in boxes if box[2]])
    assert abs(len(some) / N - 0.4) < 4 * math.sqrt(0.24 / N)
    top, left, height, width = some.T
    assert (top + height <= 200).all() and (left + width <= 200).all()
    u = (np.arange(len(some)) + 0.5) / len(some)
    slack = 2.2 / math.sqrt(len(some))
    assert np.abs((np.sort(height * width / 200**2) - 0.1) / 0.2 - u).max() < slack
    ratio = (np.sort(np.log(width / height)) + math.log(2)) / math.log(4)
    assert np.abs(ratio - u).max() < slack
    assert np.abs(np.sort(top / (200 - height)) - u).max() < slack


def test_erased_is_zero_after_the_normalization_and_nothing_else_moves():
    views, whole = (preset("plain", 24, erase=e, erase_scale=(0.2, 0.2)) for e in (1.0, 0.0))
    got, want = (apply(v, image(), 7)[0] for v in (views, whole))
    (p,) = draw_views(views, 24, 24, 7)
    top, left, height, width = p.erase
    inside = torch.zeros(24, 24, dtype=torch.bool)
    inside[top : top + height, left : left + width] = True
    assert 60 < inside.sum() < 160 and (got[:, inside] == 0).all()
    assert torch.equal(got[:, ~inside], want[:, ~inside])
