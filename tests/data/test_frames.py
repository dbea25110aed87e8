"""Clips as folders of frames: found, ordered by number, bounded, and broken."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.data.errors import BadItem, DataError
from fastssl.data.sources import frames as room
from fastssl.data.sources.frames import FramesSource
from fastssl.data.views.clip import ClipViews
from fastssl.data.views.spec import apply
from tests.data.made import names


def put(folder, count, first=0, size=(6, 5)):
    folder.mkdir(parents=True, exist_ok=True)
    for t in range(first, first + count):
        Image.new("RGB", size, (t, 0, 0)).save(folder / f"frame{t}.png")
    return folder


def opened(path, **options):
    return FramesSource(path=path, **options).open()


def red(clip):
    return clip[0, :, 0, 0].tolist()


def test_class_folders_of_clips(tmp_path):
    put(tmp_path / "jump/b", 12)
    put(tmp_path / "jump/a", 3)
    put(tmp_path / "run/deep/c", 2)
    (tmp_path / "jump/a/notes.txt").write_text("")
    (tmp_path / "jump/a/.thumb.png").write_text("")
    (whole,) = opened(tmp_path)
    assert names(whole) == ["jump/a", "jump/b", "run/deep/c"]
    assert whole.classes == ("jump", "run") and whole.labels.tolist() == [0, 0, 1]
    clip = whole.item(1)
    assert clip.shape == (3, 12, 5, 6) and clip.dtype == torch.uint8 and clip.is_contiguous()
    assert red(clip) == list(range(12))  # frame 10 after frame 9
    part = pickle.loads(pickle.dumps(whole.select(np.array([2, 0]))))
    assert red(part.item(0)) == [0, 1] and part.labels.tolist() == [1, 0]
    (view,) = apply(ClipViews.preset(8, frames=4, count=1), clip, 3)
    assert view.shape == (3, 4, 8, 8)


def test_flat_and_own_split(tmp_path):
    put(tmp_path / "train/a", 2)
    put(tmp_path / "val/b", 3)
    train, test = opened(tmp_path)
    assert names(train) == ["train/a"] and names(test) == ["val/b"]
    assert train.labels is None and test.classes is None
    put(tmp_path / "train/x/y", 2)
    with pytest.raises(DataError, match="clips beside its class folders: .*flat=true"):
        opened(tmp_path)
    assert names(opened(tmp_path, flat=True)[0]) == ["train/a", "train/x/y"]


@pytest.mark.parametrize(
    "options, want",
    [
        ({"stride": 3}, [0, 3, 6, 9]),
        ({"max_frames": 4}, [3, 4, 5, 6]),
        ({"stride": 2, "max_frames": 3}, [2, 4, 6]),
        ({"max_frames": 1}, [4]),
        ({"stride": 1000}, [0]),
    ],
)
def test_stride_and_bound(tmp_path, options, want):
    put(tmp_path / "a", 10)
    put(tmp_path / "b", 1)
    (whole,) = opened(tmp_path, **options)
    assert red(whole.item(0)) == want and red(whole.item(1)) == [0]


def test_a_bad_frame_is_named(tmp_path):
    put(tmp_path / "a", 3)
    put(tmp_path / "b", 2)
    put(tmp_path / "b", 1, first=2, size=(7, 5))
    put(tmp_path / "gone", 1)
    put(tmp_path / "empty", 1)
    (tmp_path / "a/frame1.png").write_bytes(b"no picture")
    (whole,) = opened(tmp_path)
    (tmp_path / "empty/frame0.png").unlink()
    (tmp_path / "gone/frame0.png").unlink()
    (tmp_path / "gone").rmdir()
    reasons = [
        "^a/frame1.png: cannot identify",
        "^b/frame2.png: 7 x 5 pixels, but the first has 6 x 5$",
        "^empty: no frame in its folder$",
        "^gone: No such file",
    ]
    for i, reason in enumerate(reasons):
        with pytest.raises(BadItem, match=reason):
            whole.item(i)


def test_clips_of_gigabytes_and_failing_disks(tmp_path, monkeypatch):
    put(tmp_path / "a", 3)
    (whole,) = opened(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(room, "MOST_BYTES", 3 * 90)
        with pytest.raises(
            BadItem, match="3 frames of 6 x 5 pixels are too many: lower max_frames"
        ):
            whole.item(0)

    def fail(path):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(room.os, "listdir", fail)
    with pytest.raises(OSError, match="Stale file"):
        whole.item(0)


def test_mistakes_are_told_in_one_sentence(tmp_path):
    with pytest.raises(DataError, match="does not exist: give the path of a folder of clips"):
        opened(tmp_path / "none")
    with pytest.raises(DataError, match="no frame in folder .*a folder for each clip"):
        opened(tmp_path)
    put(tmp_path, 1)
    with pytest.raises(DataError, match="frames lie in .* itself"):
        opened(tmp_path)
