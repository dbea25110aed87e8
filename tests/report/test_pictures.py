"""The pictures: that they show what they are given, read back from panels and pixels."""

import math

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from sklearn.datasets import load_digits

from fastssl.report import (
    embedding,
    plot_curves,
    plot_embedding,
    plot_reconstructions,
    plot_views,
)
from fastssl.report.curves import smoothed
from fastssl.report.embedding import _to_plane


@pytest.fixture
def figures(monkeypatch):
    """The figures that were to be saved, so that a test can look at their panels: none is drawn."""
    seen: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **options: seen.append(self))
    return seen


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    seen: list[Figure] = []
    savefig = Figure.savefig

    def spy(self, *args, **options):
        seen.append(self)
        return savefig(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", spy)
    return seen


def training(steps=30):
    rows = [
        {"kind": "train", "step": s, "loss": 5.0 - 0.1 * s, "lr": 1e-3, "images_per_s": 100.0}
        for s in range(steps)
    ]
    rows += [{"kind": "eval", "step": s, "knn": 0.5 + s / 100, "rankme": 9.0} for s in (0, 10, 29)]
    return rows


ONLY_LOSS = [{"kind": "train", "step": 0, "loss": 1.0}]


def panels(figure):
    return {axes.get_title("left"): axes for axes in figure.axes}


def test_only_panels_with_data_are_drawn(tmp_path, figures):
    assert plot_curves(training(), tmp_path / "curves.png")
    assert set(panels(figures[0])) == {
        "Loss",
        "kNN accuracy, held out",
        "RankMe (effective dimensions)",
        "Learning rate",
        "Samples per second",
    }


def test_the_times_of_a_step_are_stacked(tmp_path, drawn):
    parts = {"time/data": 2.0, "time/backward": 5.0, "time/on_step": 0.0, "time/other": 1.0}
    rows = [row | parts if row["kind"] == "train" else row for row in training()]
    slow = {"kind": "train", "step": 10, "loss": 5.0, "time/data": 90.0, "time/backward": None}
    assert plot_curves([*rows, slow], tmp_path / "curves.png")
    axes = panels(drawn[0])["Milliseconds a step"]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["waiting for data  2", "backward  5", "other  1"]
    tops = {c.get_label(): c.get_paths()[0].vertices for c in axes.collections}
    data = tops["waiting for data  2"]
    assert set(data[data[:, 1] == 90, 0]) == {9, 10}  # of the steps since the row before
    assert axes.get_ylim() == (0, 16)
    later = tops["other  1"][tops["other  1"][:, 0] > 10]
    assert (later[:, 1].min(), later[:, 1].max()) == (7, 8)
    above = min(
        each.get_window_extent().y0 for name, each in panels(drawn[0]).items() if name[0] != "M"
    )
    assert axes.get_window_extent().y1 < above  # nothing is drawn over another panel


def test_a_panel_alone_is_drawn(tmp_path, drawn):
    assert plot_curves(ONLY_LOSS, tmp_path / "one.png")
    assert set(panels(drawn[0])) == {"Loss"}
    assert imread(tmp_path / "one.png").ndim == 3


def test_nothing_to_draw_leaves_no_file(tmp_path):
    rows = [{"kind": "event", "step": 0, "what": "resumed"}, {"kind": "eval", "step": 1}]
    assert not plot_curves(rows, tmp_path / "curves.png")
    assert not plot_curves([{"kind": "eval", "step": 1, "knn": None}], tmp_path / "curves.png")
    assert list(tmp_path.iterdir()) == []


def test_baselines_are_dashed_lines_in_their_own_panel(tmp_path, figures):
    baseline = {"kind": "baseline", "encoder": "raw input", "knn": 0.75}
    plot_curves([*training(), baseline], tmp_path / "curves.png")
    drawn = panels(figures[0])
    lines = {line.get_label(): line for line in drawn["kNN accuracy, held out"].lines}
    assert list(lines["raw input"].get_ydata()) == [0.75, 0.75]
    assert lines["raw input"].get_linestyle() == "--"
    assert len(drawn["RankMe (effective dimensions)"].lines) == 1


def test_a_wobble_of_accuracy_does_not_fill_its_panel(tmp_path, figures):
    rows = [{"kind": "eval", "step": s, "knn": 0.9 + s / 1000} for s in range(3)]
    plot_curves(rows, tmp_path / "alone.png")
    far = {"kind": "baseline", "encoder": "raw input", "knn": 0.5}
    plot_curves([*rows, far], tmp_path / "far.png")
    (low, high), (below, above) = (figure.axes[0].get_ylim() for figure in figures)
    assert 0.04 <= high - low < 0.06 and low < 0.9 < 0.902 < high
    assert below < 0.5 and above > 0.902


def test_a_resumed_run_shows_the_later_of_two_rows(tmp_path, figures):
    rows = [{"kind": "train", "step": s, "loss": value} for s, value in [(0, 3), (2, 99), (1, 2)]]
    rows += [{"kind": "train", "step": 2, "loss": 1}]
    rows += [{"kind": "event", "step": 1, "what": "resumed"}]
    plot_curves(rows, tmp_path / "curves.png")
    (loss,) = figures[0].axes
    assert loss.lines[0].get_xydata().tolist() == [[0, 3], [1, 2], [2, 1]]
    assert [text.get_text() for text in loss.texts] == ["resumed"]


def test_non_finite_values_are_gaps(tmp_path, figures):
    rows = training()
    rows[5]["loss"], rows[6]["loss"] = math.nan, math.inf
    rows[-1]["knn"] = math.nan
    assert plot_curves(rows, tmp_path / "curves.png")
    loss = panels(figures[0])["Loss"]
    assert np.isfinite(loss.lines[1].get_ydata()).all()  # the mean bridges them


def test_a_loss_over_decades_is_logarithmic(tmp_path, figures):
    rows = [{"kind": "train", "step": s, "loss": 1000 * 0.5**s} for s in range(9)]
    plot_curves(rows, tmp_path / "log.png")
    plot_curves([*rows, {"kind": "train", "step": 9, "loss": -1.0}], tmp_path / "linear.png")
    assert [figure.axes[0].get_yscale() for figure in figures] == ["log", "linear"]


def test_smoothing_keeps_a_slope_and_skips_nan():
    slope = np.arange(20.0)
    assert smoothed(slope, 4)[:-4] == pytest.approx(slope[:-4])
    wave = slope + np.where(np.arange(20) % 2, 1, -1)
    assert np.abs(smoothed(wave, 4) - slope)[4:-4].max() < 0.2
    assert smoothed(np.array([1.0, math.nan, 3.0]), 1)[1] == 2.0
    assert np.isnan(smoothed(np.array([math.nan]), 1)).all()


def test_a_save_that_fails_keeps_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")

    def refuse(*paths):
        raise OSError("no space left on device")

    monkeypatch.setattr("fastssl.files.os.replace", refuse)
    with pytest.raises(OSError, match="no space"):
        plot_curves(ONLY_LOSS, path)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("curves.png", b"old")]


