"""What is embedded where not everything is."""

import numpy as np
import torch

from fastssl.data.errors import BadItem
from fastssl.data.sources.arrays import ArrayImages
from fastssl.data.views.spec import view_spec
from fastssl.evaluate.embed import EmbedConfig, embed, subset, two_views


def test_a_subset_has_its_share_of_every_class():
    """Fault 5: a fixed stride met one class alone where labels rotate."""
    rotating = torch.arange(1000) % 10
    chosen = subset(rotating, 1000, 100)
    assert np.all(np.diff(chosen) > 0) and np.array_equal(chosen, subset(rotating, 1000, 100))
    assert torch.equal(rotating[chosen].bincount(), torch.full((10,), 10))
    rare = torch.cat([torch.zeros(997), torch.tensor([1.0, 2.0, 2.0])]).long()
    assert rare[subset(rare, 1000, 10)].bincount().tolist() == [8, 1, 1]
    assert rare[subset(rare, 1000, 2)].tolist() == [0, 1]
    unlabeled = subset(None, 1000, 500)
    assert len(unlabeled) == 500 and np.ptp(np.diff(unlabeled)) > 0  # no stride
    assert np.array_equal(subset(None, 3, 10), [0, 1, 2])


def test_what_is_embedded_and_aligned_is_such_a_subset():
    """Fault 5."""
    labels = torch.arange(40) % 10
    values = (labels * 20).to(torch.uint8)[:, None, None, None].expand(40, 1, 8, 8)
    source = ArrayImages(values, labels, tuple("abcdefghij"), [str(i) for i in range(40)])
    views = view_spec("plain", 8)
    found = embed(lambda x: x.flatten(1), source, EmbedConfig(views, limit=10))
    assert sorted(found.labels.tolist()) == list(range(10))
    pair = two_views(lambda x: x.mean((1, 2, 3))[:, None], source, views, seed=0, count=10)
    assert len(pair[0].unique()) == 10


class Broken(ArrayImages):
    """Noise of which items 0, 3 and 6 cannot be read."""

    def __init__(self, count):
        values = torch.randint(0, 256, (count, 3, 12, 12), dtype=torch.uint8)
        super().__init__(values, torch.arange(count), ("a",), [str(i) for i in range(count)])

    def item(self, i):
        if i % 3 == 0:
            raise BadItem(self.name(i), "broken")
        return super().item(i)


def test_what_cannot_be_read_is_left_out_and_named():
    source, views = Broken(7), view_spec("simclr", 8)
    found = embed(lambda x: x.flatten(1), source, EmbedConfig(views, batch_size=2))
    assert found.index.tolist() == found.labels.tolist() == [1, 2, 4, 5]
    assert [name for name, _ in found.bad] == ["0", "3", "6"] and len(found.features) == 4
    a, b = two_views(lambda x: x.flatten(1), source, views, seed=0)
    assert len(a) == len(b) == 4 and not torch.equal(a, b)
    assert two_views(lambda x: x.flatten(1), Broken(1), views, seed=0) is None
