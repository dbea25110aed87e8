"""Sources: what digits and fractals hold, the split, the cache under bad luck."""

import errno
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from sklearn.datasets import load_digits

from fastssl.data.datasets import (
    DigitsSource,
    FolderSource,
    FractalsSource,
    SourceConfig,
    open_source,
    split_indices,
)
from fastssl.data.errors import DataError
from fastssl.data.synthetic import fractals
from fastssl.data.synthetic.fractals import cache_fractals

FRACTALS = FractalsSource(classes=3, per_class=5, size=16)


def names(source):
    return [source.name(i) for i in range(len(source))]


def test_digits_are_scikit_learns():
    found = load_digits()
    split = open_source(DigitsSource(), seed=0)
    assert sum(map(len, split)) == 1797
    for part in split:
        assert part.channels == 1 and part.classes == tuple("0123456789")
        for i in range(0, len(part), 100):
            k = int(part.name(i).removeprefix("digits/"))
            want = np.floor(found.images[k] * 255 / 16 + 0.5)
            assert (part.item(i)[0].numpy() == want).all() and part.item(i).shape == (1, 8, 8)
            assert part.labels[i] == found.target[k]
    assert split.train.item(0).dtype == torch.uint8


def test_split_is_stratified_complete_and_fixed_by_seed():
    a, b, other = (open_source(DigitsSource(test_fraction=0.25), seed) for seed in (3, 3, 4))
    assert names(a.test) == names(b.test) != names(other.test)
    assert len({*names(a.train), *names(a.test)}) == 1797
    for digit in range(10):
        held, left = ((part.labels == digit).sum().item() for part in (a.test, a.train))
        assert held == round(0.25 * (held + left))


@pytest.mark.parametrize(
    "labels, fraction, held",
    [
        (None, 0.2, 2),
        (None, 0.0, 0),
        ([0] * 9 + [1], 0.2, 2),  # a lone image stays in train
        ([0] * 8 + [1] * 2, 0.1, 2),  # small classes are in both
        ([0] * 5 + [2] * 5, 0.99, 8),  # ... and in train; a number nobody has is no matter
    ],
)
def test_split_of_small_sets(labels, fraction, held):
    given = None if labels is None else torch.tensor(labels)
    train, test = split_indices(given, 10, fraction, seed=1)
    assert len(test) == held and sorted([*train, *test]) == list(range(10))
    if labels is not None:
        assert {labels[i] for i in train} == set(labels)


def test_one_image_is_for_training():
    train, test = split_indices(None, 1, 0.5, seed=0)
    assert train.tolist() == [0] and not len(test)


def test_fractals_on_the_fly():
    train, test = open_source(FRACTALS, seed=0)
    assert (len(train), len(test)) == (12, 3) and train.classes == ("0", "1", "2")
    assert test.labels.tolist() == [0, 1, 2]
    assert train.item(0).shape == (3, 16, 16)
    assert names(open_source(FRACTALS, seed=9).test) != names(test)


def test_cached_fractals_are_the_same_images(tmp_path):
    cfg = FRACTALS.model_copy(update={"cache": tmp_path / "new" / "cache"})
    kept, drawn = open_source(cfg, seed=0), open_source(FRACTALS, seed=0)
    for a, b in zip(kept, drawn, strict=True):
        assert names(a) == names(b) and a.classes == b.classes
        assert torch.equal(a.labels, b.labels)
        for i in range(len(a)):
            assert (a.item(i).float() - b.item(i).float()).abs().mean() < 8  # JPEG's loss


def shown(folder):
    """What is there besides the locks."""
    return {path for path in folder.iterdir() if path.suffix != ".lock"}


def test_cache_is_written_once_and_keyed_by_its_config(tmp_path, monkeypatch):
    first = cache_fractals(FRACTALS, tmp_path)
    other = cache_fractals(FRACTALS.model_copy(update={"seed": 1}), tmp_path)
    assert first != other and first.parent == other.parent
    monkeypatch.setattr(fractals, "fractal", None)  # drawing again would fail
    assert cache_fractals(FRACTALS, tmp_path) == first
    assert shown(tmp_path) == {first, other}


def test_writers_at_once_leave_one_whole_cache(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: cache_fractals(FRACTALS, tmp_path), range(4)))
    assert shown(tmp_path) == paths
    assert len(list(paths.pop().rglob("*.jpg"))) == 15


def test_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    drawn = []

    def fill(*key):
        drawn.append(key)
        if len(drawn) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return torch.zeros(3, 16, 16, dtype=torch.uint8)

    monkeypatch.setattr(fractals, "fractal", fill)
    with pytest.raises(DataError, match="cannot write the fractals' cache.*No space left"):
        cache_fractals(FRACTALS, tmp_path)
    assert not shown(tmp_path)


def test_a_killed_writer_is_swept_up(tmp_path):
    left = tmp_path / ".fractals-3x5-16px-seed0.partial/9"
    left.mkdir(parents=True)
    (left / "9.jpg").write_bytes(b"half")
    path = cache_fractals(FRACTALS, tmp_path)
    assert shown(tmp_path) == {path} and len(list(path.rglob("*.jpg"))) == 15


def test_cache_below_a_file_and_cache_with_holes(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write the fractals' cache"):
        cache_fractals(FRACTALS, tmp_path / "file")
    kept = cache_fractals(FRACTALS, tmp_path)
    next(kept.rglob("*.jpg")).unlink()
    with pytest.raises(DataError, match="lost images: delete that folder"):
        open_source(FRACTALS.model_copy(update={"cache": tmp_path}), seed=0)


@pytest.mark.parametrize("cfg", [DigitsSource(), FRACTALS], ids=lambda c: c.name)
def test_sources_survive_pickling(cfg):
    train = open_source(cfg, 0).train
    copy = pickle.loads(pickle.dumps(train))
    assert names(copy) == names(train) and torch.equal(copy.item(3), train.item(3))


def test_config_is_told_by_its_name():
    parse = TypeAdapter(SourceConfig).validate_python
    assert isinstance(parse({"name": "digits"}), DigitsSource)
    assert isinstance(parse({"name": "folder", "path": "x"}), FolderSource)
    for wrong in ({"name": "mnist"}, {"name": "digits", "size": 3}, {"name": "folder"}):
        with pytest.raises(ValidationError):
            parse(wrong)
    with pytest.raises(ValidationError, match="less than 1"):
        parse({"name": "digits", "test_fraction": 1.0})
    for model in (DigitsSource, FractalsSource, FolderSource):
        assert all(field.description for field in model.model_fields.values())
