"""Whole files, on the disk; names that are safe to show."""

import os

import pytest

from fastssl.files import printable, write_atomically


def test_a_file_is_replaced_whole_and_synced_or_stays(tmp_path, monkeypatch):
    """Fault 44: its content before the rename, its directory after."""
    path, synced = tmp_path / "a", []
    fsync = os.fsync

    def noting(descriptor):
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    write_atomically(path, "é \udcff")
    assert path.read_bytes() == "é \\udcff".encode()  # fault 13
    assert synced[0].startswith(".a.") and synced[1:] == [tmp_path.name]

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ["é \\udcff".encode()]


def test_what_a_terminal_would_obey_is_escaped():
    """Fault 45: control characters, turned writing, and bytes that are no Unicode."""
    assert printable("dögs/😀 1.png") == "dögs/😀 1.png"
    assert printable("\x1b]0;x\x07\r\n\x9b\u202e\udcff") == (r"\x1b]0;x\x07\r\n\x9b\u202e\udcff")
    assert printable("a\n\t", keep="\n") == "a\n\\t"
