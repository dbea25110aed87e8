"""The GPU's tests before they meet a GPU: they run here, tiny, and plain pytest leaves them out."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


def test_all_of_them_pass_in_rehearsal():
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", str(ROOM)]
    env = {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "FASTSSL_GPU_REHEARSAL": "1"}
    done = subprocess.run(words, cwd=ROOT, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    counted = re.search(r"(\d+) passed in", done.stdout)
    assert counted and int(counted[1]) > 80
    assert not re.search("skipped|xfailed|deselected", done.stdout)


def test_without_a_gpu_they_say_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["-s", "-p", "no:cacheprovider", str(ROOM / "test_sanitize.py")]
    assert pytest.main(words) == 2
    assert "tests/gpu needs a GPU" in capsys.readouterr().out
