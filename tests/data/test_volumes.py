"""Volumes: the generated ones, and each operation of a view against its formula."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as V

from fastssl.data.synthetic.volumes import SOLIDS, VolumesSource, distance, volume
from fastssl.data.views.spec import apply, view_spec
from fastssl.data.views.volume import VolumeViews

WHOLE = {"crop_scale": (1.0, 1.0), "flip": 0.0, "mean": 0.0, "std": 1.0}
N = 400


def item(depth=12, height=16, width=20, channels=1, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.random((channels, depth, height, width), np.float32))


def one(x, seed, size=16, **fields):
    (view,) = VolumeViews.preset(size, **{**WHOLE, **fields}).apply(x, seed)
    return view


def components(inside):
    """How many pieces: neighbors by faces, labels spread until they rest."""
    labels = np.arange(1, inside.size + 1).reshape(inside.shape) * inside
    while True:
        grown = labels
        for axis in range(3):
            for step in (1, -1):
                grown = np.maximum(grown, np.roll(grown, step, axis))
        grown = grown * inside
        if (grown == labels).all():
            return len(np.unique(labels)) - 1
        labels = grown


TOPOLOGY = {  # pieces inside, pieces outside
    **{"ball": (1, 1), "shell": (1, 2), "ring": (1, 1), "rod": (1, 1)},
    **{"pair": (2, 1), "three": (3, 1), "core": (2, 2), "links": (2, 1)},
}


def euler(inside):
    """Vertices - edges + faces - cells of the cubes: pieces - handles + cavities."""
    total = 0
    padded = np.pad(inside, 1)
    for axes in range(8):
        cells = padded
        for axis in range(3):
            if axes >> axis & 1:  # a face of a cell is that of either neighbor
                cells = cells | np.roll(cells, 1, axis)
        total += (-1) ** (3 - bin(axes).count("1")) * int(cells.sum())
    return total


@pytest.mark.parametrize("solid", SOLIDS)
def test_each_solid_has_its_topology(solid):
    at = np.stack(np.mgrid[:48, :48, :48], -1) / 48 + 0.5 / 48 - 0.5
    inside = distance(solid, at) < 0
    assert not inside[[0, -1]].any() and not inside[:, :, [0, -1]].any()
    pieces, outer = components(inside), components(~inside)
    assert (pieces, outer) == TOPOLOGY[solid]
    handles = {"ring": 1, "links": 2}.get(solid, 0)
    assert euler(inside) == pieces - handles + (outer - 1)


def test_a_volume_is_its_seed_label_and_instance():
    a = volume(0, 1, 2, (1, 20))
    assert a.shape == (1, 20, 20, 20) and a.dtype == torch.uint8
    assert torch.equal(a, volume(0, 1, 2, (1, 20)))
    for other in (volume(1, 1, 2, (1, 20)), volume(0, 2, 2, (1, 20)), volume(0, 1, 3, (1, 20))):
        assert not torch.equal(a, other)
    assert volume(0, 7, 0, (3, 12)).shape == (3, 12, 12, 12)


def test_solids_stand_out_either_way():
    """The middle voxels of a ball are as often brighter than the corner's as darker."""
    brighter = 0
    for instance in range(40):
        x = volume(0, 0, instance, (1, 16)).float()[0]
        brighter += bool(x[6:10, 6:10, 6:10].mean() > x[:3, :3, :3].mean())
    assert 9 < brighter < 31


def test_the_source_names_and_selects():
    (source,) = VolumesSource(classes=3, per_class=4, size=12, seed=5).open()
    assert len(source) == 12 and source.channels == 1 and source.classes == SOLIDS[:3]
    part = source.select(np.array([7, 2]))
    assert part.name(0) == "shell/3" and part.labels.tolist() == [1, 0]
    assert torch.equal(source.item(7), volume(5, 1, 3, (1, 12)))


def test_resizing_up_is_trilinear():
    x = item()
    want = F.interpolate(x[None], (18, 24, 24), mode="trilinear", align_corners=False)[0]
    torch.testing.assert_close(one(x, 0, size=24, depth=18), want)


def test_resizing_down_has_antialiasing():
    """Depth kept, each slice is torchvision's."""
    x = item(8, 40, 60)
    want = V.resize(x[0][:, None], [16, 16], antialias=True)[:, 0]
    torch.testing.assert_close(one(x, 0, depth=8)[0], want, atol=1e-5, rtol=0)


