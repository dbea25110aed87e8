"""The sheet of masks: every generator is on it, and its colors count what is seen."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch
from matplotlib.image import imread

from fastssl import masking

spec = spec_from_file_location("make_masks", Path(__file__).parents[2] / "docs/make_masks.py")
assert spec and spec.loader
masks = module_from_spec(spec)
spec.loader.exec_module(masks)


def test_the_sheet_is_written(tmp_path):
    masks.plot_masks(tmp_path / "masks.png")
    pixels = imread(tmp_path / "masks.png")
    assert pixels.ndim == 3 and min(pixels.shape[:2]) > 600
    shares = [((pixels[..., :3] - torch.tensor(c).numpy()) ** 2).sum(-1) < 1e-3 for c in colors()]
    assert all(share.mean() > 0.02 for share in shares)


def colors():
    return [[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in masks._COLORS]


def test_a_place_is_a_square_of_its_color():
    picture = masks._picture(torch.tensor([[0, 1], [2, 0]]))
    side = masks._PIXELS
    assert picture.shape == (3, 2 * side, 2 * side)
    for (row, column), index in {(0, 1): 1, (1, 0): 2, (1, 1): 0}.items():
        square = picture[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
        torch.testing.assert_close(
            square, torch.tensor(colors()[index])[:, None, None].expand_as(square)
        )


def test_every_generator_is_drawn():
    drawn = " ".join([*masks._ROWS, *masks._FRAMES]).replace("context, targets", "multi_block")
    names = {name.removesuffix("_masking") for name in vars(masking) if name.endswith("_masking")}
    words = {"time_frequency": "time, frequency", "running_cell": "dual", "column": "random"}
    assert [n for n in sorted(names) if words.get(n, n) not in drawn] == []
