"""Generated clips: motions as named, looks that tell nothing; views that treat all frames alike."""

import numpy as np
import pytest
import torch

from fastssl.data.render.torchvision import draw, render
from fastssl.data.synthetic.clips import MOTIONS, ClipsSource, clip, path
from fastssl.data.views.clip import ClipViews
from fastssl.data.views.spec import apply, view_spec

SHAPE = (3, 8, 24)
TIMES = np.linspace(0, 1, 9)


def test_deterministic_and_sized():
    a = clip(1, 2, 3, SHAPE)
    assert a.shape == (3, 8, 24, 24) and a.dtype == torch.uint8 and a.is_contiguous()
    assert torch.equal(a, clip(1, 2, 3, SHAPE))
    assert clip(1, 2, 3, (1, 5, 16)).shape == (1, 5, 16, 16)


def test_every_number_matters():
    clips = [clip(*key, SHAPE) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]]
    assert len({x.numpy().tobytes() for x in clips}) == 4


@pytest.mark.parametrize("motion", MOTIONS)
def test_paths_begin_at_rest_and_move_as_named(motion):
    moves = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
    for seed in range(5):
        shift, turn = path(motion, TIMES, np.random.default_rng(seed))
        assert shift.shape == (9, 2) and not shift[0].any() and turn[0] == 0
        way = np.linalg.norm(np.diff(shift, axis=0), axis=1)
        if motion in moves:
            np.testing.assert_array_equal(np.sign(shift[1:]), [moves[motion]] * 8)
            assert 0.5 <= np.abs(shift[-1]).max() <= 1
        elif "clockwise" in motion and "orbit" not in motion:
            sign = 1 if motion == "clockwise" else -1
            assert not shift.any() and (np.sign(turn[1:]) == sign).all()
        elif "orbit" in motion:
            center = shift[0] - 0.25 * shift_of_start(shift)
            radius = np.linalg.norm(shift - center, axis=1)
            np.testing.assert_allclose(radius, 0.25, atol=1e-6)
            (ax, ay), (bx, by) = shift[1:3] - center
            assert np.sign(ax * by - ay * bx) == (
                1 if motion == "orbit clockwise" else -1
            )  # y points down
        elif motion in ("accelerate", "brake"):
            faster = np.diff(way) > 0
            assert faster.all() if motion == "accelerate" else not faster.any()
        elif motion == "still":
            assert not shift.any() and not turn.any()
        else:
            assert way.any() and np.linalg.norm(shift, axis=1).max() <= 0.25


def shift_of_start(shift):
    """The unit vector to the start from the center of the circle through three points."""
    (ax, ay), (bx, by), (cx, cy) = shift[0], shift[3], shift[6]
    rows = 2 * np.array([[bx - ax, by - ay], [cx - ax, cy - ay]])
    center = np.linalg.solve(rows, [bx**2 - ax**2 + by**2 - ay**2, cx**2 - ax**2 + cy**2 - ay**2])
    return (shift[0] - center) / np.linalg.norm(shift[0] - center)


def moved(x, step):
    """How alike a clip's neighboring frames are, the later one moved back: (H, W) -> a number."""
    back = torch.roll(x[:, 1:], (-step[1], -step[0]), (2, 3))
    return (back - x[:, :-1]).abs().mean()


def test_pixels_move_as_the_class_says():
    """Half a side at the least over 8 frames: a pixel or more a frame, on a torus."""
    hits = 0
    for label, step in enumerate([(1, 0), (-1, 0), (0, 1), (0, -1)]):
        for instance in range(8):
            x = clip(0, label, instance, (3, 12, 24)).float()
            k = 2 * np.array(step)
            errors = {s: moved(x, (s * k).tolist()) for s in (1, -1)}
            hits += errors[1] < errors[-1]
    assert hits >= 29  # of 32


def test_one_frame_does_not_tell_the_class():
    """The middle frames' pixels, to the nearest class mean: near chance, 1 in 8."""
    frames = torch.stack(
        [torch.stack([clip(0, c, i, SHAPE)[:, 4] for i in range(24)]) for c in range(8)]
    )
    x = frames.double().flatten(2)
    means = x[:, :16].mean(1)
    guesses = torch.cdist(x[:, 16:].flatten(0, 1), means).argmin(1)
    assert (guesses == torch.arange(8).repeat_interleave(8)).double().mean() < 0.35


def test_the_source_names_and_selects():
    (source,) = ClipsSource(classes=3, per_class=4, frames=4, size=16, seed=5).open()
    assert len(source) == 12 and source.channels == 3 and source.classes == MOTIONS[:3]
    assert source.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    part = source.select(np.array([7, 2]))
    assert part.name(0) == "left/3" and part.labels.tolist() == [1, 0]
    assert torch.equal(part.item(0), source.item(7))
    assert torch.equal(source.item(7), clip(5, 1, 3, (3, 4, 16)))


def random_clip(frames=10, height=20, width=28):
    return torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (3, frames, height, width), np.uint8)
    )


def test_all_frames_are_cropped_and_flipped_as_one():
    """A clip of one frame repeated gives a view of one frame repeated."""
    still = random_clip(1).expand(-1, 10, -1, -1)
    spec = ClipViews.preset(16, frames=6, crop_scale=(0.1, 0.6))
    for seed in range(8):
        (view,) = spec.apply(still, seed)
        assert view.shape == (3, 6, 16, 16) and (view == view[:, :1]).all()


