"""Folders as people have them: classes or flat, odd names, links in circles, and mistakes."""

import os
import pickle

import numpy as np
import pytest
from PIL import Image

from fastssl.data.datasets import FolderSource, open_source
from fastssl.data.errors import BadItem, DataError
from fastssl.data.sources.base import EncodedSource
from fastssl.data.sources.folder import scan_folder
from fastssl.data.sources.names import Names
from fastssl.data.sources.wavs import WavsSource

TRAIN_VAL = ("train", "val")


def put(root, *names):
    for k, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 5), (k, 0, 0)).save(path)
    return root


def names(source):
    return [source.name(i) for i in range(len(source))]


def test_class_folders(tmp_path):
    put(tmp_path, "b/2.png", "b/10.PNG", "a/deep/er/x.jpeg", "c d é 猫/ü.webp", "a/1.tiff")
    (tmp_path / "empty").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("not an image")
    (whole,) = scan_folder(tmp_path)
    assert names(whole) == [
        "a/1.tiff",
        "a/deep/er/x.jpeg",
        "b/10.PNG",
        "b/2.png",
        "c d é 猫/ü.webp",
    ]
    assert whole.classes == ("a", "b", "c d é 猫") and whole.labels is not None
    assert whole.labels.tolist() == [0, 0, 1, 1, 2] and whole.channels == 3
    assert whole.item(4).shape == (3, 5, 6) and whole.item(2)[0, 0, 0] == 1


def test_flat_folder_has_no_labels(tmp_path):
    (whole,) = scan_folder(put(tmp_path, "b.png", "a.png"))
    assert names(whole) == ["a.png", "b.png"] and whole.labels is None and whole.classes is None


def test_flat_option_ignores_folders(tmp_path):
    put(tmp_path, "a/1.png", "b/1.png", "loose.png")
    with pytest.raises(DataError, match=r"beside its class folders \(1, such as 'loose.png'\)"):
        scan_folder(tmp_path)
    (whole,) = scan_folder(tmp_path, flat=True)
    assert len(whole) == 3 and whole.labels is None


@pytest.mark.parametrize("test", ["val", "test", "valid", "validation"])
def test_own_split_shares_its_classes(tmp_path, test):
    put(tmp_path, "train/b/1.png", "train/a/1.png", f"{test}/b/2.png", f"{test}/c/2.png")
    train, held_out = open_source(FolderSource(path=tmp_path), seed=0)
    assert names(train) == ["train/a/1.png", "train/b/1.png"]
    assert names(held_out) == [f"{test}/b/2.png", f"{test}/c/2.png"]
    assert train.classes == held_out.classes == ("a", "b", "c")
    assert train.labels.tolist() == [0, 1] and held_out.labels.tolist() == [1, 2]


@pytest.mark.parametrize("train, val", [("Train", "Val"), ("TRAINING", "Test")])
def test_own_split_in_capitals(tmp_path, caplog, train, val):
    """Fault 7: they were two classes, and the second was trained on."""
    put(tmp_path, f"{train}/a/1.png", f"{val}/b/2.png")
    first, second = open_source(FolderSource(path=tmp_path), seed=0)
    assert names(first) == [f"{train}/a/1.png"] and names(second) == [f"{val}/b/2.png"]
    assert first.classes == ("a", "b") and "left out" not in caplog.text


def test_a_part_alone_is_the_data(tmp_path):
    """Fault 7: it was the one class `train`."""
    (whole,) = scan_folder(put(tmp_path, "train/a/1.png", "train/b/2.png"))
    assert whole.classes == ("a", "b") and names(whole) == ["train/a/1.png", "train/b/2.png"]


def test_a_folder_beside_both_parts_is_named(tmp_path, caplog):
    scan_folder(put(tmp_path, "train/a/1.png", "val/a/1.png", "more/a/1.png"))
    assert "beside train/ and val/, more/ is left out" in caplog.text


@pytest.mark.parametrize("flat", ["train", "val"])
def test_own_split_with_one_flat_part_is_refused(tmp_path, flat):
    """Fault 7: both parts lost their labels, and nothing said why there was no kNN."""
    put(tmp_path, *(f"{part}/1.png" if part == flat else f"{part}/a/1.png" for part in TRAIN_VAL))
    with pytest.raises(DataError, match=f"{flat}' has no class folders and the other part has"):
        scan_folder(tmp_path)
    assert [part.labels for part in scan_folder(tmp_path, flat=True)] == [None, None]


def test_own_split_flat_in_both_parts_has_no_labels(tmp_path):
    put(tmp_path, "train/1.png", "val/1.png")
    train, held_out = open_source(FolderSource(path=tmp_path), seed=0)
    assert train.labels is None and held_out.labels is None


def test_images_are_known_without_a_suffix(tmp_path):
    """Fault 7: their class vanished."""
    put(tmp_path, "a/1.png", "b/2.png", "c/3.avif")
    (tmp_path / "b/2.png").rename(tmp_path / "b/2")
    (tmp_path / "b/README").write_text("no image")
    (whole,) = scan_folder(tmp_path)
    assert names(whole) == ["a/1.png", "b/2", "c/3.avif"] and whole.item(1)[0, 0, 0] == 1
    assert whole.classes == ("a", "b", "c") and whole.item(2).shape == (3, 5, 6)


