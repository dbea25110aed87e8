"""The two back ends in distribution, over thousands of draws: the laws, and what they make of them.

Draws are one function of (seed, epoch, image), so that the back ends share them; what is left to
compare is pixels.  With linear color they are the same but for rounding.  DALI's stand-in for
sequential color is not, and this says by how much.
"""

import math

import pytest
import torch
from torch import Tensor

from fastssl.data.loader import PretrainLoader
from fastssl.data.render.backend import Rendering
from fastssl.data.render.torchvision import PARAMETERS, drawn_parameters
from fastssl.data.sources.folder import scan_folder
from fastssl.data.views.image import preset
from tests.data.photos import folder

COUNT, STEPS = 40, 10  # 400 draws of each of two views
LUMA = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    (source,) = scan_folder(folder(tmp_path_factory.mktemp("photos"), COUNT))
    return source


def batches(photos, views, rendering=None, **options):
    loader = PretrainLoader(
        photos, views, batch_size=COUNT, seed=11, rendering=rendering, **options
    )
    return list(loader.stream(0, STEPS))


def moments(views, made) -> Tensor:
    """Over all draws, values in [0, 1]: each channel's mean, spread over pixels and over images;
    the colorfulness and the contrast of an image, their means and spreads; nearly black, white."""
    x = torch.cat([views.shown(view) for batch in made for view in batch["views"]])
    chroma = (x.amax(1) - x.amin(1)).mean((1, 2))
    contrast = (x * LUMA).sum(1).std((1, 2))
    return torch.cat(
        [
            *(x.mean((0, 2, 3)), x.std((0, 2, 3)), x.mean((2, 3)).std(0)),
            torch.stack([chroma.mean(), chroma.std(), contrast.mean(), contrast.std()]),
            torch.stack([(x < 0.02).float().mean(), (x > 0.98).float().mean()]),
        ]
    )


@pytest.mark.parametrize("name", ["simclr", "byol"])
def test_moments_agree(photos, name):
    linear, sequential = (preset(name, 24, color=c) for c in ("linear", "sequential"))
    dali = moments(linear, batches(photos, linear, Rendering()))
    apart = (dali - moments(linear, batches(photos, linear))).abs()
    assert apart.max() < 0.004 and apart[:13].max() < 0.002
    stands_in = (dali - moments(sequential, batches(photos, sequential))).abs()
    assert 0.002 < stands_in.max() < 0.03  # what the clamps and the hue's plane make


def uniform(x: Tensor, low: float, high: float) -> float:
    """Kolmogorov's distance of x (N,) from the uniform law on [low, high], times sqrt(N)."""
    at = ((x.sort().values - low) / (high - low)).clamp(0, 1)
    steps = torch.arange(len(x) + 1) / len(x)
    distance = torch.maximum((at - steps[:-1]).abs().max(), (steps[1:] - at).abs().max())
    return float(distance) * math.sqrt(len(x))


def test_laws_of_the_draws():
    """On a square photo alone: the tries that a crop needs to fit bias its area on others.

    Of the draws, not of a loader's: those are the same, as tests/data/test_dali.py has it.
    """
    views = preset("simclr", 16, crop_scale=(0.1, 0.6), crop_ratio=(0.75, 1.3333))
    draws = [drawn_parameters(views, (3, 64, 64), seed) for seed in range(2000)]
    rows = torch.cat(draws)
    column = dict(zip(PARAMETERS, rows.T, strict=True))
    n = len(rows)
    assert n == 4000
    jittered = column["brightness"] != 0
    rates = {
        "flip": (column["flip"].mean(), 0.5),
        "jitter": (jittered.float().mean(), 0.8),
        "grayscale": (column["grayscale"].mean(), 0.2),
    }
    for what, (rate, p) in rates.items():
        assert abs(float(rate) - p) < 4 * math.sqrt(p * (1 - p) / n), what
    area, ratio = column["width"] * column["height"], column["width"] / column["height"]
    noise = 2 * torch.rand(n, generator=torch.Generator().manual_seed(0)) - 1  # of whole pixels
    assert uniform(area + 0.008 * noise, 0.1, 0.6) < 1.9
    assert uniform(ratio.log() + 0.02 * noise, math.log(0.75), math.log(4 / 3)) < 1.9
    for what in ("brightness", "contrast", "saturation"):
        reach = 0.4  # at 16 pixels color has half its strength
        assert uniform(column[what][jittered], -reach, reach) < 1.63  # one in a hundred
    assert uniform(column["hue"][jittered], -0.1, 0.1) < 1.63
