"""DALI's views beside torchvision's: the same draws, nearly the same pixels; nothing lost by a bad
file, a restart or a rank."""

import numpy as np
import pytest
import torch
from nvidia.dali import fn, pipeline_def

from fastssl.data.datasets import ArrayImages
from fastssl.data.loader import PretrainLoader
from fastssl.data.render import dali
from fastssl.data.render import torchvision as torch_views
from fastssl.data.render.backend import Rendering, choose_backend
from fastssl.data.render.encoded import encoded_item
from fastssl.data.render.jpeg import plain_jpeg_size
from fastssl.data.sources.decode import decode_bytes
from fastssl.data.sources.folder import scan_folder
from fastssl.data.streams import OneStream
from fastssl.data.views.image import View, Views, preset
from fastssl.data.views.streams import StreamViews
from tests.data.photos import SHAPES, folder, jpeg, photo
from tests.data.test_loader import assert_same_stream

COUNT = 23


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    (source,) = scan_folder(folder(tmp_path_factory.mktemp("photos"), COUNT))
    return source


def loader(source, views, *, half=False, channels_last=False, readers=0, **options):
    how = Rendering(threads=2, readers=readers, half=half, channels_last=channels_last)
    given = {"batch_size": 6, "seed": 7, "rendering": how, **options}
    return PretrainLoader(source, views, **given)


def differences(source, views, steps=2, **options):
    """|DALI's - torchvision's| of every value, in levels of 255: (N, 3, size, size) each view."""
    ours = loader(source, views, **options).stream(0, steps)
    theirs = PretrainLoader(source, views, batch_size=6, seed=7).stream(0, steps)
    std = 255 * torch.tensor(views.std).view(-1, 1, 1)
    found = []
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a["index"], b["index"]) and torch.equal(a["seeds"], b["seeds"])
        assert torch.equal(a["label"], b["label"]) and a["bad"] == b["bad"] == []
        pairs = zip(a["views"], b["views"], strict=True)
        found.append([(x.float() - y).abs() * std for x, y in pairs])
    return [torch.cat(view) for view in zip(*found, strict=True)]


def one(**fields):
    return Views(views=(View(**{"size": 48, **fields}),))


def largest(per_value, at=1.0):
    return float(per_value.flatten().quantile(at))


# What is the same in both but for rounding.  Largest difference, and mean, in levels of 255.
EXACT = {
    "as it is": (Views(views=(View(size=64, count=1),)), 2, 0.3),
    "grown": (one(size=128, crop_scale=(0.3, 0.6), flip=0.5), 2, 0.3),
    "flips and turns": (one(size=128, flip=0.5, flip_vertical=0.5, turn=1.0), 2, 0.3),
    "shifted": (one(size=128, translate=0.2, flip=0.5), 2.5, 0.3),
    "rotated": (one(size=128, rotate=90, translate=0.2, flip=0.5), 3, 0.3),
    "gray": (one(size=128, grayscale=0.5), 2.5, 0.4),
    "solarized": (one(size=128, solarize=0.5, solarize_threshold=0.0), 2, 0.3),
    "blurred": (one(size=128, blur=0.7), 2, 0.4),
    "blurred wide": (one(size=128, blur=0.7, blur_sigma=(0.1, 9.0)), 2, 0.4),
    "erased": (one(size=128, erase=0.5), 2, 0.3),
    "bright": (one(size=128, jitter=1, brightness=0.8, color="linear"), 3, 0.5),
    "contrast": (one(size=128, jitter=1, contrast=0.8, color="linear"), 3, 0.5),
    "color": (one(size=128, jitter=1, saturation=0.8, hue=0.5, color="linear"), 5, 0.6),
}


@pytest.mark.parametrize("name", EXACT)
def test_pixels_where_an_operation_is_exact(photos, name):
    """Views larger than the photos: no filter shrinks, so that borders are alike as well."""
    views, top, mean = EXACT[name]
    (found,) = differences(photos, views)
    assert largest(found) <= top and float(found.mean()) <= mean


def test_a_shrinking_crop_differs_at_its_border_alone(photos):
    (found,) = differences(photos, one(size=24, crop_scale=(0.5, 1.0), flip=0.5))
    assert largest(found[..., 2:-2, 2:-2]) <= 2
    assert 2 < largest(found) <= 40 and float(found.mean()) <= 0.6