def test_images_of_kinds_that_are_not_read_are_told(tmp_path, caplog):
    """Fault 7: their class vanished."""
    put(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "b/2.HEIC").write_bytes(b"heic")
    assert len(scan_folder(tmp_path)[0]) == 2 and "1 images such as 'b/2.HEIC'" in caplog.text
    (tmp_path / "b/1.png").unlink()
    with pytest.raises(DataError, match="such as 'b/2.HEIC' are of a kind that is not read: conv"):
        scan_folder(tmp_path)


def test_a_class_whose_name_is_not_utf8(tmp_path):
    """Fault 42: the name is text that can be written."""
    odd = os.fsdecode(b"caf\xe9")
    (whole,) = scan_folder(put(tmp_path, f"{odd}/1.png", "a/1.png"))
    assert whole.classes == ("a", "caf\\xe9") and whole.item(1).shape == (3, 5, 6)


def test_hidden_files_are_passed_over(tmp_path):
    (whole,) = scan_folder(put(tmp_path, "a/1.png", "a/._1.png", ".thumbs/a.png"))
    assert names(whole) == ["a/1.png"]


def test_link_circles_end(tmp_path):
    put(tmp_path, "a/1.png", "b/1.png")
    os.symlink(tmp_path, tmp_path / "a" / "up")
    os.symlink("self", tmp_path / "a" / "self")
    os.symlink("self.png", tmp_path / "a" / "self.png")
    os.symlink("gone.png", tmp_path / "a" / "broken.png")
    os.symlink(tmp_path / "b", tmp_path / "linked")
    (whole,) = scan_folder(tmp_path)
    assert names(whole) == ["a/1.png", "b/1.png", "linked/1.png"]


def test_relative_path_and_pickle(tmp_path, monkeypatch):
    put(tmp_path, "x/a/1.png", "x/b/1.png")
    monkeypatch.chdir(tmp_path)
    (whole,) = scan_folder(tmp_path.__class__("x"))
    monkeypatch.chdir("/")
    copy = pickle.loads(pickle.dumps(whole))
    assert names(copy) == names(whole) and copy.item(1).shape == (3, 5, 6)


def test_a_saved_config_finds_its_folder_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    saved = FolderSource.model_validate({"path": "x"}).model_dump_json()
    monkeypatch.chdir("/")
    assert FolderSource.model_validate_json(saved).path == tmp_path / "x"
    assert FolderSource.model_validate({"path": "~/y"}).path == tmp_path / "home" / "y"


def test_names_that_are_not_utf8():
    odd = os.fsdecode(b"caf\xe9.png")
    kept = Names(["a", "", odd, "é"])
    assert [kept[i] for i in range(len(kept))] == ["a", "", odd, "é"]
    some = kept[np.array([3, 2, 3])]
    assert [some[i] for i in range(len(some))] == ["é", odd, "é"]


def test_bad_image_has_its_path_from_the_root(tmp_path):
    put(tmp_path, "a/1.png")
    (tmp_path / "a" / "0.jpg").write_bytes(b"\xff\xd8\xff")
    (whole,) = scan_folder(tmp_path)
    with pytest.raises(BadItem) as error:
        whole.item(0)
    assert error.value.name == "a/0.jpg" and str(error.value).startswith("a/0.jpg: ")


def test_encoded_images_are_the_files(tmp_path):
    (whole,) = scan_folder(put(tmp_path, "a/1.png", "b/2.webp", "b/3.png"))
    assert isinstance(whole, EncodedSource)
    part = whole.select(np.array([2, 0]))
    assert isinstance(part, EncodedSource) and names(part) == ["b/3.png", "a/1.png"]
    assert part.encoded(1) == (tmp_path / "a/1.png").read_bytes()
    (tmp_path / "b/3.png").unlink()
    for read in (part.encoded, part.item):
        with pytest.raises(BadItem, match="^b/3.png: No such file"):
            read(0)


def test_other_files_have_no_encoded_images(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"")
    (whole,) = WavsSource(path=tmp_path).open()
    assert not isinstance(whole, EncodedSource)


def _missing(path):
    return path / "nowhere"


def _file(path):
    (path / "file.png").write_bytes(b"")
    return path / "file.png"


def _no_images(path):
    (path / "a").mkdir()
    (path / "a" / "b.txt").write_text("")
    return path


def _empty_test(path):
    put(path, "train/a/1.png")
    (path / "val").mkdir()
    return path


MISTAKES = {
    "missing": (_missing, r"folder '.*nowhere' does not exist: give the path of a folder"),
    "remote": (lambda path: "s3://bucket/x", "what is remote is read as shards: see fastssl pack"),
    "file": (_file, r"'.*file.png' is a file: give the folder that holds the images"),
    "no images": (_no_images, r"no image in folder '.*': put some there"),
    "empty test": (_empty_test, r"no image in folder '.*val': put some there"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistakes_are_told_in_one_sentence(tmp_path, kind):
    make, words = MISTAKES[kind]
    with pytest.raises(DataError, match=words) as error:
        open_source(FolderSource(path=make(tmp_path)), seed=0)
    assert "\n" not in str(error.value)


def test_unreadable_folder(tmp_path, monkeypatch):
    put(tmp_path, "a/1.png")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("fastssl.data.sources.folder.os.scandir", refuse)
    with pytest.raises(DataError, match=r"cannot list folder '.*' \(Permission denied\)"):
        scan_folder(tmp_path)
