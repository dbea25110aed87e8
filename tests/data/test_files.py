"""Patterns of files, and reading them at random: local, remote, in processes that forked."""

import builtins
import os
import pickle
import sys

import pytest

from fastssl.data.errors import BadItem, DataError
from fastssl.data.sources import files as room
from fastssl.data.sources.files import (
    Files,
    Window,
    absolute_pattern,
    braces,
    expand,
    read_all,
    status,
    write_beside,
)
from fastssl.data.sources.remote import filesystem


def ours(head):
    return head == b"one"


def put(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return str(folder)


def test_braces():
    assert braces("a-{08..11}.tar") == [f"a-{k}.tar" for k in ("08", "09", "10", "11")]
    assert braces("{a,b}-{0..1}") == ["a-0", "a-1", "b-0", "b-1"]
    assert braces("plain{x}") == ["plain{x}"] and braces("{3..1}") == []
    for huge in ("{0..9999999}", "{0..9999}{0..9999}"):
        with pytest.raises(DataError, match="names .*: narrow it"):
            braces(huge)


@pytest.mark.parametrize("scheme", ["", "file://", "memory://"])
def test_expand(tmp_path, scheme):
    where = put(tmp_path, "b.tar", "a.tar", ".c.tar", "a.idx", "deep/d.tar")
    if scheme == "memory://":
        fs, _ = filesystem("memory://x")
        for name in ("b.tar", "a.tar", ".c.tar", "a.idx", "deep/d.tar"):
            fs.pipe(f"{where}/{name}", b"")
    where = scheme + where
    short = [path.removeprefix(where + "/") for path in expand(where, (".tar",))]
    assert short == ["a.tar", "b.tar"]
    assert expand(f"{where}/?.tar", (".tar",)) == [f"{where}/a.tar", f"{where}/b.tar"]
    assert expand(f"{where}/{{b,z}}.tar", (".tar",)) == [f"{where}/b.tar", f"{where}/z.tar"]
    assert expand(f"{where}/a*", (".tar",)) == [f"{where}/a.tar"]  # not its index
    assert expand(f"{where}/*.zip", (".tar",)) == []


def test_a_path_that_is_there_is_no_pattern(tmp_path):
    where = put(tmp_path, "a[1]{0..3}.tar", "d*/x.tar")
    assert expand(f"{where}/a[1]{{0..3}}.tar", (".tar",)) == [f"{where}/a[1]{{0..3}}.tar"]
    assert expand(f"{where}/d*", (".tar",)) == [f"{where}/d*/x.tar"]


def test_patterns_are_absolute_and_urls_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute_pattern("x/{0..1}.tar") == f"{tmp_path}/x/{{0..1}}.tar"
    assert absolute_pattern("s3://bucket/x") == "s3://bucket/x"


def test_reads_at_any_place(tmp_path):
    put(tmp_path, "a", "long name")
    files = Files([str(tmp_path / "a"), str(tmp_path / "long name")])
    assert files.read(1, 5, 3) == b"nam" and files.read(0, 0, 9) == b"a"
    assert pickle.loads(pickle.dumps(files)).read(1, 0, 4) == b"long"
    with pytest.raises(BadItem, match="^x: its file ends 4 bytes before it does"):
        files.record(1, 5, 8, "x")
    for size in (-1, 2**31):
        with pytest.raises(BadItem, match="too many"):
            files.record(0, 0, size, "x")


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_vanished_file_is_a_bad_item(tmp_path, scheme):
    put(tmp_path, "a")
    files = Files([f"{scheme}{tmp_path}/a", str(tmp_path)])
    (tmp_path / "a").unlink()
    with pytest.raises(BadItem, match="^x: No such file"):
        files.record(0, 0, 1, "x")
    with pytest.raises(BadItem, match="directory"):
        files.record(1, 0, 1, "x")


def test_a_failing_disk_is_not_a_bad_item(tmp_path, monkeypatch):
    put(tmp_path, "a")

    def fail(*args):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(room.os, "pread", fail)
    with pytest.raises(OSError, match="Stale file"):
        Files([str(tmp_path / "a")]).record(0, 0, 1, "x")


def test_descriptors_are_few(tmp_path):
    names = [f"{k}" for k in range(3 * room._OPEN)]
    put(tmp_path, *names)
    files = Files([str(tmp_path / name) for name in names])

    def open_ones():
        links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
        return sum(os.path.realpath(link).startswith(str(tmp_path)) for link in links)

    for _ in range(2):
        assert all(files.read(k, 0, 9) == names[k].encode() for k in range(len(names)))
    assert open_ones() == room._OPEN
    del files
    assert open_ones() == 0


def test_a_forked_process_opens_its_own(tmp_path):
    put(tmp_path, "a")
    files = Files([str(tmp_path / "a")])
    files.read(0, 0, 1)
    mine = files._opened
    files._opened.process = -1  # as in a child
    assert files.read(0, 0, 1) == b"a" and files._opened is not mine


def test_a_window_reads_as_the_file_does(tmp_path):
    data = bytes(range(256)) * 100
    (tmp_path / "a").write_bytes(data)
    window = Window(Files([str(tmp_path / "a")]), 0, len(data))
    for offset, size in ((0, 10), (5, 4096), (9000, 6000), (20, 3), (25_590, 50), (25_600, 4)):
        assert window.read(offset, size) == data[offset : offset + size]
    pieces = list(window.blocks(300, 512))
    assert b"".join(piece for _, piece in pieces) == data[300:] and pieces[1][0] == 812


def test_remote_files_are_read_in_part():
    fs, _ = filesystem("memory://x")
    fs.pipe("/kept/a.tar", b"0123456789")
    url = "memory://kept/a.tar"
    files = Files([url])
    assert files.read(0, 3, 4) == b"3456" and files.record(0, 8, 2, "x") == b"89"
    assert read_all(url) == b"0123456789" and status(url).size == 10
    assert not write_beside(url, b"", str) and files.name(0) == "a.tar"
    with pytest.raises(OSError):
        status("memory://kept/none")


def test_what_to_install_for_a_url(monkeypatch):
    with pytest.raises(DataError, match="mend the address"):
        status("nonsense://a/b")
    whole = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("fsspec"):
            raise ImportError("No module named 'fsspec'")
        return whole(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.startswith("fsspec")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match="pip install fsspec"):
        status("s3://bucket/x")


def test_writing_beside_leaves_no_halves(tmp_path):
    target = tmp_path / "a.idx"
    assert write_beside(str(target), b"one", ours) and write_beside(str(target), b"two", ours)
    assert target.read_bytes() == b"two" and os.listdir(tmp_path) == ["a.idx"]
    assert not write_beside(str(tmp_path / "none" / "a.idx"), b"", ours)
    assert not write_beside(str(target), b"three", ours)  # fault 45: it is another's by now
    assert target.read_bytes() == b"two"
