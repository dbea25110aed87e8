"""Volumes in .npy files: dtypes, shapes; unreadable ones are named, not fatal."""

import numpy as np
import pytest
import torch

from fastssl.data.datasets import open_source
from fastssl.data.errors import BadItem, DataError
from fastssl.data.sources.npy import NpySource, decode_npy

SHAPE = (4, 5, 6)


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array, allow_pickle=True)
    return path


@pytest.mark.parametrize("dtype", ["u1", "i2", ">u2", "f2", "f4", "f8"])
def test_bytes_stay_and_numbers_become_float32(dtype, tmp_path):
    x = np.arange(120).reshape(SHAPE).astype(dtype)
    got = decode_npy(write(tmp_path / "a.npy", x), "a.npy")
    assert got.dtype == (torch.uint8 if dtype == "u1" else torch.float32)
    assert got.shape == (1, *SHAPE) and got.flatten().tolist() == list(range(120))


def test_channels_and_memory_order(tmp_path):
    x = np.asfortranarray(np.random.default_rng(0).random((2, *SHAPE)))
    got = decode_npy(write(tmp_path / "a.npy", x), "a.npy", channels=2)
    np.testing.assert_allclose(got, x, rtol=1e-6)


BAD = {
    "text": (np.array(["a"]), "want integers or floats"),
    "object": (np.array([{}]), "allow_pickle=False"),
    "flat": (np.zeros((3, 4)), r"shape \[3, 4\], want \(1, D, H, W\)"),
    "two channels": (np.zeros((2, *SHAPE)), r"shape \[2, 4, 5, 6\], want \(1, D, H, W\)"),
    "empty": (np.zeros((0, 4, 5)), "want"),
    "nan": (np.full(SHAPE, np.nan), "not finite"),
}


@pytest.mark.parametrize("name", BAD)
def test_others_are_bad_items(name, tmp_path):
    array, words = BAD[name]
    path = write(tmp_path / "a.npy", array)
    with pytest.raises(BadItem, match=words):
        decode_npy(path, "a.npy")


def test_a_damaged_file_is_a_bad_item(tmp_path):
    path = tmp_path / "a.npy"
    for data in (b"", b"\x93NUMPY\x01\x00", b"PK\x03\x04rest", b"nonsense"):
        path.write_bytes(data)
        with pytest.raises(BadItem):
            decode_npy(path, "a.npy")


def test_a_folder_of_classes(tmp_path):
    for label in ("high", "low"):
        for i in range(5):
            write(tmp_path / label / f"{i}.npy", np.full(SHAPE, i, "u1"))
    train, test = open_source(NpySource(path=tmp_path), seed=0)
    assert len(train) == 8 and len(test) == 2 and train.channels == 1
    assert train.classes == ("high", "low") and train.item(0).shape == (1, *SHAPE)
    assert train.labels is not None
    with pytest.raises(DataError, match="npy file"):
        open_source(NpySource(path=tmp_path / "none"), seed=0)


def test_a_header_that_claims_too_much_is_a_bad_item(tmp_path):
    """Fault 42: it was a MemoryError."""
    head = "{'descr': '<f4', 'fortran_order': False, 'shape': (1000, 100000, 10000), }"
    data = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + head.ljust(117).encode() + b"\n"
    (tmp_path / "a.npy").write_bytes(data + bytes(64))
    with pytest.raises(BadItem, match="a.npy: .*(length|size)"):
        decode_npy(tmp_path / "a.npy", "a.npy")
