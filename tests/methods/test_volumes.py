"""MAE on volumes: a whole run with the encoder of clips, whose patches are cubes here."""

import numpy as np

from fastssl.run.train import pretrain
from tests.runs import losses, tiny

RUN = {
    "model": {"name": "vit_video", "kwargs": dict(embed_dim=32, depth=2, num_heads=2)},
    "data": {
        "source": {"name": "volumes", "classes": 4, "per_class": 30, "size": 16},
        "augment": "volumes",
        "image_size": 16,
        "workers": 0,
        "overrides": {"turn": 0.5, "noise": 0.2, "gain": 0.1},
    },
}


def test_mae_learns_volumes_and_shows_itself(tmp_path):
    cube = {**RUN["model"]["kwargs"], "patch_size": (4, 4, 4)}
    model = {**RUN["model"], "kwargs": cube}
    cfg = tiny("mae", tmp_path, model=model, data=RUN["data"], batch_size=24, epochs=6)
    results = pretrain(cfg)
    curve = losses(cfg)
    assert np.mean(curve[-4:]) < 0.97 * np.mean(curve[:4])
    assert results["items"] == "volumes"
    shown = {p.name for p in cfg.directory.iterdir()}
    assert {"views.png", "reconstructions.png", "embedding.png", "report.html"} <= shown


def test_a_flat_volume_has_its_depth(tmp_path):
    kwargs = {**RUN["model"]["kwargs"], "patch_size": (2, 4, 4)}
    overrides = {"depth": 6}
    data = {**RUN["data"], "overrides": overrides}
    model = {"name": "vit_video", "kwargs": kwargs}
    cfg = tiny("mae", tmp_path, model=model, data=data, batch_size=24, epochs=1)
    assert cfg.views().shapes(1) == [(1, 6, 16, 16)]
    assert np.isfinite(pretrain(cfg)["rows"][0]["knn"])
