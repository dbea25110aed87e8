"""Generated images: the same for the same numbers, full frames, classes that can be told apart."""

import numpy as np
import torch

from fastssl.data.synthetic.fractals import _chaos_game, class_code, fractal

SIZE, CLASSES = 32, 10


def shapes(label, instances):
    """Brightness over the background's, (instances, SIZE * SIZE): what is not color."""
    pixels = torch.stack([fractal(0, label, i, SIZE) for i in instances]).double().mean(1)
    return (pixels - pixels[:, :1, :1]).abs().flatten(1).clamp(max=30).numpy()


def test_deterministic_and_sized():
    a = fractal(1, 2, 3, 48)
    assert a.shape == (3, 48, 48) and a.dtype == torch.uint8
    class_code.cache_clear()
    assert torch.equal(a, fractal(1, 2, 3, 48))


def test_every_number_matters():
    images = [fractal(*key, SIZE) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]]
    assert len({image.numpy().tobytes() for image in images}) == 4


def test_colors_say_nothing_of_the_class():
    """Each image has its own: one instance number does not share a ground over the classes."""
    grounds = {tuple(fractal(0, c, 0, 16)[:, 0, 0].tolist()) for c in range(20)}
    assert len(grounds) == 20


def test_codes_keep_the_sum_that_fills_the_frame():
    for label in range(30):
        code = class_code(3, label)
        n = len(code.scales)
        total = code.scales @ [1.0, 2.0]
        assert (5 + n) / 2 <= total.sum() <= (6 + n) / 2
        assert (code.scales[:, 0] >= code.scales[:, 1]).all() and code.scales.max() < 0.97


def test_maps_are_their_polar_parts():
    code = class_code(0, 1)
    maps, p = code.maps()
    scales = np.linalg.svd(maps, compute_uv=False)
    np.testing.assert_allclose(scales, code.scales, atol=1e-12)
    np.testing.assert_allclose(np.sign(np.linalg.det(maps)), code.signs)
    assert np.isclose(p.sum(), 1) and (p > 0).all()


def test_chaos_game_stays_on_the_attractor():
    """The union of the maps' images of the attractor is the attractor."""
    code = class_code(0, 1)
    x, y, color = _chaos_game(code, 40_000, np.random.default_rng(0))
    maps, _ = code.maps()
    moved = np.concatenate([(m @ (x, y)).T + b for m, b in zip(maps, code.shifts, strict=True)])
    span = np.ptp([x, y])

    def cells(points):
        return {tuple(c) for c in np.floor(points / span * 20).astype(int)}

    own, images = cells(np.stack([x, y], -1)), cells(moved)
    assert len(own ^ images) < 0.05 * len(own)
    assert 0 <= color.min() and color.max() <= 1


def test_classes_fill_their_frame():
    for label in range(40):
        x, y, _ = _chaos_game(class_code(0, label), 10_000, np.random.default_rng(label))
        half = max(np.ptp(x), np.ptp(y)) / 2 / 0.96
        box = [[v.min() + np.ptp(v) / 2 - half, v.min() + np.ptp(v) / 2 + half] for v in (x, y)]
        cells = np.histogram2d(x, y, 32, box)[0]
        assert 0.18 < (cells > 0).mean() < 0.85, label


def test_images_are_neither_empty_nor_full():
    for label in range(20):
        filled = (shapes(label, range(2)) > 5).mean()
        assert 0.08 < filled < 0.9, label


def spectrum(image):
    """What turning leaves alone: brightness over the background's, averaged along each circle."""
    yx = np.indices((SIZE, SIZE)) - (SIZE - 1) / 2
    ring = np.hypot(*yx).astype(int).ravel()
    return np.bincount(ring, image) / np.bincount(ring)


def test_classes_are_told_apart_by_shape():
    kept = {c: np.stack([spectrum(x) for x in shapes(c, range(40))]) for c in range(CLASSES)}
    train = np.concatenate([kept[c][:30] for c in range(CLASSES)])
    hits = [
        np.argmin(((train - x) ** 2).sum(1)) // 30 == c
        for c in range(CLASSES)
        for x in kept[c][30:]
    ]
    assert np.mean(hits) > 0.35  # by chance: 0.1


def test_pixels_alone_say_little_of_the_class():
    """Instances stand at any angle: the class is a shape, not a place."""
    train = np.stack([shapes(c, range(12)).mean(0) for c in range(CLASSES)])
    hits = [
        np.argmin(((train - x) ** 2).sum(1)) == c
        for c in range(CLASSES)
        for x in shapes(c, range(12, 20))
    ]
    assert np.mean(hits) < 0.5
