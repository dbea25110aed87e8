"""How one view lies to another, from what both were drawn with: against pixels, and its laws."""

import torch
import torch.nn.functional as F

from fastssl.data.render import torchvision as torch_views
from fastssl.data.render.torchvision import draw, parameters, render
from fastssl.data.views.image import View
from fastssl.methods import base
from fastssl.methods.sie import frame_change, relation

FREE = {"rotate": 180, "translate": 0.3, "crop_scale": (0.2, 0.9), "crop_ratio": (0.5, 2.0)}


def views(count, seed=0, height=40, width=56, **fields):
    """The parameters (count, P) of as many views of one image, and how each was drawn."""
    view = View(size=32, **{**FREE, "flip": 0.5, **fields})
    drawn = [draw(view, height, width, 100 * seed + i) for i in range(count)]
    return torch.tensor([parameters(view, p, (3, height, width)) for p in drawn]), view, drawn


def test_the_columns_are_those_that_the_data_have():
    assert base.PARAMETERS == torch_views.PARAMETERS


def test_the_frame_change_takes_one_views_pixels_to_the_others():
    """On an image that holds its own coordinates, a pixel of the second view has the value that the
    first has where the frame change, turned round, puts it."""
    y, x = torch.meshgrid(torch.arange(120), torch.arange(160), indexing="ij")
    image = torch.stack([x, 2 * y, 0 * x]).to(torch.uint8)
    p, view, drawn = views(12, height=120, width=160, crop_scale=(0.4, 0.9))
    seen = torch.stack([render(view, image, d) * 255 for d in drawn])
    at = (torch.arange(32) + 0.5) / 32 - 0.5
    grid = torch.stack([at.expand(32, 32), at[:, None].expand(32, 32)], -1)
    compared = 0
    for a in range(0, 12, 2):
        M, d = (x[0] for x in frame_change(p[a + 1 : a + 2], p[a : a + 1]))  # from second to first
        source = grid @ M.T + d
        sampled = F.grid_sample(seen[a, None], 2 * source[None], align_corners=False)[0]
        both = torch.stack([sampled, seen[a + 1]])
        shown = (both[:, :2] > 20).all(0).all(0)  # no black of either: it has been averaged in
        inner = torch.zeros(32, 32, dtype=torch.bool)
        inner[4:-4, 4:-4] = True
        shown &= inner & (source.abs() < 0.4).all(-1)
        wrong = (both[0] - both[1]).abs()[:2, shown]
        assert wrong.numel() == 0 or wrong.median() < 1.5, (a, wrong.median())
        compared += wrong.numel()
    assert compared > 500


def test_frame_changes_compose_and_turn_round():
    p, *_ = views(60)
    a, b, c = p.double().chunk(3)
    (M_1, d_1), (M_2, d_2), (M, d) = (frame_change(*pair) for pair in ((a, b), (b, c), (a, c)))
    torch.testing.assert_close(M_2 @ M_1, M)
    torch.testing.assert_close((M_2 @ d_1.unsqueeze(2)).squeeze(2) + d_2, d)
    M_same, d_same = frame_change(a, a)
    torch.testing.assert_close(M_same, torch.eye(2).expand(20, 2, 2).double())
    torch.testing.assert_close(d_same, torch.zeros(20, 2).double(), atol=1e-6, rtol=0)


def test_rotation_is_the_relative_turn_whatever_the_crop():
    p, _, drawn = views(20, flip=0)
    angles = torch.tensor([d.angle for d in drawn]).deg2rad()
    between = angles[10:] - angles[:10]
    got = relation(p[:10], p[10:], "rotation")
    want = [between.cos(), -between.sin(), between.sin(), between.cos()]
    torch.testing.assert_close(got, torch.stack(want, 1), atol=1e-6, rtol=0)


def test_relations_stand_side_by_side():
    p, *_ = views(8, jitter=1.0, brightness=0.5, hue=0.2, solarize=0.5)
    whole = relation(p[:4], p[4:], "color", "geometry")
    assert whole.shape == (4, 13)
    assert torch.equal(whole[:, :7], p[4:, 9:] - p[:4, 9:])
    M, d = frame_change(p[:4], p[4:])
    assert torch.equal(whole[:, 7:], torch.cat([M.flatten(1), d], 1))
