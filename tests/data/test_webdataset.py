"""WebDataset shards: found, indexed, read at random, and damaged in every way."""

import io
import json
import os
import pickle
import tarfile
from functools import partial

import numpy as np
import pytest
import torch

from fastssl.data.datasets import open_source
from fastssl.data.errors import BadItem, DataError
from fastssl.data.sources import tars, webdataset
from fastssl.data.sources.base import EncodedSource
from fastssl.data.sources.remote import filesystem
from fastssl.data.sources.webdataset import WebDatasetSource
from tests.data.made import encoded, names, reds, shard, tar


def opened(path, **options):
    return WebDatasetSource(path=str(path), **options).open()


def two(folder):
    shard(folder / "train-000000.tar", 0, 4)
    shard(folder / "train-000001.tar", 4, 3)
    return folder


def older(path, seconds=100):
    os.utime(path, (1e9 - seconds, 1e9 - seconds))


@pytest.mark.parametrize("pattern", ["", "train-{000000..000001}.tar", "train-*.tar"])
def test_any_order_over_all_shards(tmp_path, pattern):
    (whole,) = opened(two(tmp_path) / pattern if pattern else two(tmp_path))
    assert reds(whole) == list(range(7)) and names(whole)[5] == "train-000001.tar/0005"
    assert whole.labels.tolist() == [0, 1, 2, 0, 1, 2, 0] and whole.classes == ("0", "1", "2")
    part = whole.select(np.array([6, 0, 3]))
    assert reds(part) == [6, 0, 3] and part.labels.tolist() == [0, 0, 0]
    assert isinstance(part, EncodedSource) and part.encoded(1) == encoded(0)
    copy = pickle.loads(pickle.dumps(part))
    assert reds(copy) == [6, 0, 3] and names(copy) == names(part)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_long_and_odd_in_every_format(tmp_path, form):
    deep = "d" * 90 + "/" + "n" * (60 if form == tarfile.USTAR_FORMAT else 200)
    found = [f"{deep}.png", "a b.png", "c/ü 猫.png", "new\nline.png", "per%20cent.png"]
    tar(tmp_path / "a.tar", [(name, encoded(k)) for k, name in enumerate(found)], form)
    for _ in range(2):  # by the headers, by the index
        (whole,) = opened(tmp_path)
        assert reds(whole) == list(range(5)) and whole.labels is None
        assert names(whole) == ["a.tar/" + name.removesuffix(".png") for name in found]
    assert (tmp_path / "a.idx").read_text().startswith("v1.2 5 quoted\n")


def test_what_a_sample_is(tmp_path):
    members = [
        ("x.seg.png", encoded(1)),
        ("x.JPG", encoded(2)),
        ("x.json", json.dumps({"label": 7}).encode()),
        ("y.txt", b"no image"),
        (".z.png", encoded(3)),
        ("w.edges.png", encoded(4)),
        ("w.cls", b"5\n"),
    ]
    tar(tmp_path / "a.tar", members)
    (whole,) = opened(tmp_path)
    assert names(whole) == ["a.tar/x", "a.tar/w"] and reds(whole) == [2, 4]
    assert whole.labels.tolist() == [7, 5] and len(whole.classes) == 8


def pairs(count, extensions=("png", "cls"), key="{}"):
    """Members of samples: an image whose red is k, and the label k."""
    data = {"png": encoded, "cls": lambda k: str(k).encode()}
    return [(f"{key.format(k)}.{e}", data[e](k)) for k in range(count) for e in extensions]


def test_names_with_dots_are_no_sample_lost(tmp_path):
    """Fault 4: by WebDataset's own rule six images have one key; they are refused, or six."""
    tar(tmp_path / "a.tar", pairs(6, key="photo.{:04d}"))
    for _ in range(2):  # by the headers, by the index
        with pytest.raises(DataError, match="6 images .'photo.0000.png'.* data.source.key=last"):
            opened(tmp_path)
        (whole,) = opened(tmp_path, key="last")
        assert reds(whole) == whole.labels.tolist() == list(range(6))
        assert names(whole)[5] == "a.tar/photo.0005"
    (one,) = opened(tmp_path, image="0002.png", labels=False)
    assert reds(one) == [2]
    tar(tmp_path / "a.tar", pairs(2, ("png",), key="photo.{}"))
    with pytest.raises(DataError, match="a sample has 2 images"):
        opened(tmp_path)


