"""Presets: the key numbers of each paper, and overrides of all views, of one, of the local ones."""

import pytest

from fastssl.config import resolve
from fastssl.data.views.image import View, preset
from fastssl.data.views.presets import MULTI_CROP, PRESETS
from fastssl.methods import METHODS


def shape(views):
    """(size, count, crop_scale, interpolation) of each kind."""
    return [(v.size, v.count, v.crop_scale, v.interpolation) for v in views.views]


@pytest.mark.parametrize("name", ["byol", "barlow_twins", "vicreg", "mocov3"])
def test_byols_two_views(name):
    a, b = preset(name, 224).views
    assert (a.blur, a.solarize, b.blur, b.solarize) == (1.0, 0.0, 0.1, 0.2)
    for view in (a, b):
        color = view.brightness, view.contrast, view.saturation, view.hue
        assert (view.jitter, *color, view.grayscale) == (0.8, 0.4, 0.4, 0.2, 0.1, 0.2)
        assert (view.flip, view.crop_ratio, view.blur_sigma) == (0.5, (3 / 4, 4 / 3), (0.1, 2.0))
        mocov3 = ((0.2, 1.0), "bilinear")
        want = mocov3 if name == "mocov3" else ((0.08, 1.0), "bicubic")
        assert (view.crop_scale, view.interpolation) == want


MULTI = {
    "swav": [(224, 2, (0.14, 1.0), "bilinear"), (96, 6, (0.05, 0.14), "bilinear")],
    "dino": [
        *[(224, 1, (0.4, 1.0), "bicubic")] * 2,
        (96, 8, (0.05, 0.4), "bicubic"),
    ],
    "ibot": [*[(224, 1, (0.25, 1.0), "bicubic")] * 2, (96, 10, (0.05, 0.25), "bicubic")],
    **dict.fromkeys(
        ("dinov2", "dinov2_paper"),
        [*[(224, 1, (0.32, 1.0), "bicubic")] * 2, (96, 8, (0.05, 0.32), "bicubic")],
    ),
    "dinov3_gram": [
        *[(224, 1, (0.32, 1.0), "bicubic")] * 2,
        *[(448, 1, (0.32, 1.0), "bicubic")] * 2,
        (96, 8, (0.05, 0.32), "bicubic"),
    ],
    "msn": [(224, 2, (0.3, 1.0), "bilinear"), (96, 10, (0.05, 0.3), "bilinear")],
}


@pytest.mark.parametrize("name", MULTI)
def test_multi_crop(name):
    assert set(MULTI) == MULTI_CROP
    assert shape(preset(name, 224)) == MULTI[name]
    assert shape(preset(name, 224, local_count=0)) == MULTI[name][:-1]
    views = preset(name, 224, local={"blur": 0.0, "size": 64}, blur=0.9)
    assert {v.blur for v in views.views[:-1]} == {0.9}
    assert (views.views[-1].blur, views.views[-1].size) == (0.0, 64)


def test_dinov2_blurs_as_its_source_and_as_its_paper():
    blurs = {name: [v.blur for v in preset(name, 224).views] for name in MULTI if "dinov2" in name}
    assert blurs == {"dinov2": [0.0, 0.9, 0.5], "dinov2_paper": [1.0, 0.1, 0.5]}
    assert [v.solarize for v in preset("dinov2", 224).views] == [0.0, 0.2, 0.0]


def test_swav_and_msn_colors():
    strong, half = preset("swav", 224).views, preset("msn", 224).views
    assert all((v.jitter, v.brightness, v.hue, v.blur) == (0.8, 0.8, 0.2, 0.5) for v in strong)
    assert all((v.jitter, v.saturation, v.hue, v.blur) == (0.8, 0.4, 0.1, 0.5) for v in half)


def test_mocov2_is_a_weaker_simclr():
    assert shape(preset("mocov2", 224)) == [(224, 2, (0.2, 1.0), "bilinear")]
    (view,) = preset("mocov2", 224).views
    color = view.jitter, view.brightness, view.contrast, view.saturation, view.hue
    assert (*color, view.grayscale, view.blur) == (0.8, 0.4, 0.4, 0.4, 0.1, 0.2, 0.5)


def test_masked_images():
    assert shape(preset("mae", 224)) == [(224, 1, (0.2, 1.0), "bicubic")]
    assert shape(preset("simmim", 192)) == [(192, 1, (0.67, 1.0), "bilinear")]
    assert shape(preset("ijepa", 224)) == [(224, 1, (0.3, 1.0), "bilinear")]
    assert shape(preset("clip", 224)) == [(224, 1, (0.9, 1.0), "bicubic")]
    flips = {name: preset(name, 224).views[0].flip for name in ("mae", "simmim", "ijepa", "clip")}
    assert flips == {"mae": 0.5, "simmim": 0.5, "ijepa": 0.0, "clip": 0.0}


