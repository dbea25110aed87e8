"""The pictures: what is drawn is what was measured, and a rival looks the same in all of them."""

import io
from dataclasses import replace

import pytest
from matplotlib.image import imread

from fastssl.bench.report import figures
from tests.bench import sample

LOOKS = figures.looks_of(sample.run().results)


def test_each_theme_has_its_picture(monkeypatch):
    monkeypatch.setattr(figures, "png_of", lambda figure: b"")
    assert [picture.name for picture in figures.pictures(sample.run())] == [
        "relative-float32",
        "relative-bfloat16",
        "growth-ntxent-N-float32",
        "roofline-float32",
        "roofline-bfloat16",
    ]


def test_pictures_are_drawn_and_said():
    rows = [row for row in sample.run().results if row.dtype == "float32"]
    pictures = figures.pictures(sample.run(results=rows))
    assert len(pictures) == 3
    for picture in pictures:
        pixels = imread(io.BytesIO(picture.png))
        assert pixels.shape[0] > 200 and pixels.shape[1] > 700
        assert picture.caption.endswith(".") and pixels[..., :3].std() > 0.05


def test_they_are_saved_by_name(tmp_path):
    run = sample.run(results=sample.fixed_rows()[:2], ceilings=[])
    paths = figures.save_all(run, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["relative-float32.png"]
    assert paths[0].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_run_without_figures_has_no_pictures():
    assert figures.pictures(sample.run(results=[])) == []
    absent = [sample.untimed("clip", {"N": 1}, "lightly", "absent", "no")]
    assert figures.pictures(sample.run(results=absent)) == []
    alone = sample.run(ceilings=[], results=[row for row in sample.fixed_rows() if row.x == 1])
    assert figures.pictures(alone) == []  # no rival, no sweep, no ceilings


def test_bars_reach_from_one_to_x():
    rows = [row for row in sample.fixed_rows() if row.case == "clip"]
    figure = figures._relative([rows[:3], rows[3:]], LOOKS, "float32")
    axes = figure.axes[0]
    ends = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches]
    assert ends == [pytest.approx((1, x)) for x in (1.8, 1.01, 0.5, 1.5)]
    assert [bool(bar.get_hatch()) for bar in axes.patches] == [False, True, False, False]
    assert [t.get_text() for t in axes.texts] == ["1.80", "1.01 tie", "0.500", "1.50"]
    names = ["clip  B=512 D=512", "reference", "open_clip"]
    assert [t.get_text() for t in axes.get_yticklabels()][:3] == names
    middles = [bar.get_y() + bar.get_height() / 2 for bar in axes.patches]
    assert [t.xy[1] for t in axes.texts] == pytest.approx(middles)
    low, high = axes.get_xlim()
    assert 0.4 < low < 0.5 * 0.97 and 1.8 * 1.04 < high < 2.2
    rows[1] = replace(rows[1], x_low=0.01, x_high=99.0)
    assert figures._ends(rows) == pytest.approx((0.25, 3.6), rel=0.2)  # such a whisker is cut


def test_a_rival_without_a_time_keeps_its_line():
    rows = [row for row in sample.fixed_rows() if row.case == "ntxent"][:6]
    axes = figures._relative([rows], LOOKS, "float32").axes[0]
    assert len(axes.patches) == 2
    said = [t.get_text() for t in axes.texts]
    assert said == ["5.50", "4.50", "out of memory", "wrong", "absent"]


def test_many_measurements_go_on_several_sheets(monkeypatch):
    monkeypatch.setattr(figures, "png_of", lambda figure: b"")
    rows = [row for row in sample.fixed_rows() if row.case == "clip"][:3]
    groups = [[replace(r, shape={"N": n}) for r in rows] for n in range(20)]
    sheets = figures._sheets(groups)
    assert [len(sheet) for sheet in sheets] == [10, 10] and sum(sheets, []) == groups
    names = [p.name for p in figures.pictures(sample.run(results=sum(groups, []), ceilings=[]))]
    assert names == ["relative-float32", "relative-float32-2"]


