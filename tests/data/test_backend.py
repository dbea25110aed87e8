"""Who makes the views, and what is said of it."""

import pytest

from fastssl.data.errors import DataError
from fastssl.data.render.backend import choose_backend
from fastssl.data.sources.folder import scan_folder
from fastssl.data.views.image import preset
from fastssl.data.views.spec import view_spec
from tests.data.photos import folder
from tests.data.test_loader import Images

SIMCLR = preset("simclr", 32)


def present():
    return ""


def absent():
    return "nvidia-dali is not installed: pip install it"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    (source,) = scan_folder(folder(tmp_path_factory.mktemp("photos"), 2))
    return source


def test_dali_where_it_is_and_files_are(photos):
    chosen, note = choose_backend("auto", SIMCLR, photos, present)
    assert chosen == "dali" and "data.overrides.color=linear" in note
    assert choose_backend("auto", preset("mae", 32), photos, present) == ("dali", "")
    linear = preset("simclr", 32, color="linear")
    assert choose_backend("dali", linear, photos, present) == ("dali", "")


def test_torchvision_where_dali_is_not_and_says_so(photos):
    chosen, note = choose_backend("auto", SIMCLR, photos, absent)
    assert chosen == "torch" and note.startswith("views are made by torchvision: nvidia-dali is")
    assert choose_backend("torch", SIMCLR, photos, present) == ("torch", "")
    with pytest.raises(DataError, match="data.backend=dali: nvidia-dali is not installed"):
        choose_backend("dali", SIMCLR, photos, absent)


@pytest.mark.parametrize("asked", ["auto", "torch"])
def test_torchvision_for_what_dali_cannot(photos, asked):
    gray = Images()
    gray.channels = 4
    for views, source in [
        (view_spec("clips", 16), photos),
        (SIMCLR, gray),
        (SIMCLR, Images()),  # in memory already
        (preset("simclr", 32, rand_augment=2), photos),
    ]:
        assert choose_backend(asked, views, source, present) == ("torch", "")


@pytest.mark.parametrize(
    "views, source, words",
    [
        (view_spec("clips", 16), None, "views of clips are torch's alone"),
        (SIMCLR, 4, r"images of 4 channel\(s\)"),
        (preset("simclr", 32, rand_augment=2), None, "rand_augment"),
    ],
)
def test_dali_asked_in_vain(photos, views, source, words):
    if source is not None:
        photos = Images()
        photos.channels = source
    with pytest.raises(DataError, match=f"data.backend=dali: {words}.*data.backend=torch"):
        choose_backend("dali", views, photos, present)


def test_dali_takes_images_in_memory_where_asked():
    assert choose_backend("dali", preset("mae", 32), Images(), present) == ("dali", "")
