"""The augmentation spec: what presets hold, and what is refused with which words."""

import pytest
from pydantic import ValidationError

from fastssl.data.views.image import PRESETS, View, Views, preset


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip_through_json(name):
    views = preset(name, 64)
    assert Views.model_validate_json(views.model_dump_json()) == views
    assert views.count == len(views.crops) == sum(v.count for v in views.views)


def test_every_field_is_described():
    for model in (View, Views):
        assert all(field.description for field in model.model_fields.values())


def _color(view):
    return view.jitter, view.brightness, view.contrast, view.saturation, view.hue


def test_simclr():
    views = preset("simclr", 96)
    (view,) = views.views
    assert (views.count, view.size, view.crop_scale) == (2, 96, (0.08, 1.0))
    assert (view.brightness, view.hue, view.grayscale, view.blur) == (0.8, 0.2, 0.2, 0.5)


def test_simclr_at_cifars_size_has_half_the_color_and_no_blur():
    view = preset("simclr", 32).views[0]
    assert _color(view) == (0.8, 0.4, 0.4, 0.4, 0.1) and view.blur == 0
    assert _color(preset("simclr", 33).views[0]) == (0.8, 0.8, 0.8, 0.8, 0.2)


def test_published_numbers():
    for name in ("barlow_twins", "dino"):
        for view in preset(name, 224).views:
            assert _color(view) == (0.8, 0.4, 0.4, 0.2, 0.1)
            assert (view.flip, view.grayscale, view.blur_sigma) == (0.5, 0.2, (0.1, 2.0))
    crops = {
        "barlow_twins": [(0.08, 1.0)] * 2,
        "mae": [(0.2, 1.0)],
        "dino": [(0.4, 1.0), (0.4, 1.0), (0.05, 0.4)],
    }
    for name, scales in crops.items():
        assert [view.crop_scale for view in preset(name, 224).views] == scales


def test_barlow_twins_views_are_unequal():
    a, b = preset("barlow_twins", 224).views
    assert (a.blur, a.solarize, b.blur, b.solarize) == (1.0, 0.0, 0.1, 0.2)
    assert a.model_copy(update={"blur": b.blur, "solarize": b.solarize}) == b


def test_dino_has_global_then_local_views():
    views = preset("dino", 224, local_count=6)
    assert [v.size for v in views.crops] == [224, 224, *[96] * 6]
    assert preset("dino", 224, local_count=0).count == 2
    assert preset("dino", 224, local_size=48).crops[-1].size == 48


def test_mae_and_plain_leave_the_colors():
    for name in ("mae", "plain"):
        (view,) = preset(name, 64).views
        assert view.jitter == view.grayscale == view.blur == view.solarize == 0
    assert preset("mae", 64).views[0].flip == 0.5 and preset("plain", 64).views[0].flip == 0


def test_overrides_reach_every_view_and_the_normalization():
    views = preset("barlow_twins", 32, flip=0, crop_scale=(0.5, 1), mean=(0.5,), std=(0.2,))
    assert all(v.flip == 0 and v.crop_scale == (0.5, 1) for v in views.views)
    assert (views.mean, views.std) == ((0.5,), (0.2,))


@pytest.mark.parametrize(
    "name, overrides, words",
    [
        ("simclrr", {}, "unknown preset 'simclrr': did you mean 'simclr'?"),
        (
            "xyz",
            {},
            "unknown preset 'xyz': valid are simclr, barlow_twins, mae, crop_mae, dino, plain",
        ),
        ("mae", {"flipp": 1}, "unknown override of preset 'mae' 'flipp': did you mean 'flip'?"),
        ("mae", {"solarizes": 1}, "did you mean 'solarize'?"),
        ("mae", {"local_count": 2}, "unknown override of preset 'mae' 'local_count'"),
        ("mae", {"flip": 1.5}, "less than or equal to 1"),
        ("mae", {"crop_scale": (0.9, 0.2)}, "the low end 0.9 is above the high end 0.2"),
        ("mae", {"mean": ()}, "want one number, or one for each channel, got none"),
        ("mae", {"std": (0.0,)}, "greater than 0"),
        ("mae", {"mean": (float("nan"),)}, "finite number"),
    ],
)
def test_refused(name, overrides, words):
    with pytest.raises(ValueError) as error:
        preset(name, 32, **overrides)
    assert words in str(error.value)


def test_spec_is_frozen_and_closed():
    view = View(size=32)
    with pytest.raises(ValidationError, match="frozen"):
        view.size = 64
    with pytest.raises(ValidationError, match="Extra inputs"):
        View.model_validate({"size": 32, "sharpen": 1})