def growth(results, looks=LOOKS):
    rivals = {}
    for row in results:
        rivals.setdefault(row.rival, []).append(row)
    return figures._growth("ntxent", "N", rivals, looks)


def test_growth_shows_points_exponents_and_what_ran_out_of_memory():
    rows = sample.sweep_rows()
    figure = growth(rows)
    time, memory = figure.axes
    ours = next(line for line in time.lines if line.get_color() == LOOKS["fastssl"].color)
    assert list(ours.get_xdata()) == [256 * 2**k for k in range(7)]
    assert list(ours.get_ydata()) == [r.total.p50 for r in rows if r.rival == "fastssl"]
    for axes in (time, memory):
        (cross,) = [line for line in axes.lines if line.get_marker() == "x"]
        assert list(cross.get_xdata()) == [16384]
        assert cross.get_color() == LOOKS["reference"].color
        largest = max(max(line.get_ydata()) for line in axes.lines if line is not cross)
        place = axes.transData.transform((16384, largest))[1]
        assert place < axes.transAxes.transform((0, 0.93))[1]  # the strip of crosses is free
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert said[0].startswith("fastssl: time ~ N$^{1.5") and "memory ~ N$^{1.00}$" in said[0]
    assert said[-1] == "floor of the time on this machine"


def test_growth_without_memory_has_one_panel():
    rows = [replace(r, peak=None, floor=None) for r in sample.sweep_rows() if r.status == "ok"]
    figure = growth(rows)
    assert len(figure.axes) == 1
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(said) == 2 and "memory" not in said[0]


def test_the_roofline_is_the_measured_one():
    rows = [row for row in sample.fixed_rows() if row.dtype == "float32" and row.tflops]
    copy, product = sample.CEILINGS[:2]
    axes = figures._roofline(rows, copy, product, LOOKS).axes[0]
    lines = {str(line.get_label()): line for line in axes.lines}
    solid = lines["measured: 4000 GB/s, 50 TFLOP/s"]
    assert max(solid.get_ydata()) == pytest.approx(50)
    x, y = solid.get_xdata()[0], solid.get_ydata()[0]
    assert y == pytest.approx(4.0 * x)  # GB/s times operations a byte, in TFLOP/s
    assert max(lines["datasheet: 4800 GB/s, 67 TFLOP/s"].get_ydata()) == pytest.approx(67)
    slow = figures._roofline(
        rows, copy, replace(product, measured=0.5, datasheet=None), LOOKS
    ).axes[0]
    assert slow.get_ylabel() == "GFLOP/s" and slow.lines[1].get_ydata()[0] == pytest.approx(4e4)
    assert max(slow.lines[0].get_ydata()) == pytest.approx(500)
    ours = [row for row in rows if row.rival == "fastssl"]
    assert list(lines["fastssl"].get_ydata()) == [row.tflops for row in ours]
    assert lines["fastssl"].get_xdata()[0] == pytest.approx(8e10 / 1.7e7)
    assert sorted(t.get_text() for t in axes.texts) == ["clip", "ntxent", "siglip"]


def test_rivals_look_different_and_always_the_same():
    names = ["zeta", "alpha", "lightly", "open_clip", "reference", "fastssl", "beta"]
    rows = [sample.timed("clip", {}, name, 1.0) for name in names]
    looks = figures.looks_of(rows)
    assert len({(look.color, look.marker) for look in looks.values()}) == len(looks)
    assert looks == figures.looks_of(rows[::-1])
    assert looks["fastssl"] == LOOKS["fastssl"]
    spare = [figures.Look(*pair) for pair in zip(figures.SPARE_COLORS, "<>h", strict=False)]
    assert [looks[name] for name in ("alpha", "beta", "zeta")] == spare


def test_a_dollar_in_a_name_is_no_mathematics():
    rows = [replace(r, rival=r.rival.replace("reference", "a$b_{$")) for r in sample.sweep_rows()]
    assert figures.png_of(growth(rows, figures.looks_of(rows)))