def digits(n):
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x[:n]), torch.tensor(y[:n], dtype=torch.int64)


def test_the_map_is_repeatable_and_keeps_neighbors_together(tmp_path, monkeypatch):
    x, y = digits(150)
    made = []
    monkeypatch.setattr(embedding, "_to_plane", lambda x: made.append(_to_plane(x)) or made[-1])
    names = [str(i) for i in range(10)]
    plot_embedding(x, y, names, tmp_path / "a.png", "Digits")
    plot_embedding(x, y, names, tmp_path / "b.png", "Digits")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    points, method = made[0]
    assert method == "t-SNE"
    distance = torch.cdist(torch.tensor(points), torch.tensor(points)).fill_diagonal_(math.inf)
    assert (y[distance.argmin(1)] == y).double().mean() > 0.8  # chance: 0.1


def test_a_collapsed_encoder_has_its_map(tmp_path):
    plot_embedding(torch.ones(30, 4), torch.arange(30) % 2, [], tmp_path / "a.png", "Collapsed")
    assert (tmp_path / "a.png").is_file()


@pytest.mark.parametrize(
    ("n", "dim", "method"), [(3, 1, "PCA"), (3, 40, "PCA"), (12, 2, "t-SNE"), (3001, 3, "PCA")]
)
def test_maps_of_odd_sizes(tmp_path, n, dim, method):
    torch.manual_seed(0)
    x = torch.randn(n, dim)
    points, found = _to_plane(x.double().numpy())
    assert (points.shape, found) == ((n, 2), method)
    assert np.isfinite(points).all()