def test_bytes_are_in_0_1():
    x = (item() * 255).round().byte()
    torch.testing.assert_close(one(x, 0), one(x.float() / 255, 0))


def test_crops_have_their_volume_and_place():
    """On a volume that holds its own coordinates a view tells what it was cut from."""
    side, size = 48, 8
    at = (torch.arange(side) + 0.5) / side
    axes = torch.meshgrid(at, at, at, indexing="ij")
    x = torch.stack(axes)
    spec = VolumeViews.preset(
        size, **{**WHOLE, "crop_scale": (0.2, 0.8), "crop_ratio": (0.8, 1.25)}
    )
    volumes, ratios, places = [], [], []
    for seed in range(300):
        (view,) = spec.apply(x, seed)
        ramps = [view[a].movedim(a, 0)[:, 0, 0] for a in range(3)]
        sides = [(ramp[5] - ramp[2]) * size / 3 for ramp in ramps]  # away from the border
        volumes.append(math.prod(s.item() for s in sides))
        ratios.append(math.log(sides[0] / sides[1]))
        start = ramps[2][3].item() - sides[2].item() * 3.5 / size
        if sides[2] < 0.99:
            places.append(start / (1 - sides[2].item()))
        assert all(view[a].amin() >= 0 and view[a].amax() <= 1 for a in range(3))
    u = (np.arange(300) + 0.5) / 300
    assert np.abs((np.sort(volumes) - 0.2) / 0.6 - u).max() < 0.1
    assert len(places) > 270
    assert np.abs(np.sort(places) - u[: len(places)] * 300 / len(places)).max() < 0.12
    assert abs(np.mean(ratios)) < 0.03 and np.abs(ratios).max() < 2 * math.log(1.25) + 0.1


def test_flips_are_of_each_axis_and_have_their_rate():
    x = item(8, 8, 8)
    seen = Counter()
    for seed in range(N):
        view = one(x, seed, size=8, flip=0.3)
        for flips in range(8):
            axes = [a for a in (1, 2, 3) if flips >> (a - 1) & 1]
            if torch.allclose(view, x.flip(axes), atol=1e-6):
                seen[flips] += 1
    assert sum(seen.values()) == N
    for flips, count in seen.items():
        k = bin(flips).count("1")
        p = 0.3**k * 0.7 ** (3 - k)
        assert abs(count / N - p) < 4 * math.sqrt(p * (1 - p) / N)


def test_turns_are_rotations_and_reach_all_of_them():
    x = item(6, 6, 6)
    whole = set()
    for seed in range(300):
        whole.add(one(x, seed, size=6, turn=1.0).numpy().round(4).tobytes())
    group, queue = {x.numpy().round(4).tobytes()}, [x]
    while queue:
        y = queue.pop()
        for plane in ((1, 2), (1, 3), (2, 3)):
            z = torch.rot90(y, 1, plane)
            key = z.contiguous().numpy().round(4).tobytes()
            if key not in group:
                group.add(key)
                queue.append(z)
    assert len(group) == 24 and len(whole) == 24
    flat = {one(x, s, size=6, depth=3, turn=1.0).numpy().round(4).tobytes() for s in range(60)}
    assert len(flat) == 4  # about the depth alone


def test_blur_is_the_gaussian_at_rest_and_of_its_width():
    point = torch.zeros(1, 15, 15, 15)
    point[0, 7, 7, 7] = 1
    view = one(point, 3, size=15, blur=1.0, blur_sigma=(1.2, 1.2))
    taps = np.exp(-0.5 * (np.arange(-7, 8) / 1.2) ** 2) * (abs(np.arange(-7, 8)) <= 4)
    taps /= taps.sum()
    want = taps[:, None, None] * taps[:, None] * taps
    np.testing.assert_allclose(view[0].numpy(), want, atol=1e-6)
    flat = torch.full((1, 9, 9, 9), 0.3)
    torch.testing.assert_close(one(flat, 3, size=9, blur=1.0), flat)