@pytest.mark.parametrize("kind", ["labels last", "labels first", "text", "twice"])
def test_no_label_and_no_image_is_dropped(tmp_path, kind):
    """Fault 4."""
    members = pairs(4)
    if kind.startswith("labels"):
        members.sort(key=lambda m: m[0].endswith("cls") == (kind == "labels last"))
    if kind == "text":
        members = [(name, b"cat\n" if data == b"3" else data) for name, data in members]
    if kind == "twice":
        members = [("x." + name.split(".")[1], data) for name, data in members]
    tar(tmp_path / "a.tar", members)
    for _ in range(2):
        (whole,) = opened(tmp_path)
        assert reds(whole) == [0, 1, 2, 3]
        named = [whole.classes[k] for k in whole.labels.tolist()]
        assert named == ["0", "1", "2", "cat" if kind == "text" else "3"]


def test_links_to_members_are_what_they_stand_for(tmp_path):
    """Fault 4: tar itself writes the second name of a file as a hard link."""
    long = "n" * 150
    links = [("b.png", tarfile.LNKTYPE, "d/a.png"), ("d/c.png", tarfile.SYMTYPE, "../d/a.png")]
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tar(tmp_path / "a.tar", [], form), "w", format=form) as file:
            for name, data in (("d/a.png", encoded(3)), (f"{long}.png", encoded(4))):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
            for name, kind, target in [*links, ("e.png", tarfile.LNKTYPE, f"{long}.png")]:
                info = tarfile.TarInfo(name)
                info.type, info.linkname = kind, target
                file.addfile(info)
        for _ in range(2):
            assert reds(opened(tmp_path)[0]) == [3, 4, 3, 3, 4]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_size_beyond_all_measure_is_damage(tmp_path, form):
    """Fault 42: it was an OverflowError."""
    path, info = shard(tmp_path / "a.tar", 0, 1, labels=False), tarfile.TarInfo("1.png")
    info.size = 2**63
    path.write_bytes(path.read_bytes()[:1024] + info.tobuf(form) + bytes(1024))
    (whole,) = opened(tmp_path)
    assert whole.item(0)[0, 0, 0] == 0
    with pytest.raises(BadItem, match="too many for one item"):
        whole.item(1)


@pytest.mark.parametrize("size", ["9" * 9, "-512", "no"])
def test_a_pax_header_of_no_sound_size_stops_nothing(tmp_path, size):
    info = tarfile.TarInfo("0.png")
    info.size, info.pax_headers = len(encoded(0)), {"size": size}
    data = info.tobuf(tarfile.PAX_FORMAT) + encoded(0) + bytes(-len(encoded(0)) % 512)
    (tmp_path / "a.tar").write_bytes(data + shard(tmp_path / "b", 1, 1).read_bytes())
    assert opened(tmp_path)[0].name(0) == "a.tar/0"


def test_headers_of_headers_without_end_are_refused(tmp_path):
    info = tarfile.TarInfo("x")
    info.type = tarfile.GNUTYPE_LONGNAME
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.USTAR_FORMAT) * 1000)
    with pytest.raises(DataError, match="a.tar' has headers of headers without end: remove it"):
        opened(tmp_path)


def test_what_is_no_plain_file_is_passed_over(tmp_path, caplog):
    """Folders, links that tell a size but have no data, and sparse files, which are in pieces."""
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        kinds = {"d.png": tarfile.DIRTYPE, "l.png": tarfile.LNKTYPE, "s.png": tarfile.SYMTYPE}
        for name, kind in kinds.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, "x", 600 * (kind != tarfile.DIRTYPE)
            file.addfile(info)
        info = tarfile.TarInfo("sparse.png")
        info.size, info.pax_headers = 9, {"GNU.sparse.major": "1"}
        file.addfile(info, io.BytesIO(bytes(9)))
        info = tarfile.TarInfo("x.png")
        info.size = len(encoded(7))
        file.addfile(info, io.BytesIO(encoded(7)))
    (whole,) = opened(tmp_path)
    assert names(whole) == ["a.tar/x"] and reds(whole) == [7]
    assert "3 members are left out, such as 'l.png'" in caplog.text


def test_text_labels_are_classes(tmp_path):
    labels = ["dog", "cat", 3, "dog"]
    pairs = [
        [(f"{k}.png", encoded(k)), (f"{k}.json", json.dumps({"label": label}).encode())]
        for k, label in enumerate(labels)
    ]
    tar(tmp_path / "train/a.tar", pairs[0] + pairs[1])
    tar(tmp_path / "val/a.tar", pairs[2] + pairs[3])
    for _ in range(2):
        train, test = opened(tmp_path)
        assert train.classes == test.classes == ("3", "cat", "dog")
        assert train.labels.tolist() == [2, 1] and test.labels.tolist() == [0, 2]