def test_half_of_the_views_are_flipped():
    item = random_clip(2, 16, 16)
    whole = {"frames": 2, "crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}
    plain = ClipViews.preset(16, flip=0.0, **whole).apply(item, 0)[0]
    views = [ClipViews.preset(16, flip=0.5, **whole).apply(item, seed)[0] for seed in range(64)]
    same = [torch.equal(v, plain) for v in views]
    assert all(s or torch.equal(v, plain.flip(3)) for s, v in zip(same, views, strict=True))
    assert 20 < sum(same) < 44


def test_frames_are_a_stretch_with_a_stride():
    item = torch.arange(20, dtype=torch.uint8).view(1, 20, 1, 1).expand(1, 20, 8, 8)
    spec = ClipViews.preset(8, frames=4, stride=3, flip=0.0, mean=0.0, std=1 / 255)
    starts = set()
    for seed in range(200):
        times = spec.apply(item, seed)[0][0, :, 0, 0].round().int()
        assert (times.diff() == 3).all()
        starts.add(int(times[0]))
    assert starts == set(range(20 - 9))  # each possible one, and no other
    middle = spec.evaluation().apply(item, 0)[0][0, :, 0, 0].round().int()
    assert middle.tolist() == [5, 8, 11, 14]
    short = ClipViews.preset(8, frames=4, stride=9, flip=0.0, mean=0.0, std=1 / 255).apply(item, 3)[
        0
    ]
    assert short[0, :, 0, 0].round().int().tolist() == [0, 9, 18, 19]


def test_views_are_pure_functions_of_item_and_seed():
    item = random_clip()
    spec = ClipViews.preset(16, frames=6, count=2)
    a, b = apply(spec, item, 3), apply(spec, item, 3)
    assert len(a) == 2 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0], a[1]) and not torch.equal(a[0], apply(spec, item, 4)[0])
    assert [tuple(x.shape) for x in a] == spec.shapes(3)


def test_evaluation_is_plain_whatever_the_seed():
    item = random_clip(10, 16, 16)
    plain = ClipViews.preset(16, frames=6, count=3).evaluation()
    (view,) = plain.apply(item, 0)
    assert torch.equal(view, plain.apply(item, 9)[0])
    torch.testing.assert_close(plain.shown(view), item[:, 2:8].float() / 255)
    assert plain.evaluation() == plain


def test_bad_items_and_options_are_refused():
    spec = view_spec("clips", 16)
    assert isinstance(spec, ClipViews)
    for bad in (random_clip().float(), random_clip()[:, 0], random_clip()[:2]):
        with pytest.raises(ValueError, match="want uint8"):
            spec.apply(bad, 0)
    with pytest.raises(ValueError, match="did you mean 'frames'"):
        view_spec("clips", 16, frame=4)
    with pytest.raises(ValueError, match="low end"):
        ClipViews.preset(16, crop_scale=(0.9, 0.5))


def test_plain_clips_are_white_on_black():
    plain, own = (clip(0, 2, 5, (1, 4, 32), plain) for plain in (True, False))
    bright = plain > 127
    assert 0.02 < bright.float().mean() < 0.5
    assert (plain[bright].float().mean() > 235) and (plain[~bright].float().mean() < 20)
    assert not torch.equal(plain, own)


COLORS = dict(jitter=1.0, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)


@pytest.mark.parametrize("color", ["sequential", "linear"])
def test_all_frames_are_recolored_blurred_and_turned_as_one(color):
    still = random_clip(1, 16, 16).expand(-1, 6, -1, -1)
    spec = ClipViews.preset(
        16, frames=6, rotate=30, blur=1.0, grayscale=0.3, color=color, **COLORS, flip=0.5
    )
    for seed in range(6):
        (view,) = spec.apply(still, seed)
        assert (view == view[:, :1]).all()


@pytest.mark.parametrize("color", ["sequential", "linear"])
def test_each_frame_is_the_image_view_of_the_same_draw(color):
    """The laws are those of images: frame by frame, with the clip's key."""
    item = random_clip(4, 24, 30)
    look = dict(rotate=20, grayscale=0.3, blur=0.5, color=color, **COLORS)
    spec = ClipViews.preset(40, frames=4, **look)
    for seed in range(5):
        (view,) = spec.apply(item, seed)
        p = draw(spec.look, 24, 30, seed << 16)
        frames = [render(spec.look, item[:, t], p) for t in range(4)]
        want = (torch.stack(frames, 1) - spec.mean) / spec.std
        torch.testing.assert_close(view, want, atol=1e-5, rtol=0)


def test_colors_leave_crops_flips_and_starts_as_they_were():
    plain, full = ClipViews.preset(16), ClipViews.preset(16, blur=0.5, grayscale=0.2, **COLORS)
    for seed in range(20):
        a, b = (draw(spec.look, 20, 28, seed) for spec in (plain, full))
        assert (*a[:5], a.turn) == (*b[:5], b.turn)


def test_evaluation_leaves_colors():
    item = random_clip(10, 16, 16)
    plain = ClipViews.preset(
        16, frames=6, rotate=20, blur=1.0, grayscale=1.0, **COLORS
    ).evaluation()
    assert torch.equal(
        plain.apply(item, 0)[0], ClipViews.preset(16, frames=6).evaluation().apply(item, 1)[0]
    )
