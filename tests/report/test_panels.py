"""Pictures of clips, signals and clouds: that they show what they are given."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from fastssl.report import PICTURED, plot_reconstructions, plot_views
from fastssl.report._panels import FRAMES, strip

CLIPS = torch.rand(3, 3, 12, 6, 8, generator=torch.Generator().manual_seed(0))
SIGNALS = torch.randn(3, 2, 50, generator=torch.Generator().manual_seed(0))
CLOUDS = torch.randn(3, 40, 3, generator=torch.Generator().manual_seed(0))
ITEMS = {"clip": CLIPS, "volume": CLIPS, "signal": SIGNALS, "cloud": CLOUDS}


@pytest.fixture
def figures(monkeypatch):
    seen: list[Figure] = []
    savefig = Figure.savefig

    def spy(self, *args, **kwargs):
        seen.append(self)
        return savefig(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", spy)
    return seen


def test_there_are_pictures_of_every_kind_with_one():
    assert set(PICTURED) == {"image", *ITEMS}


def test_a_strip_has_the_first_and_the_last_frame():
    frames = strip(CLIPS[0])
    assert len(frames) == FRAMES
    assert torch.equal(frames[0], CLIPS[0, :, 0]) and torch.equal(frames[-1], CLIPS[0, :, -1])
    assert len(strip(CLIPS[0, :, :3])) == 3


def test_clips_are_rows_of_frames(tmp_path, figures):
    plot_views([CLIPS, CLIPS], tmp_path / "v.png", kind="clip")
    (sheet,) = (image.get_array() for image in figures[0].axes[0].images)
    step_y, step_x = 7, 9  # a pixel between
    assert sheet.shape == (3 * step_y - 1, 2 * FRAMES * step_x - 1, 4)
    last = sheet[step_y : step_y + 6, 7 * step_x : 7 * step_x + 8, :3]
    np.testing.assert_allclose(last, CLIPS[1, :, -1].permute(1, 2, 0), atol=1e-6)
    plot_reconstructions(CLIPS, CLIPS * 0, CLIPS, tmp_path / "r.png", kind="clip")
    labels = [text.get_text() for text in figures[1].axes[0].get_yticklabels()]
    assert labels == ["original", "masked", "predicted"] * 3


def test_volumes_are_rows_of_slices(tmp_path, figures):
    for kind in ("clip", "volume"):
        plot_views([CLIPS[:, :1]], tmp_path / "v.png", kind=kind)
        plot_reconstructions(CLIPS, CLIPS * 0, CLIPS, tmp_path / "r.png", kind=kind)
    arrays = [figure.axes[0].images[0].get_array() for figure in figures]
    for clip, volume in zip(arrays[:2], arrays[2:], strict=True):
        np.testing.assert_array_equal(clip, volume)


def test_signals_are_lines(tmp_path, figures):
    plot_reconstructions(SIGNALS, SIGNALS * 0, -SIGNALS, tmp_path / "r.png", kind="signal")
    axes = figures[0].axes
    assert len(axes) == 9
    drawn = np.stack([line.get_ydata() for line in axes[7].lines])  # third row, second column
    np.testing.assert_allclose(drawn, -SIGNALS[1], atol=1e-6)


def test_clouds_are_points_and_may_differ_in_number(tmp_path, figures):
    plot_reconstructions(CLOUDS, CLOUDS[:, :10], CLOUDS[:, :30], tmp_path / "r.png", kind="cloud")
    counts = [len(axes.collections[0]._offsets3d[2]) for axes in figures[0].axes]
    assert counts == [40] * 3 + [10] * 3 + [30] * 3
    np.testing.assert_allclose(
        np.sort(figures[0].axes[4].collections[0]._offsets3d[2]),
        np.sort(CLOUDS[1, :10, 2]),
        atol=1e-6,
    )


@pytest.mark.parametrize("kind", ITEMS)
def test_pictures_are_written(kind, tmp_path):
    plot_views([ITEMS[kind]], tmp_path / "v.png", kind=kind)
    assert imread(tmp_path / "v.png").shape[2] == 4


@pytest.mark.parametrize("kind", ITEMS)
def test_what_cannot_be_drawn_is_refused(kind, tmp_path):
    items = ITEMS[kind]
    for bad in [(items, items[:1], items), (items[:0],) * 3, (items[0],) * 3]:
        with pytest.raises(ValueError, match="want three tensors"):
            plot_reconstructions(*bad, tmp_path / "r.png", kind=kind)
    with pytest.raises(ValueError, match="the same images"):
        plot_views([items, items[:1]], tmp_path / "v.png", kind=kind)
    with pytest.raises(ValueError, match="got 'row'"):
        plot_views([items], tmp_path / "v.png", kind="row")
    assert list(tmp_path.iterdir()) == []
