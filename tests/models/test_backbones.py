"""timm's families: each trains, evaluates, embeds, exports, and is fine-tuned from its export."""

import numpy as np
import pytest
import timm
import torch

from fastssl.data.datasets import open_source
from fastssl.engine.encoders import saved_encoder
from fastssl.export import embed_to_file, export, load_encoder
from fastssl.models import MODELS, build_backbone, channels_of, feature_dim
from fastssl.run.train import pretrain
from tests.runs import tiny, without_pictures

# Depthwise and gated stems, batch norm and none, a size fixed for good, two first convolutions.
SMALL = ("test_convnext", "test_efficientnet", "test_nfnet", "test_maxvit", "edgenext_xx_small")
_SIZES = "test_ atto femto pico nano xxs xx_small zepto tiny mini micro xs small _s b0 18".split()
# Families whose smallest model has 167 to 412 million parameters: not for a test to train.
LARGE = {"deepseek_vit_412m", "gemma4_vit_167m", "mobilenetv5_300m"}
_SIDES = (32, 64, 96, 128, 160, 224, 240, 256)  # the first that a model takes


def families() -> list[str]:
    """A small model of each of timm's families, by its name."""

    def rank(name: str) -> tuple[int, int]:
        return next((i for i, size in enumerate(_SIZES) if size in name), 99), len(name)

    small = [min(timm.list_models(module=m), key=rank) for m in timm.list_modules()]
    return [name for name in small if name not in MODELS and name not in LARGE]


def pytest_generate_tests(metafunc):
    if "family" in metafunc.fixturenames:
        full = metafunc.config.getoption("--full", default=False)
        metafunc.parametrize("family", families() if full else SMALL)


def side_of(family: str) -> int:
    """The smallest of _SIDES that the family takes."""
    for side in _SIDES[:-1]:
        try:
            build_backbone(family, shape=(3, side, side), kwargs={})
            return side
        except ValueError:
            continue
    return _SIDES[-1]


def test_every_family_goes_all_the_way(family, tmp_path, monkeypatch):
    """Faults 1 and 2: 34 of 63 were rebuilt with 1, 24 or 64 channels; no export was fine-tuned."""
    without_pictures(monkeypatch.setattr)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels, labels=np.arange(20) % 2)
    side = side_of(family)
    cfg = tiny(
        *("simclr", tmp_path),
        **{"model": {"name": family}, "epochs": 1, "batch_size": 16, "data__image_size": side},
        data__source={"name": "arrays", "path": str(tmp_path / "images.npz")},
    )
    pretrain(cfg)
    encoder, _, channels = load_encoder(cfg.directory, device="cpu")
    split, weights = open_source(cfg.data.source, cfg.seed), saved_encoder(cfg.directory).weights()
    assert channels == split.train.channels == 3
    # of a run that has not written its channels down
    assert channels_of(family, {}, weights, lambda c: (c, side, side)) == 3
    embed_to_file(cfg.directory, "arrays", tmp_path / "features.npz")
    features = np.load(tmp_path / "features.npz")["features"]
    assert features.shape == (20, feature_dim(encoder.backbone))

    where = f"local-dir:{export(cfg.directory, tmp_path / 'out', 'timm')}"
    tuned = timm.create_model(where, pretrained=True, num_classes=10).eval().state_dict()
    assert all(torch.equal(tuned[key], value) for key, value in weights.items())
    assert len(tuned) > len(weights)  # a fresh classifier
    images = torch.randn(2, 1, side, side)
    for count in (1, 4) if encoder.backbone.pretrained_cfg["first_conv"] else ():
        adapted = timm.create_model(where, pretrained=True, in_chans=count).eval()
        assert adapted(images.expand(-1, count, -1, -1)).shape == (2, features.shape[1])
    if family in SMALL[:2]:  # gray images are what they were as three equal channels
        adapted = timm.create_model(where, pretrained=True, in_chans=1).eval()
        gray = encoder(images.expand(-1, 3, -1, -1))
        torch.testing.assert_close(adapted(images), gray, rtol=1e-3, atol=1e-4)


def test_what_does_not_make_an_encoder_is_named():
    """Faults 15 and 23, and their kin."""
    for arguments, sentence in (
        ({"checkpoint_path": "a.pth"}, "model.kwargs.checkpoint_path='a.pth': a run starts from"),
        ({"pretrained": True}, "model.kwargs.pretrained=True: a run starts from random weights"),
        ({"num_classes": 10}, "model.kwargs.num_classes=10: the encoder has no classifier"),
        ({"features_only": True}, "model.kwargs.features_only=True: the encoder gives pooled"),
        ({"global_pool": ""}, r"gives \(1, 17, 64\) for one view, not pooled features"),
        ({"patch_size": 12}, "64 is not a multiple of the patches' 12, and 4 pixels of each side"),
        ({"depht": 3}, "does not take 64-pixel images: .*depht"),
        ({"act_layer": "nothing"}, "does not take 64-pixel images: 'nothing'"),  # a KeyError
    ):
        with pytest.raises(ValueError, match=sentence):
            build_backbone("test_vit", shape=(3, 64, 64), kwargs=arguments)
    harmless = {"pretrained": False, "num_classes": 0, "checkpoint_path": None}
    padded = {"patch_size": 12, "dynamic_img_pad": True, "img_size": 72}
    for arguments in (harmless, padded):
        assert feature_dim(build_backbone("test_vit", shape=(3, 64, 64), kwargs=arguments)) == 64