def test_split_by_folders_by_pattern_and_by_seed(tmp_path):
    shard(tmp_path / "train/0.tar", 0, 6)
    shard(tmp_path / "val/0.tar", 6, 3)
    for options in (
        {"path": tmp_path},
        {"path": tmp_path / "train", "val": f"{tmp_path}/val/0.tar"},
    ):
        train, test = opened(**options)
        assert reds(train) == [*range(6)] and reds(test) == [6, 7, 8]
    split = open_source(WebDatasetSource(path=str(tmp_path / "train")), seed=0)
    assert sorted(reds(split.train) + reds(split.test)) == [*range(6)] and len(split.test) == 3


def test_class_names_of_the_manifest(tmp_path):
    shard(tmp_path / "train/0.tar", 0, 6)
    (tmp_path / "manifest.json").write_text(json.dumps({"classes": ["a", "b", "c"]}))
    for place in (tmp_path / "train", tmp_path / "train/0.tar"):
        assert opened(place)[0].classes == ("a", "b", "c")
    for bad in ({"classes": ["a"]}, {}, [], {"classes": 3}):  # too few for the labels, or no names
        (tmp_path / "manifest.json").write_text(json.dumps(bad))
        assert opened(tmp_path / "train")[0].classes == ("0", "1", "2")


def test_the_index_is_dalis(tmp_path):
    members = [("a/1.png", encoded(1)), ("a/1.cls", b"0"), ("2.jpg", b"x" * 600), ("3", b"")]
    tar(tmp_path / "a.tar", members)
    opened(tmp_path)
    size = len(encoded(1))
    want = f"v1.2 3\npng 512 {size} a/1.png cls 1536 1 a/1.cls\njpg 2560 600 2.jpg\n. 4096 0 3\n"
    assert (tmp_path / "a.idx").read_text() == want


def no_scan(monkeypatch):
    monkeypatch.setattr(tars, "members", None)


@pytest.mark.parametrize("version", ["v1.1", "v1.2"])
def test_an_index_spares_the_scan(tmp_path, monkeypatch, version):
    opened(two(tmp_path))
    if version == "v1.1":
        for path in tmp_path.glob("*.idx"):
            head, *rows = path.read_text().splitlines()
            rows = [" ".join(w for k, w in enumerate(row.split()) if k % 4 != 3) for row in rows]
            path.write_text("\n".join([head.replace("v1.2", "v1.1"), *rows]) + "\n")
    no_scan(monkeypatch)
    (whole,) = opened(tmp_path)
    assert reds(whole) == list(range(7)) and whole.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    number = {"v1.1": "train-000001.tar/1", "v1.2": "train-000001.tar/0005"}
    assert whole.name(5) == number[version]


@pytest.mark.parametrize("name", ["a.tar", "a.idx"])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    """Fault 42."""
    if name != "a.tar":
        shard(tmp_path / "a.tar", 0, 3)
    os.mkfifo(tmp_path / name)
    if name == "a.tar":
        with pytest.raises(DataError, match="a.tar' cannot be read .It is a pipe or a device"):
            opened(tmp_path)
    else:
        assert reds(opened(tmp_path)[0]) == [0, 1, 2] and (tmp_path / name).is_fifo()


def test_a_file_that_is_no_index_is_left_as_it_is(tmp_path, caplog):
    """Fault 45: it was overwritten."""
    shard(tmp_path / "a.tar", 0, 3)
    for name in ("a.idx", "a.tar.labels"):
        (tmp_path / name).write_text("my notes")
    assert opened(tmp_path)[0].labels.tolist() == [0, 1, 2]
    assert {(tmp_path / n).read_text() for n in ("a.idx", "a.tar.labels")} == {"my notes"}
    assert "a.idx is another's file and left as it is" in caplog.text


def test_labels_are_kept_beside_the_shard(tmp_path, monkeypatch):
    opened(two(tmp_path))
    monkeypatch.setattr(webdataset, "_label", None)
    assert opened(tmp_path)[0].labels.tolist() == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("kept", ["", "labels 1 9 9\n", "labels 1 4 {size}\n1\n[]\n2\n3\n", "\xff"])
def test_labels_that_do_not_fit_are_read_anew(tmp_path, kept):
    opened(two(tmp_path))
    path = tmp_path / "train-000000.tar"
    (tmp_path / (path.name + ".labels")).write_text(kept.format(size=path.stat().st_size))
    assert opened(tmp_path)[0].labels.tolist() == [0, 1, 2, 0, 1, 2, 0]


