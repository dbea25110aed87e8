"""Damaged at random: whatever the bytes, an item or a BadItem or DataError, and nothing else."""

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl.data.errors import BadItem, DataError
from fastssl.data.sources.arrays import ArraysSource
from fastssl.data.sources.decode import decode_bytes
from fastssl.data.sources.tars import parse_index
from fastssl.data.sources.tfrecord import TFRecordSource
from fastssl.data.sources.webdataset import WebDatasetSource
from tests.covering import examples
from tests.data.made import noise, shard, tfrecord

KINDS = {"JPEG": {}, "PNG": {}, "WEBP": {}, "BMP": {}, "GIF": {}, "TIFF": {}, "PPM": {}}


@st.composite
def damages(draw):
    """What is done to bytes: some of them set anew, and perhaps the end cut off."""
    flips = st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255))
    return draw(st.lists(flips, max_size=6)), draw(st.none() | st.floats(0, 1))


def damaged(data: bytes, damage) -> bytes:
    flips, cut = damage
    changed = bytearray(data)
    for place, value in flips:
        changed[int(place * len(changed))] = value
    return bytes(changed if cut is None else changed[: int(cut * len(changed))])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=examples(60, 20))
@given(damage=damages())
def test_images(kind, damage):
    try:
        pixels = decode_bytes(damaged(noise(kind), damage), "a")
    except BadItem as error:
        assert error.name == "a" and error.reason and "\n" not in str(error)
        return
    assert pixels.dtype == torch.uint8 and pixels.ndim == 3 and pixels.shape[0] == 3


@cache
def files(kind: str) -> dict[str, bytes]:
    """The files of a small data set, with the index that opening it leaves there."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        if kind == "tar":
            shard(path / "a.tar", 0, 4)
            WebDatasetSource(path=folder).open()
        elif kind == "tfrecord":
            tfrecord(path / "a.tfrecord", 0, 4)
            TFRecordSource(path=folder).open()
        else:
            np.save(path / "a.npy", np.arange(4 * 30, dtype=np.uint8).reshape(4, 5, 6))
        return {file.name: file.read_bytes() for file in path.iterdir()}


def opened(kind: str, folder: str):
    if kind == "npy":
        return ArraysSource(path=Path(folder) / "a.npy").open()
    return (WebDatasetSource if kind == "tar" else TFRecordSource)(path=folder).open()


CASES = [
    *(("tar", name) for name in ("a.tar", "a.idx", "a.tar.labels")),
    *(("tfrecord", name) for name in ("a.tfrecord", "a.tfrecord.idx", "a.tfrecord.labels")),
    ("npy", "a.npy"),
]


@pytest.mark.parametrize("kind, name", CASES)
@pytest.mark.parametrize("indexed", [True, False])
@settings(max_examples=examples(40, 12))
@given(damage=damages())
def test_data_sets(kind, name, indexed, damage):
    whole = files(kind)
    data = next(n for n in whole if n.rsplit(".", 1)[-1] == kind)
    with tempfile.TemporaryDirectory() as folder:
        for file, content in whole.items():  # the data first: their index is to be the younger
            if file == data:
                (Path(folder) / file).write_bytes(
                    damaged(content, damage) if file == name else content
                )
        for file, content in whole.items():
            if file != data and (indexed or file == name):
                (Path(folder) / file).write_bytes(
                    damaged(content, damage) if file == name else content
                )
        try:
            (source,) = opened(kind, folder)
        except DataError as error:
            assert "\n" not in str(error)
            return
        for i in range(len(source)):
            try:
                assert source.item(i).dtype == torch.uint8
            except BadItem as error:
                assert error.name == source.name(i)


@settings(max_examples=examples(200, 60))
@given(st.binary(max_size=80) | st.text(alphabet="v1.2 \npngq", max_size=60).map(str.encode))
def test_indices(text):
    try:
        found = parse_index(text)
    except ValueError:
        return
    assert all(isinstance(part.offset, int) for sample in found for part in sample)
