"""The recipes of methods that compare whole views have the hyperparameters of their authors."""

import pytest

from fastssl.config import resolve
from fastssl.schedules.config import at

# By recipe, dotted keys.  Sources: BYOL, sections 3.2 and 3.3; SimSiam, section 4; MoCo v2, section
# 3 and main_moco.py; SwAV, scripts/swav_800ep_pretrain.sh.
AUTHORS = {
    "byol-resnet50": {
        **{"epochs": 1000, "batch_size": 4096, "optim.lr": 0.2 * 4096 / 256, "optim.name": "lars"},
        **{"optim.weight_decay": 1.5e-6, "optim.schedule.warmup": 10 / 1000},
        **{"method.hidden_dim": 4096, "method.projection_dim": 256, "method.layers": 2},
    },
    "simsiam-resnet50": {
        **{
            "epochs": 100,
            "batch_size": 512,
            "optim.lr": 0.05 * 512 / 256,
            "optim.name": "momentum",
        },
        **{"optim.weight_decay": 1e-4, "optim.momentum": 0.9, "optim.schedule.warmup": 0},
        **{"method.projection_dim": 2048, "method.prediction_hidden_dim": 512, "method.layers": 3},
    },
    "mocov2-resnet50": {
        **{"epochs": 200, "batch_size": 256, "optim.lr": 0.03, "optim.name": "momentum"},
        **{"optim.weight_decay": 1e-4, "optim.momentum": 0.9, "optim.schedule.warmup": 0},
        **{"method.temperature": 0.2, "method.queue_size": 65536, "method.momentum": 0.999},
        **{"method.hidden_dim": 2048, "method.projection_dim": 128},
    },
    "swav-resnet50": {
        **{"epochs": 800, "batch_size": 64 * 64, "optim.lr": 4.8, "optim.name": "lars"},
        **{"optim.weight_decay": 1e-6, "optim.schedule.warmup": 10 / 800},
        **{"optim.schedule.end": 0.0048 / 4.8, "method.prototypes": 3000, "method.epsilon": 0.05},
        **{"method.temperature": 0.1, "method.sinkhorn_iterations": 3, "method.queue_size": 0},
        **{"method.hidden_dim": 2048, "method.projection_dim": 128},
    },
}
CROPS = {
    "byol-resnet50": [(224, (0.08, 1.0))] * 2,
    "simsiam-resnet50": [(224, (0.2, 1.0))] * 2,
    "mocov2-resnet50": [(224, (0.2, 1.0))] * 2,
    "swav-resnet50": [(224, (0.14, 1.0))] * 2 + [(96, (0.05, 0.14))] * 6,
}


def value(cfg, key):
    for name in key.split("."):
        cfg = getattr(cfg, name)
    return cfg


@pytest.mark.parametrize("name", AUTHORS)
def test_a_recipe_has_its_authors_numbers(name):
    cfg = resolve(name, ["data.source.path=/images"])
    found = {key: value(cfg, key) for key in AUTHORS[name]}
    assert found == pytest.approx(AUTHORS[name])
    assert [(view.size, view.crop_scale) for view in cfg.views().crops] == CROPS[name]


def test_byols_momentum_and_swavs_frozen_prototypes():
    byol = resolve("byol-resnet50", ["data.source.path=/images"]).method
    assert [at(byol.momentum, p) for p in (0, 0.5, 1)] == pytest.approx([0.996, 0.998, 1.0])
    (group,) = resolve("swav-resnet50", ["data.source.path=/images"]).optim.groups
    assert (group.match, group.freeze_epochs) == ("prototypes.*", 1)  # 313 steps of 1,281,167