def _stale(folder):
    older(folder / "train-000000.idx", 10**8)


def _text(text):
    def write(folder):
        (folder / "train-000000.idx").write_text(text)

    return write


def _of_another(folder):
    (folder / "train-000000.idx").write_bytes((folder / "train-000001.idx").read_bytes())


def _of_other_sizes(folder):
    index = folder / "train-000000.idx"
    index.write_text(index.read_text().replace(f" {len(encoded(0))} ", f" {len(encoded(0)) + 1} "))


def _longer_shard(folder):
    index = (folder / "train-000000.idx").read_bytes()
    shard(folder / "train-000000.tar", 0, 5)
    (folder / "train-000000.idx").write_bytes(index)


MISFITS = {
    "older": _stale,
    "empty": _text(""),
    "no index": _text("hello world\n"),
    "future": _text("v9.9 1\npng 512 70 a.png\n"),
    "short line": _text("v1.2 1\npng 512\n"),
    "no number": _text("v1.2 1\npng x 70 a.png\n"),
    "too few": _text("v1.2 3\npng 512 70 0000.png\n"),
    "other size": _of_other_sizes,
    "unaligned": _text("v1.2 1\npng 513 70 0000.png\n"),
    "negative": _text("v1.2 1\npng -512 70 0000.png\n"),
    "none": _text("v1.2 0\n"),
    "another's": _of_another,
    "the shard grew": _longer_shard,
}


@pytest.mark.parametrize("kind", MISFITS)
def test_an_index_that_does_not_fit_is_made_anew(tmp_path, kind):
    opened(two(tmp_path))
    good = (tmp_path / "train-000000.idx").read_bytes()
    MISFITS[kind](tmp_path)
    (whole,) = opened(tmp_path)
    grown = kind == "the shard grew"
    assert reds(whole) == ([0, 1, 2, 3, 4] if grown else [0, 1, 2, 3]) + [4, 5, 6]
    others = kind in ("no index", "future")  # left as they are
    assert grown or others or (tmp_path / "train-000000.idx").read_bytes() == good


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    two(tmp_path)

    def refuse(*args):
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr("fastssl.data.sources.files.os.replace", refuse)
    assert reds(opened(tmp_path)[0]) == list(range(7))
    assert sorted(os.listdir(tmp_path)) == ["train-000000.tar", "train-000001.tar"]


def cut(path, size):
    with open(path, "r+b") as file:
        file.truncate(size)


def test_a_cut_shard_is_used_as_far_as_it_goes(tmp_path, caplog):
    path = shard(two(tmp_path) / "train-000000.tar", 0, 4)
    cut(path, 3 * 2048 + 512 + 20)  # within the image of the last sample
    (whole,) = opened(tmp_path)
    assert "cut off in its member 0003.png" in caplog.text
    assert reds(whole.select(np.arange(3))) == [0, 1, 2] and whole.name(4).endswith("0004")
    with pytest.raises(BadItem, match="^train-000000.tar/0003: its file ends"):
        whole.item(3)
    assert not (tmp_path / "train-000000.idx").exists()


def test_a_cut_header_or_label(tmp_path):
    path = shard(tmp_path / "a.tar", 0, 3)
    cut(path, 2 * 2048 + 100)
    assert reds(opened(tmp_path)[0]) == [0, 1]
    cut(path, 2048 + 1024 + 512)  # behind the header of the second label
    (whole,) = opened(tmp_path)
    assert len(whole) == 2 and whole.item(0)[0, 0, 0] == 0
    with pytest.raises(BadItem, match="a.tar/0001: it has no label"):
        whole.item(1)
    assert reds(opened(tmp_path, labels=False)[0]) == [0, 1]


@pytest.mark.parametrize("text", [b"0", b"cat"])
def test_no_label_among_others_is_a_bad_item(tmp_path, text):
    members = [(name, text if data == b"0" else data) for name, data in pairs(2)]
    tar(tmp_path / "a.tar", [*members, ("c.png", encoded(2))])
    (whole,) = opened(tmp_path)
    assert [whole.classes[k] for k in whole.labels.tolist()[:2]] == [text.decode(), "1"]
    with pytest.raises(BadItem, match="a.tar/c: it has no label"):
        whole.item(2)


def test_a_shard_shorter_than_its_index(tmp_path):
    opened(two(tmp_path))
    path = tmp_path / "train-000000.tar"
    when = path.stat().st_mtime
    cut(path, 2048 + 512 + 10)
    os.utime(path, (when, when))
    (whole,) = opened(tmp_path)
    assert len(whole) == 7 and whole.item(0)[0, 0, 0] == 0 and whole.item(6)[0, 0, 0] == 6
    for i in (1, 2, 3):
        with pytest.raises(BadItem, match=f"train-000000.tar/000{i}: its file ends"):
            whole.item(i)


