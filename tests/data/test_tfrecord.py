"""TFRecord files: read without TensorFlow, indexed, and damaged."""

import os
import pickle
import struct

import numpy as np
import pytest

from fastssl.data.errors import BadItem, DataError
from fastssl.data.sources import tfrecord as room
from fastssl.data.sources.base import EncodedSource
from fastssl.data.sources.remote import filesystem
from fastssl.data.sources.tfrecord import (
    TFRecordSource,
    example_bytes,
    example_label,
    parse_example,
)
from tests.data.made import encoded, example, field, names, record, reds, tfrecord


def opened(path, **options):
    return TFRecordSource(path=str(path), **options).open()


def two(folder):
    tfrecord(folder / "a-00000-of-00002.tfrecord", 0, 4)
    tfrecord(folder / "a-00001-of-00002.tfrecord", 4, 3)
    return folder


def test_a_record_that_tensorflow_wrote():
    """tf.io.TFRecordWriter on b"": its checksums of the length 0 and of no data."""
    data = record(b"")
    assert data[:8] == bytes(8) and struct.unpack("<I", data[12:])[0] == 0xA282EAD8


@pytest.mark.parametrize("pattern", ["", "a-*", "a-{00000..00001}-of-00002.tfrecord"])
def test_any_order_over_all_files(tmp_path, pattern):
    two(tmp_path)
    for _ in range(2):
        (whole,) = opened(tmp_path / pattern if pattern else tmp_path)
        assert reds(whole) == list(range(7)) and whole.classes == ("0", "1", "2")
        assert whole.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
        assert whole.name(5) == "a-00001-of-00002.tfrecord/1"
    part = pickle.loads(pickle.dumps(whole.select(np.array([6, 0]))))
    assert isinstance(part, EncodedSource) and part.encoded(1) == encoded(0)
    assert reds(part) == [6, 0] and part.labels.tolist() == [0, 0]


def test_own_split(tmp_path):
    tfrecord(tmp_path / "train/a.tfrec", 0, 3)
    tfrecord(tmp_path / "val/a.tfrec", 3, 2)
    train, test = opened(tmp_path)
    assert reds(train) == [0, 1, 2] and reds(test) == [3, 4]
    train, test = opened(tmp_path / "train", val=str(tmp_path / "val/*"))
    assert len(train) == 3 and len(test) == 2


def test_other_keys_and_labels(tmp_path):
    rows = [{"x": 1.5, "img": encoded(k), "name": name} for k, name in enumerate("bab")]
    (tmp_path / "a.tfrecord").write_bytes(b"".join(record(example(row)) for row in rows))
    (whole,) = opened(tmp_path, image="img", label="name")
    assert whole.classes == ("a", "b") and whole.labels.tolist() == [1, 0, 1]
    assert reds(whole) == [0, 1, 2]
    assert opened(tmp_path, image="img", labels=False)[0].labels is None
    (wrong,) = opened(tmp_path)
    with pytest.raises(BadItem, match="no feature 'image/encoded', but 'x', 'img', 'name'"):
        wrong.item(0)


def test_fields_of_every_kind():
    unpacked = parse_example(record(example({"n": 300}, packed=False)))
    assert example_label(unpacked, "n") == 300
    strange = parse_example(record(example({"n": 2**63, "f": 0.5, "e": b""})))
    assert example_label(strange, "n") is None  # negative
    assert example_label(strange, "f") is None
    assert example_label(strange, "e") == ""
    assert example_bytes(strange, "e") == b""
    other = b"\x08\x01" + b"\x15abcd" + b"\x19abcdefgh" + field(9, b"x")  # a number, 4 and 8 bytes
    assert example_bytes(parse_example(record(other + example({"k": b"v"}))), "k") == b"v"
    with pytest.raises(ValueError, match="'n' has no bytes"):
        example_bytes(unpacked, "n")
    for bad in (b"\x80" * 11, b"\x0a\x7f", b"\x0b", b"\xff", field(1, field(1, b"\x0a\xff\x01"))):
        with pytest.raises(ValueError, match="no readable tf.train.Example: "):
            parse_example(record(bad))


def test_the_index_is_dalis(tmp_path):
    (tmp_path / "a.tfrecord").write_bytes(record(b"x" * 10) + record(b"y" * 20))
    opened(tmp_path)
    assert (tmp_path / "a.tfrecord.idx").read_text() == "0 26\n26 36\n"


@pytest.mark.parametrize("name", ["a.idx", "a.tfrecord.idx"])
def test_an_index_spares_the_scan(tmp_path, monkeypatch, name):
    tfrecord(tmp_path / "a.tfrecord", 0, 3)
    opened(tmp_path)
    os.rename(tmp_path / "a.tfrecord.idx", tmp_path / name)
    monkeypatch.setattr(room, "_scanned", None)
    monkeypatch.setattr(room, "_label", None)  # labels are kept, too
    assert reds(opened(tmp_path)[0]) == [0, 1, 2]