def test_bicubic_differs_where_it_overshoots_alone(photos):
    (found,) = differences(photos, one(size=128, interpolation="bicubic", crop_scale=(0.3, 1.0)))
    assert largest(found, 0.999) <= 2 and float(found.mean()) <= 0.3


RECIPES = ["simclr", "byol", "mocov3", "barlow_twins", "vicreg", "swav", "dino", "mae", "ijepa"]


@pytest.mark.parametrize("name", [*RECIPES, "crop_mae", "simmim", "plain"])
def test_presets_are_the_same_views(photos, name):
    """Linear color, inner pixels: what a recipe trains on.  The rounding of its operations adds
    up, and the hue's matrix turns it; four of 255 is the worst of a thousand values."""
    for found in differences(photos, preset(name, 48, color="linear")):
        inner = found[..., 2:-2, 2:-2]
        assert float(inner.mean()) <= 0.6 and largest(inner, 0.999) <= 6


def test_sequential_color_has_linear_stand_in(photos):
    """The same map where nothing is clamped: mild factors on images without black and white."""
    mild = {"jitter": 1, "brightness": 0.1, "contrast": 0.1, "saturation": 0.1}
    soft = ArrayImages(
        torch.randint(80, 170, (12, 3, 40, 40), dtype=torch.uint8).repeat_interleave(2, 3),
        torch.arange(12),
        ("a",),
        [str(k) for k in range(12)],
    )
    views = one(size=80, color="sequential", **mild)
    (found,) = differences(soft, views, steps=2)
    assert largest(found) <= 4 and float(found.mean()) <= 0.6


def test_half_and_channels_last(photos):
    views = preset("barlow_twins", 40, color="linear")
    plain = list(loader(photos, views).stream(0, 2))
    for batch, want in zip(loader(photos, views, half=True).stream(0, 2), plain, strict=True):
        for x, y in zip(batch["views"], want["views"], strict=True):
            assert x.dtype == torch.float16 and x.is_contiguous()
            assert float((x.float() - y).abs().max()) < 2e-3
    last = loader(photos, views, channels_last=True).stream(0, 2)
    for batch, want in zip(last, plain, strict=True):
        for x, y in zip(batch["views"], want["views"], strict=True):
            assert x.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(x, y, atol=1e-5, rtol=0)


def test_the_gpu_graph_makes_the_same(photos, monkeypatch):
    """Its own ways to color and to blur, run by DALI's CPU operators; of one channel, too."""
    color = photos, preset("byol", 48, color="linear")
    gray = OneStream(Twins(photos), "gray"), preset("byol", 48, mean=(0.4,), std=(0.2,))
    here = [list(loader(*given).stream(0, 3)) for given in (color, gray)]
    layout = dali.Layout
    monkeypatch.setattr(dali, "Layout", lambda alone, gpu, channels: layout(alone, True, channels))
    monkeypatch.setattr(dali, "_decoder", lambda gpu: "cpu")
    monkeypatch.setattr(dali, "_gpu", lambda node: node)
    for (source, views), wanted in zip((color, gray), here, strict=True):
        for batch, want in zip(loader(source, views).stream(0, 3), wanted, strict=True):
            for x, y in zip(batch["views"], want["views"], strict=True):
                apart = (x - y).abs() * 255 * torch.tensor(views.std).view(-1, 1, 1)
                assert largest(apart) <= 2.5 and float(apart.mean()) < 0.35


def test_parameters_are_those_of_the_views(photos):
    views = preset("simclr", 32)
    batches = loader(photos, views, parameters=True).stream(0, 3)
    theirs = PretrainLoader(photos, views, batch_size=6, seed=7, parameters=True).stream(0, 3)
    for a, b in zip(batches, theirs, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a["params"], b["params"], strict=True))


def test_readers_ranks_and_restarts_change_nothing(photos):
    views = preset("simclr", 32)
    whole = list(loader(photos, views).stream(0, 8))
    assert_same_stream(whole[3:], loader(photos, views).stream(3, 8))
    assert_same_stream(whole[5:], loader(photos, views, readers=1).stream(5, 8))
    halves = [loader(photos, views, rank=r, world=2).stream(0, 8) for r in (0, 1)]
    for one_process, *parts in zip(whole, *halves, strict=True):
        assert torch.equal(one_process["index"], torch.cat([p["index"] for p in parts]))
        for v, view in enumerate(one_process["views"]):
            assert torch.equal(view, torch.cat([p["views"][v] for p in parts]))
    assert list(loader(photos, views).stream(4, 4)) == []


