"""Images of any number of channels, and of float32 in units of their own."""

import numpy as np
import pytest
import torch

from fastssl.data.datasets import ArraysSource
from fastssl.data.render.torchvision import apply
from fastssl.data.views.image import View, Views, preset


def image(channels, side=20):
    g = torch.Generator().manual_seed(channels)
    return torch.randint(0, 256, (channels, side, side), generator=g, dtype=torch.uint8)


@pytest.mark.parametrize("color", ["sequential", "linear"])
def test_each_channel_has_its_own_normalization_and_colors_are_those_of_gray(color):
    """Of equal channels each is changed as the single one of a gray image is."""
    options = {"jitter": 1.0, "brightness": 0.6, "contrast": 0.6, "hue": 0.1, "saturation": 0.5}
    options |= {"grayscale": 1.0, "solarize": 0.5, "blur": 0.5, "flip": 0.5, "color": color}
    mean, std = (0.1, 0.2, 0.3, 0.4, 0.5), (0.5, 1.0, 2.0, 0.25, 0.1)
    view = View(size=16, crop_scale=(0.3, 1.0), **options)
    gray = image(1)
    for seed in range(12):
        (one,) = apply(Views(views=(view,), mean=(0.0,), std=(1.0,)), gray, seed)
        (five,) = apply(Views(views=(view,), mean=mean, std=std), gray.expand(5, -1, -1), seed)
        back = five * torch.tensor(std).view(5, 1, 1) + torch.tensor(mean).view(5, 1, 1)
        torch.testing.assert_close(back, one.expand(5, -1, -1), rtol=0, atol=2e-6)
    # Contrast is around the mean over all channels.
    flat = torch.stack([torch.full((8, 8), 110), torch.full((8, 8), 130)]).to(torch.uint8)
    plain = Views(
        views=(View(size=8, jitter=1, contrast=0.9, color=color),), mean=(0.0,), std=(1.0,)
    )
    for seed in range(4):
        (made,) = apply(plain, flat, seed)
        assert abs(made.mean() - 120 / 255) < 1e-5 and not torch.allclose(made, flat / 255)


def test_floats_are_cropped_and_normalized_in_their_own_units():
    depth = 1000 + 500 * torch.rand(1, 40, 40, generator=torch.Generator().manual_seed(0))
    views = preset("mae", 16, mean=(1250.0,), std=(100.0,), flip=1.0)
    (made,) = apply(views, depth, 3)
    bytes_ = ((depth - 1000) / 500 * 255).round().to(torch.uint8)
    (other,) = apply(preset("mae", 16, mean=(0.5,), std=(0.2,), flip=1.0), bytes_, 3)
    torch.testing.assert_close(made, other, rtol=0, atol=0.03)  # of a crop rounded to bytes
    shown = views.shown(made)
    assert shown.min() == 0 and shown.max() == 1


def test_views_that_do_not_fit_the_channels():
    three = preset("mae", 16)
    for views, channels, floats, words in [
        (three, 4, False, r"mean has 3 numbers .ImageNet's., and images have 4 channels: give one"),
        (preset("mae", 16, mean=(0.1,), std=(0.1, 0.2)), 3, False, "std has 2 numbers, and images"),
        (preset("mae", 16, mean=(0.1, 0.2), std=(0.1,)), 1, False, "mean has 2 numbers"),
        (preset("rand_augment", 16, mean=(0.1,), std=(0.1,)), 4, False, "rand_augment is for 1 or"),
        (three, 1, True, "images are float32, in units of their own: give mean and std"),
        (preset("mae", 16, mean=(9.0,)), 1, True, "are float32, in units of their own"),
        (preset("mae", 16, mean=(1, 2, 3)), 3, True, "are float32, in units of their own"),
        (preset("mae", 16, mean=(1, 2, 3), std=(1,)), 1, True, "are float32, in units of"),
        (preset("simclr", 16, mean=(9.0,), std=(1.0,)), 1, True, "jitter is for bytes"),
    ]:
        with pytest.raises(ValueError, match=words):
            views.check(channels, floats=floats)
    three.check(1)
    three.check(3)
    preset("simclr", 16, mean=(0.5,), std=(0.2,)).check(7)


def test_arrays_of_any_number_of_channels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 6, 7, 5)).astype(np.uint8)
    np.save(tmp_path / "a.npy", pixels)
    (source,) = ArraysSource(path=tmp_path / "a.npy", layout="NHWC").open()
    assert source.channels == 5
    assert np.array_equal(source.item(2).numpy(), pixels[2].transpose(2, 0, 1))
