"""Images in .npy and .npz files, of every layout."""

import pickle

import numpy as np
import pytest
import torch

from fastssl.data.errors import BadItem, DataError
from fastssl.data.sources.arrays import ArrayImages, ArraysSource, StoredArray
from tests.data.made import names

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 5, 6, 3), np.uint8)


def opened(path, **options):
    (whole,) = ArraysSource(path=path, **options).open()
    return whole


def saved(path, array):
    np.save(path, array)
    return path


LAYOUTS = {
    "NHWC": (PIXELS, PIXELS),
    "NCHW": (PIXELS.transpose(0, 3, 1, 2).copy(), PIXELS),
    "NHW": (PIXELS[..., 0].copy(), PIXELS[..., :1]),
    "NHW1": (PIXELS[..., :1].copy(), PIXELS[..., :1]),
}


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_layouts(tmp_path, kind, suffix):
    stored, want = LAYOUTS[kind]
    path = tmp_path / f"a.{suffix}"
    np.save(path, stored) if suffix == "npy" else np.savez_compressed(path, images=stored)
    whole = opened(path)
    assert isinstance(whole, StoredArray if suffix == "npy" else ArrayImages)
    assert len(whole) == 7 and whole.channels == want.shape[3] and whole.labels is None
    for i in range(7):
        assert (whole.item(i).numpy() == want[i].transpose(2, 0, 1)).all()
        assert whole.item(i).dtype == torch.uint8 and whole.item(i).is_contiguous()
    part = pickle.loads(pickle.dumps(whole.select(np.array([4, 0]))))
    assert torch.equal(part.item(0), whole.item(4)) and names(part) == [
        f"a.{suffix}[4]",
        f"a.{suffix}[0]",
    ]


def test_an_array_is_not_pickled_with_its_pixels(tmp_path):
    whole = opened(saved(tmp_path / "a.npy", np.zeros((1000, 64, 64), np.uint8)))
    assert len(pickle.dumps(whole)) < 20_000


def test_layouts_that_the_shape_leaves_open(tmp_path):
    path = saved(tmp_path / "a.npy", np.arange(54, dtype=np.uint8).reshape(2, 3, 3, 3))
    with pytest.raises(DataError, match="set layout to NHWC or NCHW"):
        opened(path)
    first, last = opened(path, layout="NCHW"), opened(path, layout="NHWC")
    assert torch.equal(first.item(1), last.item(1).permute(1, 2, 0))


def test_labels(tmp_path):
    path = saved(tmp_path / "a.npy", PIXELS)
    numbers = saved(tmp_path / "n.npy", np.array([2, 0, 1, 2, 0, 1, 1], np.uint8))
    texts = saved(tmp_path / "t.npy", np.array(["b", "a", "b", "a", "b", "a", "b"]))
    one, two = opened(path, labels=numbers), opened(path, labels=texts)
    assert one.labels.tolist() == [2, 0, 1, 2, 0, 1, 1] and one.classes == ("0", "1", "2")
    assert two.labels.tolist() == [1, 0, 1, 0, 1, 0, 1] and two.classes == ("a", "b")
    assert two.select(np.array([1, 2])).labels.tolist() == [0, 1]
    np.savez(tmp_path / "b.npz", x=PIXELS, labels=np.arange(7))
    packed = opened(tmp_path / "b.npz", image_key="x")
    assert packed.labels.tolist() == list(range(7)) and packed.select(np.array([3])).labels == 3
    assert opened(tmp_path / "b.npz", image_key="x", label_key="none").labels is None


def test_a_file_that_shrinks_or_vanishes(tmp_path):
    path = saved(tmp_path / "a.npy", PIXELS)
    whole = opened(path)
    path.write_bytes(path.read_bytes()[: 128 + 3 * 90 + 10])
    assert (whole.item(2).numpy() == PIXELS[2].transpose(2, 0, 1)).all()
    with pytest.raises(BadItem, match=r"^a.npy\[3\]: its file ends 80 bytes before"):
        whole.item(3)
    path.unlink()
    with pytest.raises(BadItem, match="No such file"):
        pickle.loads(pickle.dumps(whole)).item(0)


def _npy(array):
    return lambda path: np.save(path / "a.npy", array, allow_pickle=True)


def _cut(path):
    np.save(path / "a.npy", PIXELS)
    (path / "a.npy").write_bytes((path / "a.npy").read_bytes()[:300])


def _damaged_zip(path):
    np.savez_compressed(path / "b.npz", images=PIXELS)
    data = bytearray((path / "b.npz").read_bytes())
    data[200:220] = bytes(20)
    (path / "a.npy").write_bytes(data)


def _with_labels(labels):
    def make(path):
        np.savez(path / "b.npz", images=PIXELS, labels=labels)
        (path / "b.npz").rename(path / "a.npy")

    return make


MISTAKES = {
    "missing": (lambda path: None, r"a.npy' cannot be read \(No such file"),
    "text": (lambda path: (path / "a.npy").write_text("no array"), "is no whole .npy or .npz"),
    "empty": (lambda path: (path / "a.npy").write_bytes(b""), "is no whole .npy or .npz"),
    "cut": (_cut, "is no whole .npy or .npz"),
    "objects": (_npy(np.array([None, 1])), "is no whole .npy or .npz"),
    "floats": (_npy(PIXELS.astype(np.float32)), r"float32 \[7, 5, 6, 3\]: want uint8"),
    "flat": (_npy(PIXELS[0, 0]), r"want uint8 \(N, H, W\)"),
    "none": (_npy(PIXELS[:0]), "want uint8"),
    "four channels": (_npy(np.zeros((2, 5, 5, 4), np.uint8)), "want 1 or 3 channels"),
    "fortran": (_npy(np.asfortranarray(PIXELS)), "Fortran's order: save it in C's"),
    "damaged": (_damaged_zip, "'images' of '.*' is damaged|no whole"),
    "other keys": (
        lambda p: (np.savez(p / "b", x=PIXELS), (p / "b.npz").rename(p / "a.npy")),
        "no array 'images': it has x",
    ),
    "few labels": (_with_labels(np.arange(3)), r"labels are int64 \[3\]: want .*\(7,\)"),
    "odd labels": (_with_labels(np.zeros(7)), "labels are float64"),
    "negative": (_with_labels(np.arange(7) - 1), "labels go from -1 to 5"),
    "huge": (_with_labels(np.arange(7) + 10**9), "labels go from 1000000000"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistakes_are_told_in_one_sentence(tmp_path, kind):
    make, words = MISTAKES[kind]
    make(tmp_path)
    with pytest.raises(DataError, match=words) as error:
        opened(tmp_path / "a.npy")
    assert "\n" not in str(error.value)


def test_a_layout_that_the_shape_denies(tmp_path):
    with pytest.raises(DataError, match="as NCHW: want 1 or 3 channels"):
        opened(saved(tmp_path / "a.npy", PIXELS), layout="NCHW")
