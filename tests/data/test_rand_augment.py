"""RandAugment: each operation against a formula or Pillow, the draws against their laws."""

import math
from collections import Counter
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms import v2

from fastssl.data.render.torchvision import apply, draw, drawn_parameters
from fastssl.data.views.image import View, preset
from fastssl.data.views.rand_augment import OPERATIONS, apply_operation, draw_operations

N = 20_000


def image(side=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    low = torch.rand(3, 6, 6, generator=g)
    return torch.nn.functional.interpolate(low[None], (side, side), mode="bilinear")[0]


def pillow(x):
    return Image.fromarray(x.mul(255).round().byte().permute(1, 2, 0).numpy())


def unit(picture):
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


BYTES = {
    "brightness": (1.4, lambda p: ImageEnhance.Brightness(p).enhance(1.4)),
    "saturation": (0.3, lambda p: ImageEnhance.Color(p).enhance(0.3)),
    "contrast": (1.6, lambda p: ImageEnhance.Contrast(p).enhance(1.6)),
    "sharpness": (0.2, lambda p: ImageEnhance.Sharpness(p).enhance(0.2)),
    "posterize": (4.0, lambda p: ImageOps.posterize(p, 4)),
    "solarize": (0.5, lambda p: ImageOps.solarize(p, 128)),
    "autocontrast": (0.0, ImageOps.autocontrast),
    "equalize": (0.0, ImageOps.equalize),
}


@pytest.mark.parametrize("what", BYTES)
def test_colors_are_pillows(what):
    amount, theirs = BYTES[what]
    x = unit(pillow(image()))
    # Pillow rounds to bytes; of 4 bits a byte's upper ones are kept, and n / 256 told of n / 255
    off = 1 / 16 if what == "posterize" else 2 / 255
    assert (apply_operation(x, what, amount) - unit(theirs(pillow(x)))).abs().max() <= off


def moved(x, matrix, offset):
    """x at the places matrix @ (x, y) + offset, about the center, bilinear, black outside."""
    side = x.shape[-1]
    at = torch.arange(side) - (side - 1) / 2
    where = torch.stack(torch.meshgrid(at, at, indexing="xy"), -1) @ torch.tensor(matrix).T
    grid = (where + torch.tensor(offset)) / (side / 2)
    args = dict(mode="bilinear", padding_mode="zeros", align_corners=False)
    return torch.nn.functional.grid_sample(x[None], grid[None], **args)[0]


ANGLE = math.radians(20.0)
MOVES = {
    "shear_x": (0.3, [[1.0, 0.3], [0.0, 1.0]], [0.0, 0.0]),
    "shear_y": (0.3, [[1.0, 0.0], [0.3, 1.0]], [0.0, 0.0]),
    "translate_x": (0.25, [[1.0, 0.0], [0.0, 1.0]], [-6.0, 0.0]),
    "translate_y": (-0.25, [[1.0, 0.0], [0.0, 1.0]], [0.0, 6.0]),
    "rotate": (
        20.0,
        [[math.cos(ANGLE), -math.sin(ANGLE)], [math.sin(ANGLE), math.cos(ANGLE)]],
        [0.0, 0.0],
    ),
}


@pytest.mark.parametrize("what", MOVES)
def test_moves_are_their_matrices(what):
    amount, matrix, offset = MOVES[what]
    got = apply_operation(image(), what, amount)
    inner = (slice(None), slice(4, -4), slice(4, -4))
    torch.testing.assert_close(got[inner], moved(image(), matrix, offset)[inner], atol=2e-3, rtol=0)


@pytest.mark.parametrize("what", OPERATIONS)
def test_no_magnitude_is_no_change(what):
    """All but those that have none."""
    amounts = {amount for w, amount in draw_operations(5000, 0.0, 0.0, Random(1)) if w == what}
    for amount in amounts:
        changed = not torch.allclose(apply_operation(image(), what, amount), image(), atol=1e-5)
        assert changed == (what in ("autocontrast", "equalize"))
    assert amounts


@pytest.mark.parametrize("what", OPERATIONS)
def test_values_stay_in_range_on_one_channel_and_on_clips(what):
    for x in (image()[:1], torch.stack([image(), image(seed=1)])):
        for w, amount in draw_operations(300, 10.0, 0.0, Random(2)):
            if w == what:
                out = apply_operation(x, w, amount)
                assert out.shape == x.shape and 0 <= out.min() and out.max() <= 1
    alone = apply_operation(image(seed=1), what, 1.0)
    both = apply_operation(torch.stack([image(), image(seed=1)]), what, 1.0)
    torch.testing.assert_close(both[1], alone)


def test_every_operation_is_as_likely():
    counts = Counter(what for what, _ in draw_operations(N, 9.0, 0.5, Random(0)))
    assert set(counts) == set(OPERATIONS)
    p = 1 / len(OPERATIONS)
    assert all(abs(c / N - p) < 4.5 * math.sqrt(p * (1 - p) / N) for c in counts.values())


def test_magnitudes_are_normal_and_their_signs_even():
    drawn = draw_operations(N, 6.0, 1.5, Random(0))
    turns = np.array([amount for what, amount in drawn if what == "rotate"]) / 3
    m = np.abs(turns)
    assert abs(m.mean() - 6) < 4 * 1.5 / math.sqrt(len(m))
    assert abs(m.std() - 1.5) < 0.1 and m.max() <= 10
    assert abs((turns > 0).mean() - 0.5) < 2 / math.sqrt(len(m))
    assert {a for w, a in draw_operations(500, 9.0, 0.0, Random(0)) if w == "posterize"} == {4.0}


def test_the_view_applies_what_is_drawn_after_its_move():
    view = preset("plain", 24, rand_augment=3).views[0]
    raw = image(side=24).mul(255).round().byte()
    norm = {"mean": (0.0,), "std": (1.0,)}
    for seed in range(6):
        p = draw(view, 24, 24, (seed << 16) | 0)
        want = raw / 255
        for what, amount in p.operations:
            want = apply_operation(want, what, amount)
        (got,) = apply(preset("plain", 24, rand_augment=3, **norm), raw, seed)
        torch.testing.assert_close(got, want)
        assert len(p.operations) == 3


def test_its_draws_leave_the_others_as_they_were():
    full = preset("rand_augment", 32, jitter=0.5, brightness=0.4, turn=0.5).views[0]
    for off in ({"rand_augment": 0}, {"erase": 0.0}, {"turn": 0.0}):
        less = full.model_copy(update=off)
        for seed in range(30):
            a, b = (draw(view, 40, 50, seed) for view in (full, less))
            same = {"operations": b.operations, "erase": b.erase, "turn": b.turn}
            assert a._replace(**same) == b
            changed = {"rand_augment": "operations"}.get(*off, *off)
            assert all(getattr(a, k) == v for k, v in same.items() if k != changed)


def test_it_cannot_be_told():
    with pytest.raises(ValueError, match="rand_augment=2: its operations cannot be told"):
        drawn_parameters(preset("rand_augment", 32), (3, 40, 40), 0)


def test_no_operations_by_default():
    assert draw(View(size=8), 9, 9, 0).operations == ()


@pytest.mark.parametrize("magnitude, bin_", [(10.0, 30), (5.0, 15), (2.0, 6)])
def test_amounts_are_torchvisions(magnitude, bin_):
    """Magnitudes 0 to 10 are its bins 0 to 30, of an image of 100 pixels."""
    table = v2.RandAugment._AUGMENTATION_SPACE
    theirs = {
        **{"shear_x": "ShearX", "shear_y": "ShearY", "rotate": "Rotate", "saturation": "Color"},
        **{"translate_x": "TranslateX", "translate_y": "TranslateY", "contrast": "Contrast"},
        **{"brightness": "Brightness", "sharpness": "Sharpness", "posterize": "Posterize"},
        "solarize": "Solarize",
    }
    for what, amount in draw_operations(500, magnitude, 0.0, Random(0)):
        if what in theirs:
            values, _ = table[theirs[what]]
            want = float(values(31, 100, 100)[bin_])
            got = amount
            if what in ("brightness", "saturation", "contrast", "sharpness"):
                got = amount - 1
            elif what.startswith("translate"):
                got = 100 * amount
            assert abs(got) == pytest.approx(want, abs=1e-5), what