@pytest.mark.parametrize(
    "text",
    ["", "x", "0", "0 20\n", "0 {first}\n", "5 {n}\n{n} {n}\n", "0 {n}\n1 {n}\n", "0 1\n1 99999\n"],
)
def test_an_index_that_does_not_fit_is_made_anew(tmp_path, text):
    size = tfrecord(tmp_path / "a.tfrecord", 0, 2).stat().st_size
    first = len(tfrecord(tmp_path / "one", 0, 1).read_bytes())  # whole, but not all there is
    (tmp_path / "a.tfrecord.idx").write_text(text.format(n=size // 2, first=first))
    assert reds(opened(tmp_path)[0]) == [0, 1]
    assert reds(opened(tmp_path)[0]) == [0, 1]


def test_a_cut_file_is_used_as_far_as_it_goes(tmp_path, caplog):
    path = tfrecord(tmp_path / "a.tfrecord", 0, 3)
    path.write_bytes(path.read_bytes()[:-20])
    (whole,) = opened(tmp_path)
    assert "cut off in its record 2" in caplog.text and not list(tmp_path.glob("*.idx"))
    assert reds(whole.select(np.arange(2))) == [0, 1]
    with pytest.raises(BadItem, match="a.tfrecord/2: its file ends 20 bytes before"):
        whole.item(2)


def test_a_file_shorter_than_its_index(tmp_path):
    path = tfrecord(tmp_path / "a.tfrecord", 0, 3)
    opened(tmp_path)
    when, data = path.stat().st_mtime, path.read_bytes()
    path.write_bytes(data[: len(data) // 3 + 5])
    os.utime(path, (when, when))
    (whole,) = opened(tmp_path)
    assert len(whole) == 3 and whole.item(0)[0, 0, 0] == 0
    for i in (1, 2):
        with pytest.raises(BadItem, match="its file ends"):
            whole.item(i)


def test_behind_a_damaged_length_the_rest_is_one_bad_item(tmp_path, caplog):
    path = tfrecord(tmp_path / "a.tfrecord", 0, 3)
    data = bytearray(path.read_bytes())
    data[len(data) // 3 + 1] ^= 1
    path.write_bytes(data)
    (whole,) = opened(tmp_path)
    assert len(whole) == 2 and whole.item(0)[0, 0, 0] == 0
    with pytest.raises(BadItem, match="a.tfrecord/1: its record is damaged"):
        whole.item(1)
    assert "damaged at byte" in caplog.text


def test_a_damaged_example_is_a_bad_item(tmp_path):
    rows = [record(example({"image/encoded": encoded(0)})), record(b"\xff" * 30)]
    (tmp_path / "a.tfrecord").write_bytes(b"".join(rows))
    (whole,) = opened(tmp_path)
    assert whole.labels is None and whole.item(0)[0, 0, 0] == 0
    with pytest.raises(BadItem, match="a.tfrecord/1: its record is no readable tf.train.Example"):
        whole.item(1)


def _write(data):
    return lambda path: (path / "a.tfrecord").write_bytes(data)


MISTAKES = {
    "missing": (lambda path: None, r"no \.tfrecord file at '.*': give a folder"),
    "empty": (_write(b""), r"no record in 1 files such as '.*a.tfrecord'"),
    "text": (_write(b"no record " * 9), r"'.*a.tfrecord' is no TFRecord file.*fetch it again"),
    "short": (_write(b"no"), r"'.*a.tfrecord' is no TFRecord file"),
    "packed": (_write(b"\x1f\x8b\x08" + bytes(20)), r"is no TFRecord file.*gunzip it first"),
    "folder": (lambda p: (p / "a.tfrecord").mkdir(), r"cannot be read \(Is a directory"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistakes_are_told_in_one_sentence(tmp_path, kind):
    make, words = MISTAKES[kind]
    make(tmp_path)
    with pytest.raises(DataError, match=words) as error:
        opened(tmp_path)
    assert "\n" not in str(error.value)


def test_remote_files(tmp_path):
    two(tmp_path)
    fs, _ = filesystem("memory://x")
    for path in tmp_path.iterdir():
        fs.pipe(f"/records/{path.name}", path.read_bytes())
    for where in ("memory://records", f"file://{tmp_path}"):
        (whole,) = opened(where)
        assert reds(whole) == list(range(7)) and len(whole.classes) == 3
        assert names(whole) == names(opened(tmp_path)[0])