def test_batches_outlive_those_that_follow(photos):
    """DALI hands its memory over: nothing is written into a batch that was given away."""
    views = preset("simclr", 32)
    kept = list(loader(photos, views).stream(0, 9))
    copies = [[v.clone() for v in b["views"]] for b in loader(photos, views).stream(0, 9)]
    for batch, copy in zip(kept, copies, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(batch["views"], copy, strict=True))


class Broken(ArrayImages):
    """JPEG files in memory, some of them replaced."""

    def __init__(self, files):
        n = len(files)
        pixels = torch.zeros(n, 3, 1, 1, dtype=torch.uint8)
        super().__init__(pixels, torch.arange(n), ("a",), [f"file{i}" for i in range(n)])
        self.files = files

    def encoded(self, i):
        return self.files[i]

    def item(self, i):
        return decode_bytes(self.files[i], self.name(i))


def files(n=18):
    return [jpeg(photo(k, *SHAPES[k % len(SHAPES)])) for k in range(n)]


def spoilt() -> bytes:
    """A JPEG file of a plain beginning and end that libjpeg gives up on: no Huffman table."""
    data = jpeg(photo(3, 90, 120))
    at = data.index(b"\xff\xc4")
    broken = data[: at + 2] + data[at + 2 : at + 4] + b"\x7f" + data[at + 5 :]
    assert plain_jpeg_size(broken) is not None
    return broken


def test_a_file_that_dali_cannot_decode_is_replaced_and_named(photos, capfd):
    """The pipeline dies of it; the next one takes over, and not a sample is lost."""
    good = files()
    broken = [*good]
    broken[4], broken[9] = spoilt(), spoilt()
    views = preset("simclr", 32, color="linear")
    got = list(loader(Broken(broken), views).stream(0, 6))
    want = list(PretrainLoader(Broken(broken), views, batch_size=6, seed=7).stream(0, 6))
    clean = list(loader(Broken(good), views).stream(0, 6))
    assert {name for b in got for name, _ in b["bad"]} == {"file4", "file9"}
    for a, b, c in zip(got, want, clean, strict=True):
        assert a["bad"] == b["bad"] and torch.equal(a["index"], b["index"])
        if not a["bad"]:
            assert all(torch.equal(x, y) for x, y in zip(a["views"], c["views"], strict=True))
    capfd.readouterr()  # libjpeg speaks of it


def test_all_modes_are_decoded_as_torchvision_decodes_them(tmp_path):
    """PNG, CMYK, EXIF, gray ...: Pillow's say, for both."""
    from PIL import Image

    (tmp_path / "a").mkdir()
    pixels = photo(1, 60, 80)
    Image.fromarray(pixels).save(tmp_path / "a" / "0.png")
    Image.fromarray(pixels).convert("CMYK").save(tmp_path / "a" / "1.jpg")
    Image.fromarray(pixels).convert("L").save(tmp_path / "a" / "2.jpg")
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a" / "3.jpg", exif=tags.tobytes())
    Image.fromarray(pixels).convert("P").save(tmp_path / "a" / "4.gif")
    Image.fromarray(pixels).convert("RGBA").save(tmp_path / "a" / "5.webp")
    Image.fromarray(pixels[:1, :1]).save(tmp_path / "a" / "6.bmp")
    (source,) = scan_folder(tmp_path)
    ours = next(loader(source, one(size=80), batch_size=7).stream(0, 1))
    theirs = next(PretrainLoader(source, one(size=80), batch_size=7, seed=7).stream(0, 1))
    apart = (ours["views"][0] - theirs["views"][0]).abs() * 255 * 0.23
    assert ours["bad"] == [] and largest(apart) <= 2


@pipeline_def(batch_size=12, num_threads=1, device_id=None)
def _decoded(data, corners, sides):
    files = fn.external_source(source=lambda: [np.frombuffer(data, np.uint8)] * len(corners))
    start = fn.external_source(source=lambda: corners)
    shape = fn.external_source(source=lambda: sides)
    return fn.decoders.image_slice(files, start=start, shape=shape, axes=(0, 1))


