"""Tables: standardized by the training part alone; constant and missing columns; plain errors."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from fastssl.data.datasets import open_source
from fastssl.data.errors import DataError
from fastssl.data.sources.tables import Table, TableSource, read_csv
from fastssl.data.views.spec import apply, view_spec
from fastssl.data.views.table import TableViews


def rows(part):
    return torch.stack([part.item(i) for i in range(len(part))]).double()


@pytest.mark.parametrize(
    "name, shape, classes",
    [("breast_cancer", (569, 30), 2), ("wine", (178, 13), 3), ("iris", (150, 4), 3)],
)
def test_shipped_tables(name, shape, classes):
    split = open_source(TableSource(dataset=name), seed=3)
    assert (len(split.train) + len(split.test), split.train.channels) == shape
    assert len(split.train.classes) == classes == len(split.train.labels.unique())
    x = rows(split.train)
    torch.testing.assert_close(x.mean(0), torch.zeros(shape[1]).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(x.std(0, correction=0), torch.ones(shape[1]).double())
    assert rows(split.test).mean(0).abs().max() > 1e-3  # not its own statistics
    assert split.train.item(0).dtype == torch.float32


def test_the_test_part_has_the_training_parts_statistics():
    raw = np.arange(12.0).reshape(4, 3) ** 2
    table = Table(raw, ["a", "b", "c"]).fitted(np.array([0, 2]))
    want = (raw[3] - raw[[0, 2]].mean(0)) / raw[[0, 2]].std(0)
    np.testing.assert_allclose(table.item(3), want, rtol=1e-6)
    part = table.select(np.array([3, 1])).select(np.array([0]))
    np.testing.assert_allclose(part.item(0), want, rtol=1e-6)
    assert part.name(0) == "row 4" and len(part) == 1


def test_digits_as_columns_keep_constant_ones_at_0():
    split = open_source(TableSource(dataset="digits"), seed=0)
    assert split.train.channels == 64
    x = rows(split.train)
    assert x.isfinite().all() and (x[:, 0] == 0).all()  # a corner that is never inked


def test_a_constant_column_is_the_difference_from_its_constant():
    table = Table(np.array([[0.1, 1.0], [0.1, 2.0], [0.7, 3.0]]), ["a", "b"]).fitted(np.arange(2))
    assert table.item(0)[0] == 0 and table.item(2)[0] == pytest.approx(0.6)


def test_missing_cells_take_the_training_mean():
    raw = np.array([[1.0, np.nan], [3.0, 4.0], [np.nan, 8.0], [np.nan, 0.0]])
    table = Table(raw, ["a", "b"]).fitted(np.array([0, 1, 2]))
    assert table.item(2)[0] == 0 and table.item(0)[1] == 0
    assert table.item(0)[0] == -1 and table.item(1)[1] == -1 and table.item(3)[1] == -3


def test_a_column_without_training_values_is_refused():
    table = Table(np.array([[1.0, np.nan], [2.0, np.nan], [3.0, 5.0]]), ["a", "age"])
    with pytest.raises(DataError, match="column 'age' has no value in the training rows"):
        table.fitted(np.arange(2))


def test_csv_with_labels(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("\ufeffx, kind ,y\n1,red,-2e3\n\n 2.5 ,blue,\n3,red,nan\n", encoding="utf-8")
    table = read_csv(path, "kind")
    assert table.columns == ["x", "y"] and table.classes == ("blue", "red")
    assert table.labels.tolist() == [1, 0, 1]
    np.testing.assert_array_equal(table.rows, [[1, -2000], [2.5, np.nan], [3, np.nan]])
    numbers = tmp_path / "n.csv"
    numbers.write_text("x,y\n1,2\n3,4\n")
    split = open_source(TableSource(path=numbers, test_fraction=0.5), seed=0)
    assert split.train.labels is None and split.train.item(0).tolist() == [0, 0]


@pytest.mark.parametrize(
    "text, label, message",
    [
        ("x,y\n1,two\n", None, r"line 2, column 'y' holds 'two', which is no number"),
        ("x,y\n1,inf\n", None, "give a finite number"),
        ("x,y\n1,2\n\n3\n", None, "line 4 has 1 cells, the header 2"),
        ("5.1,3.5\n4.9,3.0\n", None, "first line .* is numbers, and no header: put"),  # fault 9
        ("x,y\n", None, "no rows"),
        ("x,y\n1,2\n", "z", "no column 'z' for the labels; there are: x, y"),
        ("x\n1\n", "x", "no column but its labels"),
        ("x,y\n1,a\n2,\n", "y", r"1 cells of data.source.label are empty \(row 2"),
    ],
)
def test_bad_csv_is_refused(text, label, message, tmp_path):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_csv(tmp_path / "t.csv", label)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot read the table"):
        read_csv(tmp_path / "gone.csv", None)
    (tmp_path / "b.csv").write_bytes(b"x\n\xff\xfe\n")
    with pytest.raises(DataError, match="cannot read the table"):
        read_csv(tmp_path / "b.csv", None)


def test_one_of_dataset_and_path():
    for options in ({}, {"dataset": "iris", "path": "x.csv"}):
        with pytest.raises(ValidationError, match="want dataset or path"):
            TableSource.model_validate(options)
    with pytest.raises(ValidationError, match="is for a path"):
        TableSource(dataset="iris", label="kind")


def test_views_are_the_rows():
    spec = view_spec("table", 224, count=2)
    row = torch.arange(5.0)
    views = apply(spec, row, 3)
    assert isinstance(spec, TableViews) and len(views) == 2
    assert all(torch.equal(view, row) for view in views) and spec.shapes(5) == [(5,), (5,)]
    assert spec.evaluation().count == 1
    with pytest.raises(ValueError, match=r"want float \(F,\)"):
        spec.apply(torch.zeros(2, 5), 0)