def test_a_damaged_header_loses_one_member(tmp_path, caplog):
    path = shard(tmp_path / "a.tar", 0, 4, labels=False)
    data = bytearray(path.read_bytes())
    data[1024 + 3] ^= 255  # in the second header
    path.write_bytes(data)
    assert reds(opened(tmp_path)[0]) == [0, 2, 3]
    assert "damaged at byte 1024; next member at 2048" in caplog.text


def test_a_shard_that_vanishes_or_fails_later(tmp_path, monkeypatch):
    whole = pickle.loads(pickle.dumps(opened(two(tmp_path))[0]))  # has nothing open
    (tmp_path / "train-000000.tar").unlink()
    with pytest.raises(BadItem, match="^train-000000.tar/0000: No such file"):
        whole.item(0)
    assert whole.item(5)[0, 0, 0] == 5

    def fail(*args):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr("fastssl.data.sources.files.os.pread", fail)
    with pytest.raises(OSError, match="Stale file"):
        whole.item(5)


def _packed(path):
    with tarfile.open(path / "a.tar", "w:gz") as file:
        file.add(__file__)


def _write(data):
    return lambda path: (path / "a.tar").write_bytes(data)


MISTAKES = {
    "missing": (lambda path: None, r"no \.tar file at '.*': give a folder of them, or a pattern"),
    "empty": (_write(b""), r"'.*a.tar' is empty"),
    "text": (_write(b"no tar " * 200), r"'.*a.tar' is no tar file"),
    "short": (_write(b"no tar"), r"no image in 1 shards such as '.*a.tar'"),
    "zeros": (_write(bytes(10240)), r"no image in 1 shards such as '.*a.tar'"),
    "packed": (_packed, r"'.*a.tar' is compressed.*gunzip it first"),
    "no image": (lambda p: tar(p / "a.tar", [("a.txt", b"")]), r"no image in 1 shards"),
    "folder": (lambda p: (p / "a.tar").mkdir(), r"shard '.*a.tar' cannot be read \(Is a directory"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistakes_are_told_in_one_sentence(tmp_path, kind):
    make, words = MISTAKES[kind]
    make(tmp_path)
    with pytest.raises(DataError, match=words) as error:
        opened(tmp_path)
    assert "\n" not in str(error.value)


def test_a_shard_of_a_pattern_that_is_missing(tmp_path):
    with pytest.raises(DataError, match=r"shard '.*train-000002.tar' cannot be read \(No such"):
        opened(two(tmp_path) / "train-{000000..000002}.tar")


def test_numbers_that_are_no_classes(tmp_path):
    tar(tmp_path / "a.tar", [("a.png", encoded()), ("a.cls", b"1234567890123")])
    with pytest.raises(DataError, match="label 1234567890123 is above 1048575.*labels=false"):
        opened(tmp_path)
    assert opened(tmp_path, labels=False)[0].labels is None


@pytest.mark.parametrize("scheme", ["file://", "memory://"])
def test_remote_shards(tmp_path, scheme):
    where = f"{scheme}{two(tmp_path)}"
    if scheme == "memory://":
        fs, inner = filesystem(where)
        for path in tmp_path.iterdir():
            fs.pipe(f"{inner}/{path.name}", path.read_bytes())
        fs.pipe(f"{inner}/manifest.json", b'{"classes": ["x", "y", "z"]}')
    (whole,) = opened(where)
    assert reds(pickle.loads(pickle.dumps(whole))) == list(range(7))
    assert whole.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert whole.classes == (("x", "y", "z") if scheme == "memory://" else ("0", "1", "2"))
    assert names(whole) == names(opened(f"{where}/train-{{000000..000001}}.tar")[0])
    assert not list(tmp_path.glob("*.idx"))
    with pytest.raises(DataError, match="shard 'memory://none.tar' cannot be read"):
        opened("memory://none.tar")


def _reds_of(source, queue):
    queue.put(reds(source))


def test_workers_of_either_kind_read_alike(tmp_path):
    """Forked, or unpickled as spawned ones are."""
    (whole,) = opened(two(tmp_path))
    whole.item(0)  # a descriptor is open
    for source in (whole, pickle.loads(pickle.dumps(whole))):
        context = torch.multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        process = context.Process(target=partial(_reds_of, source, queue))
        process.start()
        assert queue.get() == list(range(7))
        process.join()