def test_crop_mae_has_its_second_view_within_the_first():
    first, second = preset("crop_mae", 224).views
    assert (first.crop_scale, first.within) == ((0.1, 1.0), None)
    assert (second.crop_scale, second.within) == ((0.3, 0.6), 0)
    assert first.flip == second.flip == 0.5


def test_rand_augment_is_deits():
    (view,) = preset("rand_augment", 224).views
    assert (view.rand_augment, view.rand_magnitude, view.rand_std) == (2, 9.0, 0.5)
    assert (view.erase, view.crop_scale, view.interpolation) == (0.25, (0.08, 1.0), "bicubic")


def test_aerial_has_every_symmetry():
    (view,) = preset("aerial", 64).views
    assert (view.count, view.flip, view.turn, view.jitter) == (2, 0.5, 1.0, 0.0)


@pytest.mark.parametrize("name", PRESETS)
def test_small_views_are_not_blurred(name):
    assert not any(view.blur for view in preset(name, 32).views)
    assert PRESETS[name].__doc__


def test_every_method_has_a_preset_of_its_number_of_views():
    for method in METHODS.values():
        if method.preset in PRESETS:
            least = method.views if isinstance(method.views, int) else method.views[0]
            wide = {"local_count": 0} if method.preset in MULTI_CROP else {}
            count = preset(method.preset, 32, **wide).count
            assert count == least if method.preset != "simclr" else count >= least
    wanted = {"byol": "byol", "mocov2": "mocov2", "swav": "swav", "msn": "msn"}
    wanted |= {"mocov3": "mocov3", "vicreg": "vicreg", "ijepa": "ijepa", "simmim": "simmim"}
    assert {name: METHODS[name].preset for name in wanted} == wanted


def test_one_view_alone_is_changed():
    views = preset("dino", 48, local_count=4, view3={"blur": 0.7, "size": 16}, flip=0.25)
    plain = preset("dino", 48, local_count=4, flip=0.25)
    assert [v.count for v in views.views] == [1, 1, 1, 1, 2]
    for number, (a, b) in enumerate(zip(views.crops, plain.crops, strict=True)):
        alike = a.model_copy(update={"count": 1}) == b.model_copy(update={"count": 1})
        assert alike == (number != 3)
    assert (views.crops[3].blur, views.crops[3].size, views.crops[3].flip) == (0.7, 16, 0.25)


def test_two_views_changed_alike_stay_one_kind():
    change = {"blur": 0.2}
    assert preset("simclr", 64, view0=change, view1=change) == preset("simclr", 64, blur=0.2)


def test_one_view_from_the_command_line():
    cfg = resolve("simclr-digits", ["data.overrides.view1.solarize=0.3"])
    assert [v.solarize for v in cfg.views().views] == [0.0, 0.3]


@pytest.mark.parametrize(
    "name, overrides, words",
    [
        ("simclr", {"view2": {"blur": 0}}, "view2 of preset 'simclr': give view0 to view1"),
        ("simclr", {"view1": 3}, "view1=3 of preset 'simclr': give a mapping"),
        ("simclr", {"view1": {"blurr": 3}}, "'view1' of preset 'simclr' 'blurr': did you mean"),
        ("simclr", {"view1": {"count": 3}}, "'view1' of preset 'simclr' 'count'"),
        ("simclr", {"local": {"blur": 0}}, "unknown override of preset 'simclr' 'local'"),
        ("dino", {"local": {"blurr": 0}}, "unknown override 'local' of preset 'dino' 'blurr'"),
        ("dino", {"local": {"blur": 0}, "local_count": 0}, "with local_count=0: drop one of them"),
        ("simclr", {"view0": {"within": 1}}, "within=1: the first view has no earlier one"),
        ("simclr", {"view1": {"within": 1}}, "within=1 of view 1 is not an earlier view: give 0"),
        ("mae", {"interpolation": "nearest"}, "'bilinear' or 'bicubic'"),
        ("mae", {"rand_augment": 17}, "less than or equal to 16"),
    ],
)
def test_refused(name, overrides, words):
    with pytest.raises(ValueError) as error:
        preset(name, 64, **overrides)
    assert words in str(error.value)


def test_within_may_be_given_to_several_views_of_one_kind():
    views = preset("dino", 48, local={"within": 1})
    assert [v.within for v in views.crops] == [None, None, *[1] * 8]
    assert View(size=8, within=0).within == 0  # whether it is earlier, the views together tell
