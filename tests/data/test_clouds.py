"""Generated clouds: on their surfaces, in the unit sphere; views keep the shape."""

import numpy as np
import pytest
import torch

from fastssl.data.synthetic.clouds import SURFACES, CloudsSource, _by_area, cloud
from fastssl.data.views.cloud import CloudViews
from fastssl.data.views.spec import apply, view_spec


@pytest.mark.parametrize("label", range(len(SURFACES)), ids=SURFACES)
def test_clouds_are_in_the_unit_sphere(label):
    a = cloud(1, label, 3, 200)
    assert a.shape == (200, 3) and a.dtype == torch.float32 and a.isfinite().all()
    torch.testing.assert_close(a.mean(0), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(a.norm(dim=1).max(), torch.tensor(1.0))
    assert torch.equal(a, cloud(1, label, 3, 200))
    assert torch.linalg.svdvals(a)[2] > 1  # not flat: a surface in space


def test_every_number_matters():
    clouds = [cloud(*key, 50) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]]
    assert len({x.numpy().tobytes() for x in clouds}) == 4


def points(kind, n=4000, seed=0):
    return _by_area(kind, n, np.random.default_rng(seed)).T


def test_points_are_on_the_surfaces():
    x, y, z = points("ellipsoid")
    np.testing.assert_allclose(x**2 + y**2 + z**2, 1, atol=1e-9)
    x, y, z = points("cylinder")
    round_, lids = np.hypot(x, y), np.isclose(np.abs(z), 1)
    assert (np.isclose(round_, 1) | lids).all() and round_.max() < 1 + 1e-9
    x, y, z = points("torus")
    ring = np.hypot(np.hypot(x, y) - 1, z)
    np.testing.assert_allclose(ring, ring[0], atol=1e-9)
    x, y, z = points("box")
    across = np.abs(x) + np.abs(y)  # a square on its corner
    assert (np.isclose(across, 1) | np.isclose(np.abs(z), 1)).all() and across.max() < 1 + 1e-9
    x, y, z = points("octahedron")
    assert np.ptp(np.abs(x) + np.abs(y) + np.abs(z)) < 0.35  # within its star's dents


def test_points_are_uniform_by_area():
    """Archimedes: equal areas of a sphere between equally spaced planes."""
    z = points("ellipsoid", 6000)[2]
    counts = np.histogram(z, 10, (-1, 1))[0]
    assert abs(counts / 600 - 1).max() < 0.16
    x, y, z = points("cylinder", 6000)
    assert np.mean(np.isclose(np.abs(z), 1)) == pytest.approx(1 / 3, abs=0.03)  # lids: 2 pi of 6 pi


def test_any_pose_about_the_vertical_axis():
    """The long horizontal axis of rings, scaled unevenly, points anywhere."""
    angles = []
    for i in range(40):
        x = cloud(0, SURFACES.index("torus"), i, 200)[:, :2].double()
        axis = torch.linalg.eigh(x.T @ x).eigenvectors[:, 1]
        angles.append(float(torch.atan2(axis[1], axis[0])) % np.pi)
    counts = np.histogram(angles, 4, (0, np.pi))[0]
    assert counts.min() >= 3


def test_coordinates_alone_say_little_of_the_class():
    x = torch.stack([torch.stack([cloud(0, c, i, 64) for i in range(24)]) for c in range(12)])
    x = x.double().flatten(2)
    means = x[:, :16].mean(1)
    guesses = torch.cdist(x[:, 16:].flatten(0, 1), means).argmin(1)
    assert (guesses == torch.arange(12).repeat_interleave(8)).double().mean() < 0.35


def test_the_source_names_and_selects():
    (source,) = CloudsSource(classes=3, per_class=4, points=20, seed=5).open()
    assert len(source) == 12 and source.channels == 3 and source.classes == SURFACES[:3]
    part = source.select(np.array([7, 2]))
    assert part.name(0) == "box/3" and part.labels.tolist() == [1, 0]
    assert torch.equal(part.item(0), cloud(5, 1, 3, 20))


ITEM = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))


def test_views_are_subsets():
    spec = CloudViews.preset(20, scale=(1.0, 1.0), translate=0.0)
    seen = set()
    for seed in range(30):
        (view,) = spec.apply(ITEM, seed)
        assert view.shape == (20, 3) and view.dtype == torch.float32
        gaps, places = torch.cdist(view.double(), ITEM.double()).min(1)
        assert gaps.max() == 0 and len(places.unique()) == 20  # no point twice
        seen |= set(places.tolist())
    assert seen == set(range(50))


def test_views_are_scaled_and_shifted_along_each_axis():
    spec = CloudViews.preset(20, subset="first")
    factors, shifts = [], []
    for seed in range(60):
        (view,) = spec.apply(ITEM, seed)
        scale = (view[0] - view[1]) / (ITEM[0] - ITEM[1])
        shift = view[0] - ITEM[0] * scale
        torch.testing.assert_close(view, ITEM[:20] * scale + shift, atol=1e-5, rtol=1e-5)
        factors.append(scale)
        shifts.append(shift)
    factors, shifts = torch.stack(factors), torch.stack(shifts)
    assert factors.min() > 2 / 3 - 1e-4 and factors.max() < 3 / 2 + 1e-4
    assert shifts.abs().max() < 0.2 + 1e-4
    assert (factors.std(0) > 0.15).all() and (shifts.std(0) > 0.08).all()
    assert torch.corrcoef(factors.T).fill_diagonal_(0).abs().max() < 0.5


def test_small_clouds_are_repeated():
    plain = CloudViews.preset(120).evaluation()
    (view,) = plain.apply(ITEM, 0)
    assert torch.equal(view, torch.cat([ITEM, ITEM, ITEM[:20]]))
    (view,) = CloudViews.preset(120, scale=(1.0, 1.0), translate=0.0).apply(ITEM, 1)
    assert torch.equal(view[:50].sort(0).values, ITEM.sort(0).values)


def test_views_are_pure_functions_of_item_and_seed():
    spec = CloudViews.preset(30, count=2)
    a, b = apply(spec, ITEM, 3), apply(spec, ITEM, 3)
    assert len(a) == 2 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0], a[1]) and not torch.equal(a[0], apply(spec, ITEM, 4)[0])
    assert [tuple(x.shape) for x in a] == spec.shapes(3)
    plain = spec.evaluation()
    assert plain.count == 1 and torch.equal(plain.apply(ITEM, 7)[0], ITEM[:30])


def test_bad_items_and_options_are_refused():
    spec = view_spec("clouds", 16)
    assert isinstance(spec, CloudViews) and spec.points == 16
    for bad in (torch.zeros(20), torch.zeros(0, 3), torch.zeros(5, 3, dtype=torch.int32)):
        with pytest.raises(ValueError, match="want float"):
            spec.apply(bad, 0)
    with pytest.raises(ValueError, match="did you mean 'translate'"):
        view_spec("clouds", 16, translation=1.0)
