"""Photographs on disk, and who makes views of them: what is made, and that nobody works ahead."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.bench.cases import all_cases, loaders, photos
from fastssl.bench.cases.loaders import OurLoader, Pictures, PlainLoader, Setting, TorchvisionViews
from fastssl.bench.registry import OURS, Absent
from fastssl.data.sources.folder import scan_folder
from fastssl.data.sources.webdataset import WebDatasetSource
from fastssl.data.views.image import preset

CPU = torch.device("cpu")
SHAPE = {"N": 12, "B": 4, "W": 80, "V": 40, "workers": 1}


def test_photos_are_jpegs_of_their_size_and_differ():
    paths = photos.files(12, 80)
    assert len(paths) == 12 and photos.files(12, 80) == paths
    for path in paths:
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (80, 60))
    assert len({path.read_bytes() for path in paths}) == 12
    pixels = photos.pixels(12, 80)
    assert pixels.shape == (12, 3, 60, 80) and photos.nbytes(12, 80) > 12 * 1000


def test_shards_hold_the_files_of_the_folder():
    (folder,) = scan_folder(photos.folder(12, 80))
    (packed,) = WebDatasetSource(path=str(photos.shards(12, 80)), labels=False).open()
    assert [folder.encoded(i) for i in range(12)] == [packed.encoded(i) for i in range(12)]


def test_the_folder_goes_with_its_process():
    room = photos._room()  # kept until Python ends, and then removed
    assert isinstance(room, tempfile.TemporaryDirectory) and photos._room() is room
    assert Path(room.name) in photos.folder(2, 80).parents


class Counted(torch.utils.data.Dataset):
    """Writes down which items were read, workers' reading included."""

    def __init__(self, path):
        self.path = path

    def __len__(self):
        return 12

    def __getitem__(self, i):
        with open(self.path, "a") as file:
            file.write(f"{i}\n")
        return [torch.full((1,), float(i))]


@pytest.mark.parametrize("workers", [0, 1])
def test_nobody_works_ahead_of_an_epoch(workers, tmp_path):
    log = tmp_path / "read"
    feed = PlainLoader(Setting(preset("mae", 40), 4, workers, CPU), Counted(log))
    for epoch in (1, 2):
        (last,) = feed()
        assert last.shape == (4, 1)
        read = log.read_text().split()
        assert len(read) == 12 * epoch and set(read[-12:]) == {str(i) for i in range(12)}


@pytest.mark.parametrize("dali", [False, True])
def test_ours_goes_on_from_epoch_to_epoch(dali):
    (source,) = scan_folder(photos.folder(12, 80))
    feed = OurLoader(Setting(preset("mae", 40), 4, 0, CPU), source, dali=dali)
    first, second = feed(), feed()
    assert first[0].shape == second[0].shape == (4, 3, 40, 40)
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize("name", ["simclr", "mae", "dino", "plain"])
def test_ordinary_views_follow_the_spec(name):
    spec = preset(name, 40)
    torch.manual_seed(0)
    views = Pictures(photos.files(12, 80), TorchvisionViews(spec))[3]
    assert [v.shape for v in views] == [(3, s.size, s.size) for s in spec.crops]
    names = [type(op).__name__ for op in TorchvisionViews(preset("dino", 64)).views[1].transforms]
    wanted = ["RandomResizedCrop", "RandomHorizontalFlip", "RandomApply", "RandomGrayscale"]
    wanted += ["RandomApply", "RandomSolarize", "ToImage", "ToDtype", "Normalize"]
    assert names == wanted
    slow = TorchvisionViews(preset("simclr", 224), pillow_blur=False).views[0].transforms[4]
    assert tuple(slow.transforms[0].kernel_size) == (23, 23)


def test_a_blur_by_pillow_is_a_gaussian():
    image = Image.fromarray((255 * (torch.rand(40, 40, 3) > 0.5)).to(torch.uint8).numpy())
    pixels = torch.from_numpy(np.array(loaders.PillowBlur((2.0, 2.0))(image)))
    assert pixels.float().std() < 0.4 * 127.5


def test_without_dali_the_other_back_end_stands_and_says_so(monkeypatch):
    make = all_cases()["data-jpeg-simclr"].make
    monkeypatch.setitem(make.__globals__, "_has_dali", lambda: False)  # whatever its module's name
    rivals = make(dict(SHAPE), torch.float32, CPU).rivals
    ours = rivals[OURS]
    assert isinstance(ours, Absent)
    assert ours.why == "pip install 'fastssl-torch[dali]'; fastssl torchvision runs without"
    assert [v.shape[0] for v in rivals["fastssl torchvision"]()] == [4, 4]


def test_kornia_is_a_rival_on_a_gpu():
    make = all_cases()["data-jpeg-simclr"].make
    assert "kornia" in make(dict(SHAPE), torch.float32, torch.device("cuda")).rivals
    assert "kornia" not in make(dict(SHAPE), torch.float32, CPU).rivals