def test_gamma_keeps_the_range_and_is_a_power():
    x = item(8, 8, 8) * 3 - 1
    powers = []
    for seed in range(200):
        view = one(x, seed, size=8, gamma=2.0)
        torch.testing.assert_close(view.amin(), x.amin())
        torch.testing.assert_close(view.amax(), x.amax())
        u, v = ((y - x.amin()) / (x.amax() - x.amin()) for y in (x, view))
        middle = (u > 0.2) & (u < 0.8)
        power = v[middle].log() / u[middle].log()
        assert power.std() < 1e-3
        powers.append(power.mean().log2().item())
    at = (np.arange(200) + 0.5) / 200
    assert np.abs((np.sort(powers) + 1) / 2 - at).max() < 0.14


def test_intensity_is_affine_in_units_of_std():
    x = item(8, 8, 8)
    for seed in range(20):
        view = one(x, seed, size=8, gain=0.3, shift=0.5, mean=0.2, std=0.5)
        z = (x - 0.2) / 0.5
        slope, offset = np.polyfit(z.flatten().numpy(), view.flatten().numpy(), 1)
        torch.testing.assert_close(view, float(slope) * z + float(offset), atol=1e-4, rtol=0)
        assert 0.7 <= slope <= 1.3 and abs(offset) <= 0.5


def test_noise_is_normal():
    x = torch.zeros(1, 20, 20, 20)
    view = one(x, 1, size=20, noise=1.0, noise_sigma=(0.2, 0.2))
    z = view.flatten() / 0.2
    assert abs(z.mean()) < 4 / math.sqrt(8000) and abs(z.std() - 1) < 0.04
    assert abs((z.abs() < 1).float().mean() - 0.6827) < 0.03
    rate = np.mean([one(x[:, :4, :4, :4], s, size=4, noise=0.4).any() for s in range(N)])
    assert abs(rate - 0.4) < 4 * math.sqrt(0.24 / N)


FULL = dict(flip=0.5, turn=0.5, blur=0.5, gamma=1.5, gain=0.2, shift=0.3, noise=0.5)


def test_views_are_pure_functions_and_evaluation_is_plain():
    x, before = item(), item()
    spec = VolumeViews.preset(8, count=2, depth=6, **FULL)
    a, b = apply(spec, x, 3), apply(spec, x, 3)
    assert torch.equal(x, before)
    assert all(torch.equal(i, j) for i, j in zip(a, b, strict=True))
    assert not torch.equal(a[0], a[1]) and not torch.equal(a[0], apply(spec, x, 4)[0])
    assert [tuple(v.shape) for v in a] == spec.shapes(1) == [(1, 6, 8, 8)] * 2
    plain = spec.evaluation()
    assert torch.equal(plain.apply(x, 0)[0], plain.apply(x, 9)[0]) and plain.evaluation() == plain
    assert torch.equal(
        plain.apply(x, 0)[0], VolumeViews.preset(8, depth=6).evaluation().apply(x, 0)[0]
    )


@pytest.mark.parametrize("name", FULL)
def test_one_operation_leaves_the_others_as_they_were(name):
    """Without it, a view is the one with it at its neutral strength."""
    neutral = {"gamma": 1.0}.get(name, 0.0)
    nearly = {"gamma": 1 + 1e-7, "gain": 1e-7, "shift": 1e-7}.get(name)
    if nearly is None:
        nearly = 1e-12  # a probability: never, but drawn
    a, b = (VolumeViews.preset(8, **{**FULL, name: v}) for v in (neutral, nearly))
    for seed in range(8):
        x, y = (spec.apply(item(), seed)[0] for spec in (a, b))
        torch.testing.assert_close(x, y, atol=1e-4, rtol=0)


def test_shown_undoes_the_normalization():
    x = item(channels=3)
    plain = VolumeViews.preset(16).evaluation()
    (view,) = plain.apply(x, 0)
    torch.testing.assert_close(plain.shown(view[None])[0], one(x, 0).clamp(0, 1))
    many = plain.apply(item(channels=4), 0)[0][None]
    assert plain.shown(many).shape == (1, 1, 16, 16, 16)


def test_bad_items_and_options_are_refused():
    spec = view_spec("volumes", 16)
    assert isinstance(spec, VolumeViews)
    for bad in (item().double(), item()[0], item()[:, :0]):
        with pytest.raises(ValueError, match="volume: want uint8 or float32"):
            spec.apply(bad, 0)
    with pytest.raises(ValueError, match="did you mean 'depth'"):
        view_spec("volumes", 16, depht=4)
    with pytest.raises(ValueError, match="low end"):
        VolumeViews.preset(16, noise_sigma=(0.9, 0.5))
