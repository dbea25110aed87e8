"""MAE on volumes: a whole run with the encoder of clips, whose patches are cubes here."""

import torch

from fastssl.run.build import build
from fastssl.run.train import open_source, pretrain
from tests.runs import tiny

MODEL = {"name": "vit_video", "kwargs": {"embed_dim": 32, "depth": 2, "num_heads": 2}}
DATA = {
    "source": {"name": "volumes", "classes": 4, "per_class": 30, "size": 16},
    "augment": "volumes",
    "image_size": 16,
    "workers": 0,
}


def test_mae_on_volumes_shows_itself(tmp_path):
    cube = {**MODEL, "kwargs": {**MODEL["kwargs"], "patch_size": (4, 4, 4)}}
    data = {**DATA, "overrides": {"turn": 0.5, "noise": 0.2, "gain": 0.1}}
    cfg = tiny("mae", tmp_path, model=cube, data=data, batch_size=24, epochs=1)
    assert pretrain(cfg)["items"] == "volumes"
    shown = {p.name for p in cfg.directory.iterdir()}
    assert {"views.png", "reconstructions.png", "embedding.png", "report.html"} <= shown


def test_a_flat_volume_has_its_depth(tmp_path):
    flat = {**MODEL, "kwargs": {**MODEL["kwargs"], "patch_size": (2, 4, 4)}}
    cfg = tiny("mae", tmp_path, model=flat, data={**DATA, "overrides": {"depth": 6}}, batch_size=24)
    views = cfg.views()
    assert views.shapes(1) == [(1, 6, 16, 16)]
    source = open_source(cfg.data.source, cfg.seed).train
    batch = {"views": [torch.stack([views.apply(source.item(i), i)[0] for i in range(4)])]}
    assert build(cfg, 1)({**batch, "seeds": torch.arange(4)})["loss"].isfinite()
