"""Data sets of Hugging Face's `datasets`, from the disk alone."""

import pickle
import socket
import sys

import datasets
import numpy as np
import pytest

from fastssl.data.errors import BadItem, DataError
from fastssl.data.sources.base import EncodedSource
from fastssl.data.sources.hf_datasets import HFDatasetsSource
from tests.data.made import encoded, names, reds


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    datasets.disable_progress_bars()


def rows(first=0, count=4, label=None, **columns):
    """Images whose red is first, ...; label: the feature of their labels k % 2."""
    data = {"image": [{"bytes": encoded(first + k), "path": None} for k in range(count)]}
    features = {"image": datasets.Image()}
    if label is not None:
        data["label"] = [k % 2 for k in range(count)]
        features["label"] = label
    for name, values in columns.items():
        data[name], features[name] = values, datasets.Value("string")
    return datasets.Dataset.from_dict(data, features=datasets.Features(features))


NAMED = datasets.ClassLabel(names=["cat", "dog"])


def opened(path, **options):
    return HFDatasetsSource(path=path, cache=path.parent / "cache", **options).open()


def test_a_saved_data_set(tmp_path):
    rows(label=NAMED).save_to_disk(str(tmp_path / "a"))
    (whole,) = opened(tmp_path / "a")
    assert reds(whole) == [0, 1, 2, 3] and names(whole)[2] == "train/2"
    assert whole.classes == ("cat", "dog") and whole.labels.tolist() == [0, 1, 0, 1]
    part = pickle.loads(pickle.dumps(whole.select(np.array([3, 0]))))
    assert isinstance(part, EncodedSource) and part.encoded(1) == encoded(0)
    assert reds(part) == [3, 0] and part.labels.tolist() == [1, 0]
    assert opened(tmp_path / "a", labels=False)[0].labels is None


@pytest.mark.parametrize("test", ["validation", "test"])
def test_a_saved_split(tmp_path, test):
    parts = {test: rows(4, 2, NAMED), "train": rows(label=NAMED), "more": rows()}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "a"))
    train, held_out = opened(tmp_path / "a")
    assert reds(train) == [0, 1, 2, 3] and reds(held_out) == [4, 5]
    assert train.classes == held_out.classes and held_out.name(1) == f"{test}/1"


def test_text_labels_are_numbered_over_both_parts(tmp_path):
    parts = {
        "train": rows(label=None, kind=["b", "a", "b", "b"]),
        "test": rows(4, 2, kind=["c", "b"]),
    }
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "a"))
    train, test = opened(tmp_path / "a", label="kind")
    assert train.classes == test.classes == ("a", "b", "c")
    assert train.labels.tolist() == [1, 0, 1, 1] and test.labels.tolist() == [2, 1]
    assert opened(tmp_path / "a")[0].labels is None  # no column of that name


def test_whole_numbers_and_labels_kept_back(tmp_path):
    number = datasets.Value("int64")
    rows(label=number).save_to_disk(str(tmp_path / "a"))
    assert opened(tmp_path / "a")[0].classes == ("0", "1")
    hidden = rows(4, 2).add_column("label", [-1, -1])
    parts = {"train": rows(label=number), "test": hidden}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "b"))
    assert all(part.labels is None for part in opened(tmp_path / "b"))
    rows(count=2).add_column("label", [0, -1]).save_to_disk(str(tmp_path / "c"))
    with pytest.raises(DataError, match="column label='label' goes from -1 to 0"):
        opened(tmp_path / "c")
    rows(count=2).add_column("label", [0.5, 1.0]).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(DataError, match="want whole numbers or texts"):
        opened(tmp_path / "d")


def test_null_labels_are_told(tmp_path):
    """Fault 17: they were called no whole numbers."""
    labels = ["dog", None, "cat", None]
    data = rows().add_column("label", labels)
    data.save_to_disk(str(tmp_path / "a"))
    with pytest.raises(DataError, match="column label='label' is null in 2 rows, and not in other"):
        opened(tmp_path / "a")


def test_parquet_files(tmp_path):
    (tmp_path / "a/data").mkdir(parents=True)
    rows(label=NAMED).to_parquet(str(tmp_path / "a/data/train-00000.parquet"))
    rows(4, 2, NAMED).to_parquet(str(tmp_path / "a/data/test-00000.parquet"))
    train, test = opened(tmp_path / "a")
    assert reds(train) == [0, 1, 2, 3] and reds(test) == [4, 5] and train.classes == ("cat", "dog")
    (one,) = opened(tmp_path / "a/data/test-00000.parquet")
    assert reds(one) == [4, 5]


def test_a_column_of_plain_bytes(tmp_path):
    plain = datasets.Dataset.from_dict({"png": [encoded(3), encoded(4)]})
    plain = plain.cast_column("png", datasets.Value("binary"))
    plain.save_to_disk(str(tmp_path / "a"))
    assert reds(opened(tmp_path / "a", image="png")[0]) == [3, 4]


def test_an_image_folder_is_read_from_its_files(tmp_path):
    for k, name in enumerate(("a", "b")):
        (tmp_path / "x" / name).mkdir(parents=True)
        (tmp_path / "x" / name / "1.png").write_bytes(encoded(k))
    (whole,) = opened(tmp_path / "x")
    assert reds(whole) == [0, 1] and whole.classes == ("a", "b")
    (tmp_path / "x/a/1.png").unlink()
    with pytest.raises(BadItem, match="^train/0: No such file"):
        whole.item(0)


def test_bad_rows(tmp_path):
    data = {"image": [{"bytes": b"no picture", "path": None}, None]}
    found = datasets.Dataset.from_dict(data, datasets.Features({"image": datasets.Image()}))
    found.save_to_disk(str(tmp_path / "a"))
    (whole,) = opened(tmp_path / "a")
    for i, reason in enumerate(("cannot identify", "its row has no image")):
        with pytest.raises(BadItem, match=f"^train/{i}: {reason}"):
            whole.item(i)


def test_mistakes_are_told_in_one_sentence(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        opened(tmp_path / "none")
    rows(kind=["a"] * 4).save_to_disk(str(tmp_path / "a"))
    with pytest.raises(DataError, match=r"image='kind' has no images; the columns are image \("):
        opened(tmp_path / "a", image="kind")
    rows(count=0).to_parquet(str(tmp_path / "b.parquet"))
    with pytest.raises(DataError, match="b.parquet' is no data set that can be read .*no data"):
        opened(tmp_path / "b.parquet")
    next((tmp_path / "a").glob("*.arrow")).write_bytes(b"no table")
    with pytest.raises(DataError, match="is no data set that can be read"):
        opened(tmp_path / "a")


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        opened(tmp_path)
