"""Contact sheets: both back ends alike on them, every preset in the folder and on its page."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastssl.data.batch.ops import BATCH_OPS
from fastssl.data.views.presets import PRESETS

DOCS = Path(__file__).parents[2] / "docs"
spec = spec_from_file_location("make_views", DOCS / "make_views.py")
assert spec and spec.loader
sheets = sys.modules["make_views"] = module_from_spec(spec)
spec.loader.exec_module(sheets)
EVERY = {*PRESETS, *sheets.OTHERS}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return sheets.photographs(tmp_path_factory.mktemp("photographs"))


@pytest.mark.parametrize(
    ("name", "makers", "views"),
    [
        ("simclr", ["torchvision", "DALI", "one by one"], 2),
        ("mae", ["torchvision", "DALI"], 1),
        ("dino", ["torchvision", "DALI", "one by one"], 4),
        ("rand_augment", ["torchvision"], 1),
    ],
)
def test_a_sheet_has_every_kind_of_view_by_every_maker(source, name, makers, views):
    photos, *columns = sheets.preset_columns(source, name)
    assert photos.group == "photograph" and len(photos.images) == len(source) == 4
    assert [c.label for c in columns] == views * makers
    assert len({c.group for c in columns}) == views
    for first in range(0, len(columns), len(makers)):
        made = dict(zip(makers, columns[first : first + len(makers)], strict=True))
        if "DALI" in made:
            pairs = zip(made["torchvision"].images, made["DALI"].images, strict=True)
            assert max(float((a - b).abs().mean()) for a, b in pairs) < 0.01


def test_a_picture_is_small_and_holds_every_cell(tmp_path):
    red, gray = torch.tensor([1.0, 0, 0]).view(3, 1, 1), torch.full((1, 30, 60), 0.5)
    columns = [
        sheets.Column("a", [red.expand(3, 20, 20), gray], "one"),
        sheets.Column("b", 2 * [gray], "two"),
    ]
    sheets.draw(columns, "title", tmp_path / "x.png", row_labels=["first", "second"], cell=40)
    with Image.open(tmp_path / "x.png") as image:
        assert image.mode == "P" and image.height == sheets.HEAD + 2 * 44 - 4 + sheets.SIDE
        pixels = image.convert("RGB")
    left, top = sheets.SIDE + 44, sheets.HEAD
    assert pixels.getpixel((left + 20, top + 20)) == (255, 0, 0)
    assert max(abs(v - 128) for v in pixels.getpixel((left + 20, top + 44 + 20))) < 3
    assert min(pixels.getpixel((left + 20, top + 44 + 5))) > 245  # around a wide image
    assert pixels.crop((0, 0, 60, 20)).getextrema()[0][0] < 60  # words


def test_operations_and_strips_are_drawn(tmp_path):
    paths = sheets.write(tmp_path, ["batch-ops", "clips", "volumes"])
    assert [p.name for p in paths] == ["batch-ops.png", "clips.png", "volumes.png"]
    assert all(10_000 < p.stat().st_size < 300_000 for p in paths)


def test_every_operation_on_batches_is_on_its_sheet(source):
    columns = sheets.batch_op_columns(source)
    assert {c.label for c in columns} == {*BATCH_OPS, "as it is"}
    as_it_is = torch.stack(list(columns[0].images))
    for column in columns[1:]:
        assert float((torch.stack(list(column.images)) - as_it_is).abs().mean()) > 1e-3


def test_the_folder_and_its_page_hold_them_all():
    assert {p.stem for p in (DOCS / "views").glob("*.png")} == EVERY
    assert all(p.stat().st_size < 300_000 for p in (DOCS / "views").glob("*.png"))
    assert (DOCS / "views/README.md").read_text() == sheets.page()
    assert all(f"![{name}]({name}.png)" in sheets.page() for name in EVERY)