def test_labels_and_names_of_every_kind(tmp_path, drawn, monkeypatch):
    monkeypatch.setattr(embedding, "_to_plane", lambda x: (x[:, :2], "PCA"))
    x, y = torch.randn(60, 4), torch.arange(60) % 12
    names = ["_hidden", "$5 bill", "<b>"] + [f"class {i}" for i in range(3, 11)]  # one too few
    plot_embedding(x, y, names, tmp_path / "named.png", "a_b $ c")
    plot_embedding(x, None, [], tmp_path / "unlabeled.png", "No labels")
    plot_embedding(x, torch.arange(60), [], tmp_path / "many.png", "Sixty classes")
    legend = [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert legend[:3] == [" _hidden", r"\$5 bill", "<b>"]
    assert legend[-1] == "11" and len(legend) == 12
    assert drawn[1].axes[0].get_legend() is None is drawn[2].axes[0].get_legend()


def test_bad_features_are_named(tmp_path):
    path = tmp_path / "map.png"
    with pytest.raises(ValueError, match=r"N >= 3, got \(2, 4\)"):
        plot_embedding(torch.ones(2, 4), None, [], path, "")
    with pytest.raises(ValueError, match="1 non-finite values"):
        plot_embedding(torch.tensor([[1.0], [2.0], [math.nan]]), None, [], path, "")
    with pytest.raises(ValueError, match=r"labels must be 3 numbers from 0 up, got shape \(2,\)"):
        plot_embedding(torch.eye(3), torch.tensor([0, 1]), [], path, "")


def test_a_sheet_shows_every_pixel_once_and_clips(tmp_path, drawn):
    images = torch.tensor([[[[0.0, 2.0], [math.nan, 0.5]]], [[[1.0, 1.0], [1.0, 1.0]]]])
    plot_reconstructions(images, 0 * images.nan_to_num(), images, tmp_path / "sheet.png")
    (shown,) = drawn[0].axes[0].images
    pixels = np.asarray(shown.get_array())
    assert pixels.shape == (8, 5, 4)  # 3 rows and 2 columns of 2 x 2, one transparent pixel between
    assert pixels[:2, :2, 0].tolist() == [[0.0, 1.0], [0.0, 0.5]]
    assert pixels[6:, 3:, :3].min() == 1.0
    assert pixels[2].max() == 0.0 == pixels[:, 2].max()
    labels = [text.get_text() for text in drawn[0].axes[0].get_yticklabels()]
    assert labels == ["original", "masked", "reconstruction"]
    assert imread(tmp_path / "sheet.png").shape[2] == 4


def test_views_of_different_sizes_are_centered(tmp_path, figures):
    large, small = torch.ones(2, 3, 6, 6), torch.zeros(2, 3, 4, 2)
    small[:, 0] = 0.25
    plot_views([large, small], tmp_path / "views.png")
    (shown,) = figures[0].axes[0].images
    pixels = np.asarray(shown.get_array())
    assert pixels.shape == (13, 13, 4)
    assert pixels[1:5, 9:11].reshape(-1, 4).tolist() == [[0.25, 0, 0, 1]] * 8
    assert pixels[:6, 7:, 3].sum() == 8


def test_bad_sheets_are_named(tmp_path):
    path, images = tmp_path / "sheet.png", torch.ones(2, 1, 4, 4)
    with pytest.raises(ValueError, match="three tensors of one shape"):
        plot_reconstructions(images, images, images[:1], path)
    with pytest.raises(ValueError, match="n > 0"):
        plot_reconstructions(images[:0], images[:0], images[:0], path)
    with pytest.raises(ValueError, match=r"got \[1, 2\]"):
        plot_views([images, images[:1]], path)
    with pytest.raises(ValueError, match=r"got \[\]"):
        plot_views([], path)
    with pytest.raises(ValueError, match=r"an image must be \(1 or 3, H, W\), got \(2, 4, 4\)"):
        plot_views([torch.ones(1, 2, 4, 4)], path)
