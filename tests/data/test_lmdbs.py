"""LMDB databases: keys, labels, processes, and damage."""

import os
import pickle
import sys

import lmdb
import numpy as np
import pytest
import torch

from fastssl.data.errors import BadItem, DataError
from fastssl.data.sources import lmdbs
from fastssl.data.sources.base import EncodedSource
from fastssl.data.sources.lmdbs import LmdbSource
from tests.data.made import encoded, names, reds


@pytest.fixture(autouse=True)
def closed():
    yield
    while lmdbs._OPENED:
        lmdbs._OPENED.popitem()[1].close()


def put(path, rows, subdir=True):
    with lmdb.open(str(path), map_size=2**24, subdir=subdir) as database:
        with database.begin(write=True) as transaction:
            for key, value in rows.items():
                transaction.put(key.encode(), value)
    return path


def opened(path, **options):
    (whole,) = LmdbSource(path=path, **options).open()
    return whole


@pytest.mark.parametrize("subdir", [True, False])
def test_keys_with_their_class(tmp_path, subdir):
    rows = {"b/0": encoded(1), "a/1": encoded(2), "a/é": encoded(3), "__len__": b"3"}
    whole = opened(put(tmp_path / "x", rows, subdir))
    assert names(whole) == ["a/1", "a/é", "b/0"] and reds(whole) == [2, 3, 1]
    assert whole.classes == ("a", "b") and whole.labels.tolist() == [0, 0, 1]
    part = pickle.loads(pickle.dumps(whole.select(np.array([2, 0]))))
    assert isinstance(part, EncodedSource) and part.encoded(0) == encoded(1)
    assert reds(part) == [1, 2] and part.labels.tolist() == [1, 0]


def test_labels_under_keys_of_their_own(tmp_path):
    rows = {f"image-{k}": encoded(k) for k in range(3)} | {"num-samples": b"3"}
    rows |= {f"label-{k}": text for k, text in enumerate((b"10", b"9", b"10\n"))}
    path = put(tmp_path, rows)
    whole = opened(path, image="image-*", label="label-*")
    assert reds(whole) == [0, 1, 2] and whole.classes == ("9", "10")
    assert whole.labels.tolist() == [1, 0, 1]
    assert opened(path, image="image-*").labels is None
    with pytest.raises(DataError, match="key 'image-0' has no label at 'class-0'"):
        opened(path, image="image-*", label="class-*")
    with pytest.raises(DataError, match="has no key like 'picture-[*]'"):
        opened(path, image="picture-*")
    with pytest.raises(DataError, match="image='image' has not one [*]"):
        opened(path, image="image")


def _reds_of(source, queue):
    queue.put(reds(source))


def test_workers_of_either_kind_read_alike(tmp_path):
    """Forked with the database open, or, as spawned ones, unpickled where it is not."""
    whole = opened(put(tmp_path, {f"a/{k}": encoded(k) for k in range(4)}))
    assert whole.item(0)[0, 0, 0] == 0  # it is open here
    context = torch.multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=_reds_of, args=(whole, queue))
    process.start()
    assert queue.get() == [0, 1, 2, 3]
    process.join()
    assert reds(whole) == [0, 1, 2, 3]
    lmdbs._OPENED.popitem()[1].close()
    assert reds(pickle.loads(pickle.dumps(whole))) == [0, 1, 2, 3]


def test_bad_values_and_keys_that_vanish(tmp_path):
    whole = opened(put(tmp_path, {"a": encoded(1), "b": b"no picture", "c": encoded(2)}))
    with pytest.raises(BadItem, match="^b: cannot identify"):
        whole.item(1)
    lmdbs._OPENED.popitem()[1].close()
    with lmdb.open(str(tmp_path), map_size=2**24) as database:
        with database.begin(write=True) as transaction:
            transaction.delete(b"c")
    with pytest.raises(BadItem, match="^c: the database has no such key any more"):
        whole.item(2)


def test_no_database(tmp_path):
    with pytest.raises(DataError, match="is no readable LMDB database"):
        opened(tmp_path / "none")
    with pytest.raises(DataError, match="is no readable LMDB database"):
        opened(tmp_path)
    (tmp_path / "data.mdb").write_bytes(b"no database" * 9000)
    with pytest.raises(DataError, match="is no readable LMDB database"):
        opened(tmp_path)


def test_a_database_that_is_cut_off(tmp_path):
    file = put(tmp_path, {f"{k}": bytes(5000) for k in range(50)}) / "data.mdb"
    file.write_bytes(file.read_bytes()[:40_000])
    with pytest.raises(DataError, match="data.mdb' has 40000 bytes of .*cut off"):
        opened(tmp_path)


def test_damaged_pages(tmp_path):
    """Fault 42: it was a traceback at the start, or in mid-run."""
    file = put(tmp_path, {f"{k:04d}": encoded(k % 256) for k in range(600)}) / "data.mdb"
    whole = opened(tmp_path)
    data = bytearray(file.read_bytes())
    for page in range(2, len(data) // 4096 - 1):
        data[4096 * page + 10 : 4096 * page + 12] = b"\0\0"  # its flags
    file.with_name("x").write_bytes(data)
    os.replace(file.with_name("x"), file)
    lmdbs._OPENED.popitem()[1].close()
    with pytest.raises(DataError, match="is damaged .*: make or fetch it again"):
        opened(tmp_path)
    with pytest.raises(BadItem, match="the database is damaged there"):
        whole.item(300)


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(DataError, match="pip install lmdb"):
        opened(tmp_path)
