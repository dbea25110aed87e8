"""Packing: the same images and labels from shards, the same bytes twice, and no harm in failure."""

import errno
import hashlib
import json
import os
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fastssl import cli
from fastssl.data.datasets import DigitsSource, FolderSource, open_source
from fastssl.data.errors import DataError
from fastssl.data.sources import pack as room
from fastssl.data.sources import tars
from fastssl.data.sources.pack import PackError, PackOptions, pack
from fastssl.data.sources.webdataset import WebDatasetSource
from fastssl.data.synthetic.clips import ClipsSource
from tests.data.made import encoded, noise, reds


def folder(root, split=False):
    """Six images in two classes, a PNG that is called .jpg among them, and one that is none."""
    tops = [root / "train", root / "val"] if split else [root]
    for n, top in enumerate(tops):
        for k in range(6):
            path = top / "ab"[k % 2] / f"ü {k}.x.{'jpg' if k == 3 else 'png'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(10 * n + k))
        (top / "a" / "bad.png").write_bytes(b"no picture")
    return root


def packed(source, out, **options):
    return pack(source.open(), out, PackOptions(**options))


def unpacked(out):
    return WebDatasetSource(path=str(out)).open()


def tree(root):
    return {p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def visible(root):
    return sorted(name for name in os.listdir(root) if not name.endswith(".lock"))


def test_images_and_labels_come_back(tmp_path, monkeypatch):
    source = FolderSource(path=folder(tmp_path / "in"))
    manifest = packed(source, tmp_path / "out")
    monkeypatch.setattr(tars, "members", None)  # the index is there
    (whole,) = unpacked(tmp_path / "out")
    assert reds(whole) == [0, 2, 4, 1, 3, 5] and whole.classes == ("a", "b")
    assert whole.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert whole.encoded(1) == encoded(2)
    assert whole.name(0) == "data-000000.tar/00000001-a_0_x"
    assert [s["name"] for s in manifest["skipped"]] == ["a/bad.png"]
    assert "cannot identify" in manifest["skipped"][0]["reason"]
    assert manifest == json.loads((tmp_path / "out/manifest.json").read_text())
    (told,) = manifest["parts"]["data"]["shards"]
    data = (tmp_path / "out" / told["name"]).read_bytes()
    assert told["samples"] == 6 and told["bytes"] == len(data) == manifest["parts"]["data"]["bytes"]
    assert told["sha256"] == hashlib.sha256(data).hexdigest()


def test_shards_are_plain_tar_files_that_others_read(tmp_path):
    packed(FolderSource(path=folder(tmp_path / "in")), tmp_path / "out")
    with tarfile.open(tmp_path / "out/data-000000.tar") as file:
        members = file.getmembers()
        names = [m.name.split("-")[1] for m in members]
        assert names[:2] == ["a_0_x.png", "a_0_x.cls"] and len(names) == 12
        assert all(
            (m.mtime, m.uid, m.gid, m.uname, m.mode) == (0, 0, 0, "", 0o644) for m in members
        )
        assert {n.split(".")[1] for n in names} == {"png", "cls"}  # by the bytes, not the name
    index, told = (
        tmp_path / "out/data-000000.idx",
        tars.Files([str(tmp_path / "out/data-000000.tar")]),
    )
    found = list(
        tars.samples(tars.members(told, 0, (tmp_path / "out/data-000000.tar").stat().st_size))
    )
    assert tars.index_text(found) == index.read_bytes()


def test_the_same_bytes_twice(tmp_path):
    for n, workers in enumerate((1, 3)):
        source = FolderSource(path=folder(tmp_path / f"in{n}", split=True))
        packed(source, tmp_path / f"out{n}", workers=workers, shard_bytes=4000)
    assert tree(tmp_path / "out0") == tree(tmp_path / "out1")


def test_own_split_stays(tmp_path):
    source = FolderSource(path=folder(tmp_path / "in", split=True))
    manifest = packed(source, tmp_path / "out")
    train, test = unpacked(tmp_path / "out")
    assert reds(train) == [0, 2, 4, 1, 3, 5] and reds(test) == [10, 12, 14, 11, 13, 15]
    assert train.classes == test.classes == ("a", "b") and set(manifest["parts"]) == {
        "train",
        "val",
    }
    assert len(manifest["skipped"]) == 2


def test_shards_have_a_size(tmp_path):
    packed(FolderSource(path=folder(tmp_path / "in")), tmp_path / "out", shard_bytes=5000)
    shards = sorted((tmp_path / "out").glob("*.tar"))
    assert len(shards) == 3 and all(path.stat().st_size <= 5000 + 1024 for path in shards)
    assert reds(unpacked(tmp_path / "out")[0]) == [0, 2, 4, 1, 3, 5]
    packed(FolderSource(path=tmp_path / "in"), tmp_path / "tiny", shard_bytes=1)
    assert len(list((tmp_path / "tiny").glob("*.tar"))) == 6


def test_sources_without_files_become_png(tmp_path):
    source = DigitsSource()
    (whole,) = source.open()
    some = whole.select(np.arange(20))
    pack((some,), tmp_path / "out")
    (back,) = unpacked(tmp_path / "out")
    assert torch.equal(back.labels, some.labels) and back.classes == some.classes
    assert all(torch.equal(back.item(i), some.item(i).expand(3, -1, -1)) for i in range(20))


def test_larger_images_are_made_smaller(tmp_path):
    sizes = {
        "wide.png": (60, 20),
        "tall.png": (15, 90),
        "small.png": (40, 10),
        "even.png": (12, 12),
    }
    (tmp_path / "in").mkdir()
    for name, size in sizes.items():
        (tmp_path / "in" / name).write_bytes(encoded(99, size=size))
    turned = Image.Exif()
    turned[0x0112] = 6
    (tmp_path / "in/turned.png").write_bytes(encoded(99, size=(60, 20), exif=turned))
    packed(FolderSource(path=tmp_path / "in"), tmp_path / "out", max_side=12, check=False)
    (whole,) = unpacked(tmp_path / "out")
    shapes = {whole.name(i).split("-")[-1]: tuple(whole.item(i).shape[1:]) for i in range(5)}
    want = {"wide": (12, 36), "tall": (72, 12), "small": (10, 40), "even": (12, 12)}
    assert shapes == want | {"turned": (36, 12)}
    kinds = {whole.name(i).split("-")[-1]: whole.encoded(i)[:3] for i in range(5)}
    assert {k for k, v in kinds.items() if v == b"\xff\xd8\xff"} == {"wide", "tall", "turned"}


def test_unchecked_images_are_kept_as_they_are(tmp_path):
    source = FolderSource(path=folder(tmp_path / "in"))
    manifest = packed(source, tmp_path / "out", check=False)
    assert manifest["parts"]["data"]["samples"] == 7 and not manifest["skipped"]
    (whole,) = unpacked(tmp_path / "out")
    assert whole.encoded(0) == b"no picture" and whole.name(0).endswith("a_bad")


@pytest.mark.parametrize(
    "data, name, want",
    [
        (noise("JPEG"), "a.png", "jpg"),
        (noise("WEBP"), "a", "webp"),
        (noise("GIF"), "a.jpg", "gif"),
        (noise("TIFF"), "a.jpg", "tif"),
        (noise("BMP"), "", "bmp"),
        (noise("PPM"), "x.PPM", "ppm"),
        (b"unknown", "a.txt", "jpg"),
    ],
)
def test_extensions_are_told_by_the_bytes(data, name, want):
    assert room._extension(data, name) == want


def test_what_is_there_stays(tmp_path):
    source = FolderSource(path=folder(tmp_path / "in"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(PackError, match="mine' is not empty: give another place, or --overwrite"):
        packed(source, tmp_path / "mine")
    with pytest.raises(PackError, match="holds what pack did not write"):
        packed(source, tmp_path / "mine", overwrite=True)
    with pytest.raises(PackError, match="is there and no folder"):
        packed(source, tmp_path / "mine/thesis.txt", overwrite=True)
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"
    packed(source, tmp_path / "out", shard_bytes=1)
    packed(source, tmp_path / "out", overwrite=True)
    assert [p.name for p in (tmp_path / "out").glob("*.tar")] == ["data-000000.tar"]
    (tmp_path / "empty").mkdir()
    packed(source, tmp_path / "empty")
    assert visible(tmp_path) == ["empty", "in", "mine", "out"]


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    source = FolderSource(path=folder(tmp_path / "in"))
    packed(source, tmp_path / "old")
    before, written = tree(tmp_path / "old"), []

    def fill(self, *args):
        written.append(args)
        if len(written) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return add(self, *args)

    add = room._Shard.add
    monkeypatch.setattr(room._Shard, "add", fill)
    for out, overwrite in ((tmp_path / "new", False), (tmp_path / "old", True)):
        written.clear()
        with pytest.raises(
            PackError, match="cannot write '.*' .No space left on device.: make room"
        ):
            packed(source, out, overwrite=overwrite)
    assert visible(tmp_path) == ["in", "old"] and tree(tmp_path / "old") == before


def test_what_cannot_be_replaced_comes_back(tmp_path, monkeypatch):
    source = FolderSource(path=folder(tmp_path / "in"))
    packed(source, tmp_path / "out")
    before, rename = tree(tmp_path / "out"), room.Path.rename

    def refuse(path, target):
        if path.name.endswith(".partial"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(room.Path, "rename", refuse)
    with pytest.raises(PackError, match="cannot write .*Permission denied"):
        packed(source, tmp_path / "out", overwrite=True, shard_bytes=1)
    assert visible(tmp_path) == ["in", "out"] and tree(tmp_path / "out") == before


def test_a_failing_disk_under_the_source_is_not_a_bad_image(tmp_path, monkeypatch):
    source = FolderSource(path=folder(tmp_path / "in"))

    def fail(*args):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr("fastssl.data.sources.folder.read_bytes", fail)
    with pytest.raises(OSError, match="Stale file"):
        packed(source, tmp_path / "out")
    assert visible(tmp_path) == ["in"]


def test_a_killed_pack_is_swept_up_and_another_waited_for(tmp_path):
    source = FolderSource(path=folder(tmp_path / "in"))
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial/half.tar").write_bytes(b"half")
    packed(source, tmp_path / "out")
    assert visible(tmp_path) == ["in", "out"] and not (tmp_path / "out/half.tar").exists()
    with room._aside(tmp_path / "next", False):
        with pytest.raises(PackError, match="is being written by another process"):
            packed(source, tmp_path / "next")


def test_what_cannot_be_packed(tmp_path):
    with pytest.raises(PackError, match=r"is no image but torch.uint8 \[3, 16, 32, 32\]"):
        packed(ClipsSource(per_class=1), tmp_path / "out")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(b"")
    with pytest.raises(PackError, match="none of 1 images of data can be read, such as a.png: "):
        packed(FolderSource(path=tmp_path / "in"), tmp_path / "out")
    for name in ("shard_bytes", "max_side", "workers"):
        with pytest.raises(DataError, match=f"{name} 0 is not positive"):
            PackOptions(**{name: 0})
    assert visible(tmp_path) == ["in"]


def call(*words):
    result = CliRunner().invoke(cli.app, ["pack", *map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command(tmp_path):
    out = call(folder(tmp_path / "in"), tmp_path / "out", "--shard-size", 1)
    assert "data: 6 images, 0.0 MB in 1 shards" in out and "skipped a/bad.png: cannot" in out
    assert f"data.source.name=webdataset data.source.path={tmp_path}/out" in out
    call(tmp_path / "in", tmp_path / "out", "--overwrite", "--no-check", "--max-side", 3)
    assert len(unpacked(tmp_path / "out")[0]) == 6


def test_the_command_splits_and_takes_recipes(tmp_path):
    call("simclr-digits", tmp_path / "a", "--split", 0.25)
    train, test = unpacked(tmp_path / "a")
    want = open_source(DigitsSource(test_fraction=0.25), 0)
    assert torch.equal(train.labels, want.train.labels) and len(test) == len(want.test)
    assert "data: 1,797 images" in call("digits", tmp_path / "b")


def test_many_unreadable_images_are_not_all_listed(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/good.png").write_bytes(encoded())
    for k in range(30):
        (tmp_path / f"in/{k}.png").write_bytes(b"")
    out = call(tmp_path / "in", tmp_path / "out")
    assert out.count("skipped") == 20 and "... 30 in all: see" in out


def test_mistakes_end_in_a_sentence(monkeypatch, capsys, tmp_path):
    for words in (["nowhere", "out"], [str(folder(tmp_path / "in")), str(tmp_path / "in")]):
        monkeypatch.setattr(sys, "argv", ["fastssl", "pack", *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        said = capsys.readouterr().err
        assert caught.value.code == 2 and said.count("\n") == 1
    monkeypatch.setattr(
        sys, "argv", ["fastssl", "pack", "digits", str(tmp_path / "x"), "--split", "2"]
    )
    with pytest.raises(SystemExit):
        cli.main()
    assert "--split 2.0 is no part" in capsys.readouterr().err
