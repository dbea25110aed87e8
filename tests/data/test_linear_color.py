"""Linear color: against its formula in float64, its laws, and DALI's color_twist."""

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import pytest
import torch
from nvidia.dali import pipeline_def

from fastssl.data.render.torchvision import Drawn, apply, color_matrix, render
from fastssl.data.views.image import View, preset

VIEW = View(size=24, color="linear")
IDENTITY = Drawn(0, 0, 24, 24, False, 0.0, (0.0, 0.0), (), False, 0.0, False)
LUMA = np.array([0.299, 0.587, 0.114])
TO_YIQ = np.array([LUMA, [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
CHANGES = [
    dict(brightness=1.3, contrast=0.6, saturation=1.4, hue=0.07),
    dict(brightness=0.5, contrast=1.7, saturation=0.2, hue=-0.2),
    dict(contrast=1.2, hue=0.5),
    dict(saturation=0.0),
    dict(brightness=1.8),
]


def image(channels=3, side=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (channels, side, side), generator=g, dtype=torch.uint8)


def formula(x, brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0):
    """The four changes one after the other, unclamped, each as its own matrix; x (3, H, W)."""
    to_rgb = np.linalg.inv(TO_YIQ)
    angle = 2 * np.pi * hue
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    y, i, q = np.einsum("ij,jhw->ihw", TO_YIQ, x)
    i, q = saturation * np.einsum("ij,jhw->ihw", turn, np.stack([i, q]))
    x = np.einsum("ij,jhw->ihw", to_rgb, np.stack([y, i, q]))
    x = brightness * x
    mean = np.einsum("i,ihw->hw", LUMA, x).mean()
    return contrast * x + (1 - contrast) * mean


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("grayscale", [False, True])
def test_is_its_formula_clamped_once(change, grayscale):
    x = image().double().numpy() / 255
    want = formula(x, **(change | ({"saturation": 0.0} if grayscale else {}))).clip(0, 1)
    p = IDENTITY._replace(jitter=tuple(change.items()), grayscale=grayscale)
    np.testing.assert_allclose(render(VIEW, image(), p).numpy(), want, atol=2e-6)


def test_the_order_of_the_changes_is_none():
    some = tuple(CHANGES[0].items())
    a, b = (render(VIEW, image(), IDENTITY._replace(jitter=j)) for j in (some, some[::-1]))
    assert torch.equal(a, b)


def test_luma_stays_and_grays_stay_gray():
    """Nearly: A is rounded."""
    gray = np.ones(3)
    for saturation, hue in [(0.3, 0.1), (1.6, -0.4)]:
        m = color_matrix(saturation, hue).numpy()
        np.testing.assert_allclose(LUMA @ m, LUMA, atol=1e-6)
        np.testing.assert_allclose(m @ gray, gray, atol=0.01)


def test_one_channel_has_brightness_and_contrast():
    x = image(1).double().numpy() / 255
    p = IDENTITY._replace(jitter=tuple(CHANGES[0].items()), grayscale=True)
    want = 1.3 * (0.6 * x + 0.4 * x.mean())
    np.testing.assert_allclose(render(VIEW, image(1), p).numpy(), want.clip(0, 1), atol=2e-6)


def twisted(x, **change):
    """DALI's color_twist, on the CPU, of a float image (H, W, 3)."""

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def pipe():
        given = fn.external_source(lambda: [x], dtype=types.FLOAT, ndim=3, layout="HWC", batch=True)
        return fn.color_twist(given, dtype=types.FLOAT, **change)

    built = pipe()
    built.build()
    (out,) = built.run()
    return np.array(out.at(0))


@pytest.mark.parametrize("saturation, hue", [(1.0, 0.0), (0.4, 0.0), (1.0, 0.1), (1.5, -0.35)])
def test_saturation_and_hue_are_dalis(saturation, hue):
    x = image().permute(1, 2, 0).float().contiguous().numpy() / 255
    want = twisted(x, saturation=saturation, hue=360 * hue)
    got = np.einsum("ij,hwj->hwi", color_matrix(saturation, hue).numpy(), x)
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_all_four_are_dalis_color_twist_but_for_the_center_of_contrast():
    """DALI's contrast is about 1/2; its own mean luma in that place is a shift."""
    b, c, s, h = CHANGES[0].values()
    x = image().permute(1, 2, 0).float().contiguous().numpy() / 255
    mean = float((x @ LUMA).mean())
    twist = twisted(x, brightness=b, contrast=c, saturation=s, hue=360 * h)
    want = twist + b * (1 - c) * (mean - 0.5)
    p = IDENTITY._replace(jitter=tuple(CHANGES[0].items()))
    got = render(VIEW, image(), p).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(got, want.clip(0, 1), atol=3e-6)


def test_what_is_drawn_does_not_depend_on_it():
    """Where nothing is clamped the two ways differ by their hues alone."""
    x = (image() // 4 + 96).to(torch.uint8)
    mild = dict(jitter=1.0, brightness=0.1, contrast=0.1, saturation=0.1, hue=0.0, grayscale=0.3)
    views = [preset("plain", 24, color=c, **mild) for c in ("sequential", "linear")]
    for seed in range(20):
        a, b = (apply(v, x, seed)[0] for v in views)
        assert (a - b).abs().max() < 1.2e-2  # of std .22: torchvision's luma is .2989, .587, .114