@pytest.mark.parametrize(
    "options",
    [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"quality": 20}],
    ids=str,
)
def test_parts_are_decoded_as_the_whole_is(options):
    data, rng = jpeg(photo(2, 101, 77), **options), np.random.default_rng(0)
    whole = decode_bytes(data, "photo").permute(1, 2, 0).numpy()
    sides = rng.integers(1, [102, 78], (12, 2), dtype=np.int32)
    corners = rng.integers(0, [102, 78] - sides, dtype=np.int32)
    (out,) = _decoded(data, corners, sides).run()
    for k, ((top, left), (h, w)) in enumerate(zip(corners, sides, strict=True)):
        assert (out.at(k) == whole[top : top + h, left : left + w]).all()


def test_an_image_of_a_bomb_is_not_for_dali(monkeypatch, photos):
    from PIL import Image

    from fastssl.data.errors import BadItem

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for source in (Broken(files(1)), photos):
        with pytest.raises(BadItem, match="limit of 2000 pixels"):
            encoded_item(source, 0)


def test_draws_cost_no_decoding(photos):
    """A plain file goes on as it is."""
    got = encoded_item(photos, 0)
    assert bytes(got.data) == photos.encoded(0)
    assert (got.height, got.width) == tuple(photos.item(0).shape[1:])
    careful = encoded_item(photos, 0, careful=True)
    assert bytes(careful.data[:2]) == b"P6" and careful[1:] == got[1:]


def test_draw_views_is_what_both_read(photos):
    """The crop of one view, by its numbers, is the part of the image that DALI is told."""
    views = preset("mae", 32)
    seed = int(next(loader(photos, views).stream(0, 1))["seeds"][0])
    (p,) = torch_views.draw_views(views, 90, 120, seed)
    assert 0 <= p.top and p.top + p.height <= 90 and 0 <= p.left and p.left + p.width <= 120


class Twins:
    """The photos twice: in color, and as gray images of their own size; draws are shared."""

    streams, channels = ("image", "gray"), {"image": 3, "gray": 1}
    classes = labels = None

    def __init__(self, photos):
        self.photos, self.labels, self.classes = photos, photos.labels, photos.classes

    def __len__(self):
        return len(self.photos)

    def name(self, i):
        return self.photos.name(i)

    def item(self, i):
        image = self.photos.item(i)
        return {"image": image, "gray": image[1:2].clone()}

    def stream(self, name):
        return self.photos if name == "image" else OneStream(self, name)


def test_streams_share_places_and_each_has_its_look(photos):
    """A color stream and a gray one that shares its crops, flips and turns, of another size."""
    look = {"jitter": 1.0, "brightness": 0.5, "contrast": 0.5, "grayscale": 0.5, "blur": 0.5}
    look["color"] = "linear"
    moved = {"crop_scale": (0.4, 0.8), "flip": 0.5, "turn": 0.5, "rotate": 20, "translate": 0.1}
    image = Views(views=(View(size=128, count=2, **moved), View(size=128, within=0)))
    gray = Views(views=(View(size=144, count=3, **look),), mean=(0.4,), std=(0.2,))
    views = StreamViews({"image": image, "gray": gray}, {"gray": "image"})
    source = Twins(photos)
    assert choose_backend("dali", views, source).backend == "dali"
    ours, theirs = (
        PretrainLoader(source, views, batch_size=6, seed=7, parameters=True, rendering=how)
        for how in (Rendering(threads=2), None)
    )
    for a, b in zip(ours.stream(0, 2), theirs.stream(0, 2), strict=True):
        for name, (side, channels, mean) in {"image": (128, 3, 0.5), "gray": (144, 1, 0.9)}.items():
            std = 255 * torch.tensor(views.streams[name].std).view(-1, 1, 1)
            assert len(a["views"][name]) == len(b["views"][name]) == 3
            for v, (x, y) in enumerate(zip(a["views"][name], b["views"][name], strict=True)):
                assert x.shape == (6, channels, side, side)
                far = (x - y).abs() * std
                assert far.mean() <= mean and far.quantile(0.999) <= 8, (name, v)
                assert torch.equal(a["params"][name][v], b["params"][name][v])
                assert torch.equal(a["params"]["image"][v][:, :9], a["params"]["gray"][v][:, :9])
