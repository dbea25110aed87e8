"""Sources of several streams: folders, shards and tables whose files belong together; reliefs."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.data.datasets import open_source
from fastssl.data.errors import BadItem, DataError
from fastssl.data.sources.base import EncodedSource
from fastssl.data.sources.paired import PairedSource
from fastssl.data.sources.paths import PathsSource
from fastssl.data.sources.reading import decode_gray, decode_values
from fastssl.data.sources.webdataset import WebDatasetSource
from fastssl.data.streams import stream
from fastssl.data.synthetic.reliefs import LAWS, ReliefsSource


def color(k):
    return np.random.default_rng(k).integers(0, 256, (10, 12, 3)).astype(np.uint8)


def deep(k):
    return (1000 + 7 * k + np.arange(120).reshape(10, 12)).astype(np.uint16)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def pairs(root, part="", count=4, first=0):
    """Two classes; the depths in another order of names than the images would be listed."""
    for k in range(first, first + count):
        name = f"{'cat' if k % 2 else 'dog'}/{k}.v1"
        write(root / part / "image" / f"{name}.png", png(color(k)))
        write(root / part / "depth" / f"{name}.png", png(deep(k)))


def assert_pairs(source, numbers):
    """Each item is the color and the depth of its number, with its label."""
    assert source.streams == ("image", "depth") and source.channels == {"image": 3, "depth": 1}
    assert source.floats == ("depth",)
    for i, k in enumerate(numbers):
        item = source.item(i)
        assert np.array_equal(item["image"].numpy(), color(k).transpose(2, 0, 1))
        assert item["depth"].dtype == torch.float32
        assert np.array_equal(item["depth"][0].numpy(), deep(k))
        assert source.classes[source.labels[i]] == ("cat" if k % 2 else "dog")


def test_paired_folders_with_their_own_split(tmp_path):
    pairs(tmp_path, "train")
    pairs(tmp_path, "val", count=2, first=4)
    cfg = PairedSource(path=tmp_path, folders=("image", "depth"), read={"depth": "values"})
    train, test = open_source(cfg, 0, ["image", "depth"])
    assert_pairs(train, [1, 3, 0, 2])
    assert_pairs(test, [5, 4])
    assert_pairs(train.select(np.array([2, 0])), [0, 1])
    assert isinstance(stream(train, "image"), EncodedSource)
    assert not isinstance(stream(train, "depth"), EncodedSource)
    plain = open_source(cfg.model_copy(update={"flat": True}), 0, ["depth"]).train
    assert plain.labels is None and plain.floats and plain.item(0).shape == (1, 10, 12)
    for name, k in (("a", 1), ("a.m", 3)):  # of which a.jpg is the first, and a.png the second
        write(tmp_path / "two/image/cat" / f"{name}.jpg", png(color(k)))
        write(tmp_path / "two/depth/cat" / f"{name}.png", png(deep(k)))
    (both,) = cfg.model_copy(update={"path": tmp_path / "two"}).open()
    assert_pairs(both, [1, 3])


def test_what_does_not_pair_is_counted_and_named(tmp_path):
    pairs(tmp_path)
    cfg = PairedSource(path=tmp_path, read={"depth": "values"})
    extra = tmp_path / "depth/dog/9.png"
    write(extra, png(deep(9)))
    (tmp_path / "depth/cat/1.v1.png").unlink()
    with pytest.raises(
        DataError, match=r"2 names of .*'dog/9' not in image; 'cat/1.v1' not in depth"
    ):
        cfg.open()
    extra.unlink()
    write(tmp_path / "depth/cat/1.v1.npy", b"")
    write(tmp_path / "depth/cat/1.v1.jpg", b"")
    with pytest.raises(DataError, match="are files of one name"):
        cfg.open()
    (tmp_path / "depth/cat/1.v1.jpg").unlink()
    (source,) = cfg.open()
    with pytest.raises(BadItem):
        source.item(0)
    assert source.item(1)["depth"].shape == (1, 10, 12)
    with pytest.raises(DataError, match="holds more than 8 bits a pixel: set data.source.r"):
        PairedSource(path=tmp_path).open()
    with pytest.raises(DataError, match="data.source.read has 'dept', and the streams are depth"):
        PairedSource(path=tmp_path, read={"dept": "gray"}).open()
    with pytest.raises(DataError, match="has no folder 'flow': it has depth, image"):
        PairedSource(path=tmp_path, folders=("flow",)).open()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no folder: it has none"):
        PairedSource(path=tmp_path / "empty").open()


def test_shards_with_several_members_a_sample(tmp_path, caplog):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for k in range(5):
            members = {"jpg.txt": b"x", "rgb.png": png(color(k)), "depth.png": png(deep(k))}
            members["cls"] = b"cat" if k % 2 else b"dog"
            if k == 2:
                del members["depth.png"]
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{k:03d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    image = {"image": "rgb.png", "depth": "depth.png"}
    cfg = WebDatasetSource(path=str(tmp_path), image=image, read={"depth": "values"})
    for _ in range(2):  # by the headers, then by the index
        (source,) = cfg.open()
        assert_pairs(source, [0, 1, 3, 4])
        assert "1 samples of" in caplog.text and "have not all of rgb.png, depth.png" in caplog.text
    with pytest.raises(DataError, match="no sample of 1 shards .* has all of rgb.png, flow.png"):
        WebDatasetSource(path=str(tmp_path), image={"a": "rgb.png", "b": "flow.png"}).open()
    with pytest.raises(ValueError, match="want an extension for each stream, each once"):
        WebDatasetSource(path=str(tmp_path), image={"a": "rgb.png", "b": "rgb.png"})


def test_a_table_of_paths(tmp_path):
    pairs(tmp_path)
    rows = [f"image/{c}/{k}.v1.png,depth/{c}/{k}.v1.png,{c}" for k, c in ((2, "dog"), (1, "cat"))]
    table = tmp_path / "lists/a.csv"
    write(table, "\n".join(["image,depth,label", *rows]).encode())
    given = {"path": table, "label": "label", "root": tmp_path}
    (source,) = PathsSource(**given, read={"depth": "values"}).open()
    assert_pairs(source, [2, 1])
    (plain,) = PathsSource(**given, columns=("image",)).open()
    assert plain.channels == 3 and isinstance(plain, EncodedSource)
    assert plain.item(1).shape == (3, 10, 12)
    with pytest.raises(
        DataError, match="4 files of the table are not below .*'image/dog/2.v1.png'"
    ):
        PathsSource(path=table, label="label").open()
    with pytest.raises(DataError, match="a column of classes is data.source.label"):
        PathsSource(path=table, root=tmp_path).open()
    write(tmp_path / "b.csv", table.read_bytes().replace(b",dog", b","))
    with pytest.raises(DataError, match="1 cells of data.source.label are empty .row 1 "):
        PathsSource(path=tmp_path / "b.csv", label="label", root=tmp_path).open()
    with pytest.raises(DataError, match="has no column 'flow': there are image, depth, label"):
        PathsSource(**given, columns=("flow",)).open()


def test_how_files_are_read():
    assert torch.equal(
        decode_gray(png(color(1)[..., 0]), "a")[0], torch.from_numpy(color(1)[..., 0])
    )
    luma = np.array(Image.fromarray(color(2)).convert("L"), np.int64)
    assert np.abs(decode_gray(png(color(2)), "a")[0].numpy() - luma).max() <= 1
    file = io.BytesIO()
    np.save(file, np.arange(24, dtype=np.float64).reshape(2, 3, 4))
    assert decode_values(file.getvalue(), "a").shape == (2, 3, 4)
    for made, words in (
        (np.zeros((4, 3, 2)), "want numbers (H, W) or (C, H, W)"),
        (np.array([[np.nan]]), "not finite"),
        (np.array([[1e300]]), "not finite"),
    ):
        file = io.BytesIO()
        np.save(file, made)
        with pytest.raises(BadItem) as error:
            decode_values(file.getvalue(), "a")
        assert words in error.value.reason
    with pytest.raises(BadItem, match="a .npy file is read as values"):
        decode_gray(file.getvalue(), "a")
    with pytest.raises(BadItem) as error:
        decode_values(png(color(3)), "a")
    assert "mode RGB is not one number" in error.value.reason


def test_reliefs_are_lit_surfaces_of_their_heights():
    (source,) = ReliefsSource(per_class=3, size=32).open()
    assert len(source) == 24 and source.classes == LAWS
    item, again = source.item(7), ReliefsSource(per_class=3, size=32).open()[0].item(7)
    assert all(torch.equal(item[name], again[name]) for name in ("image", "depth"))
    assert not torch.equal(item["depth"], source.item(6)["depth"])
    # Where the surface is level, light falls as on a plane: its variation is that of the slope.
    for i in range(0, 24, 3):
        item = source.item(i)
        dy, dx = np.gradient(item["depth"][0].numpy().astype(float))
        shade = item["image"].float().mean(0).numpy()
        design = np.stack([dx.ravel(), dy.ravel(), np.ones(dx.size)])
        fitted = np.linalg.lstsq(design.T, shade.ravel(), rcond=None)[0] @ design
        assert np.corrcoef(fitted, shade.ravel())[0, 1] > 0.5, LAWS[i // 3]
