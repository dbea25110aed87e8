"""Loading what is no image: any worker, any rank, the same batches; evaluation in order."""

import pickle

import pytest
import torch

from fastssl.data.datasets import open_source
from fastssl.data.loader import EvalLoader, PretrainLoader
from fastssl.data.sources.tables import TableSource
from fastssl.data.synthetic.clips import ClipsSource
from fastssl.data.synthetic.clouds import CloudsSource
from fastssl.data.synthetic.signals import SignalsSource
from fastssl.data.synthetic.volumes import VolumesSource
from fastssl.data.views.spec import VIEWS, view_spec

SOURCES = {
    "clips": ClipsSource(classes=2, per_class=12, frames=4, size=16),
    "signals": SignalsSource(classes=2, per_class=12, length=64),
    "clouds": CloudsSource(classes=2, per_class=12, points=32),
    "table": TableSource(dataset="iris"),
    "volumes": VolumesSource(classes=2, per_class=12, size=12),
}
SHAPES = {"clips": (3, 4, 16, 16), "signals": (1, 16), "clouds": (16, 3), "table": (4,)}
SHAPES["volumes"] = (1, 16, 16, 16)
OPTIONS = {"clips": {"frames": 4}}


def parts(kind):
    return open_source(SOURCES[kind], seed=1), view_spec(kind, 16, **OPTIONS.get(kind, {}))


def test_every_preset_has_a_source_here():
    assert set(VIEWS) == set(SOURCES)


@pytest.mark.parametrize("kind", VIEWS)
def test_batches_do_not_depend_on_ranks_or_workers(kind):
    (train, _), spec = parts(kind)
    (whole,) = PretrainLoader(train, spec, batch_size=8, seed=3).stream(1, 2)
    (view,) = whole["views"]
    assert view.shape == (8, *SHAPES[kind]) and view.dtype == torch.float32
    ranks = []
    for rank in (0, 1):
        half = PretrainLoader(train, spec, batch_size=8, seed=3, rank=rank, world=2, workers=rank)
        ranks += half.stream(1, 2)
    for key in ("index", "seeds", "label"):
        assert torch.equal(torch.cat([b[key] for b in ranks]), whole[key])
    assert torch.equal(torch.cat([b["views"][0] for b in ranks]), view)


@pytest.mark.parametrize("kind", VIEWS)
def test_evaluation_reads_every_item_once(kind):
    (_, test), spec = parts(kind)
    batches = list(EvalLoader(test, spec, 3))
    assert torch.equal(torch.cat([b["index"] for b in batches]), torch.arange(len(test)))
    plain = spec.evaluation()
    assert torch.equal(batches[0]["view"][1], plain.apply(test.item(1), 0)[0])


@pytest.mark.parametrize("kind", VIEWS)
def test_sources_and_specs_can_be_sent_to_workers(kind):
    (train, _), spec = parts(kind)
    again, same = pickle.loads(pickle.dumps((train, spec)))
    assert torch.equal(again.item(3), train.item(3)) and again.name(3) == train.name(3)
    assert same == spec
