"""The GPU's tests before they meet a GPU: they run here, tiny, and plain pytest leaves them out."""

import os
import re
import sys
from pathlib import Path

import pytest
import torch

from tests.ranks import start

ROOT = Path(__file__).parents[1]
ROOM = ROOT / "tests/gpu"


class Seen:
    """What a pytest inside this one has collected."""

    def __init__(self, *arguments):
        self.files, self.count = set(), 0
        quiet = ["--collect-only", "-qq", "-p", "no:cacheprovider", *map(str, arguments)]
        self.code = pytest.main(quiet, plugins=[self])

    def pytest_collection_finish(self, session):
        self.files = {Path(item.path).name for item in session.items}
        self.count = len(session.items)


def test_every_test_of_the_room_is_found_when_it_is_named():
    seen = Seen(ROOM)
    assert seen.code == 0 and seen.count > 100
    assert seen.files == {path.name for path in ROOM.glob("test_*.py")}


def test_plain_pytest_does_not_go_in(tmp_path):
    room = tmp_path / "tests/gpu"
    room.mkdir(parents=True)
    (room / "test_inside.py").write_text("def test_x(): pass\n")
    (room.parent / "test_beside.py").write_text("def test_x(): pass\n")
    ours = ("-c", ROOT / "pyproject.toml", "--rootdir", tmp_path)
    assert Seen(*ours, tmp_path).files == {"test_beside.py"}
    assert Seen(*ours, room).files == {"test_inside.py"}


def rehearse(log):
    """All of the room, told so by the variables that the GPU's commands set."""
    os.environ |= {"TRITON_INTERPRET": "1", "FASTSSL_GPU_REHEARSAL": "1"}
    sys.stdout = sys.stderr = out = log.open("w")
    os.dup2(out.fileno(), 1)
    os.dup2(out.fileno(), 2)
    # Plugins that are imported already are as well as if pytest were the first to do it.
    words = ["-W", "ignore::pytest.PytestAssertRewriteWarning", "-p", "no:cacheprovider", "-x"]
    sys.exit(pytest.main([*words, f"--rootdir={ROOT}", str(ROOM)]))


def test_all_of_them_pass_in_rehearsal(tmp_path):
    rehearsal = start(rehearse, tmp_path / "log", daemon=False)
    rehearsal.join(600)
    said = (tmp_path / "log").read_text()
    assert rehearsal.exitcode == 0, said[-3000:]
    counted = re.search(r"(\d+) passed in", said)
    assert counted and int(counted[1]) > 80
    assert not re.search("skipped|xfailed|deselected", said)


def test_without_a_gpu_they_say_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["-s", "-p", "no:cacheprovider", str(ROOM / "test_sanitize.py")]
    assert pytest.main(words) == 2
    assert "tests/gpu needs a GPU" in capsys.readouterr().out
