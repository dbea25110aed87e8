"""Items of several streams: one place seen by all that share it, each with a look of its own."""

import numpy as np
import pytest
import torch

from fastssl.data.datasets import ArrayImages
from fastssl.data.errors import BadItem, DataError
from fastssl.data.loader import EvalLoader, PretrainLoader
from fastssl.data.render.streams import apply_streams, draw_streams, stream_parameters
from fastssl.data.render.torchvision import PARAMETERS, apply
from fastssl.data.streams import Chosen, Joined, chosen, stream
from fastssl.data.views.image import View, Views, preset
from fastssl.data.views.signal import SignalViews
from fastssl.data.views.streams import StreamViews

# Every geometric operation there is, and a color change.
MOVED = View(
    size=24,
    count=2,
    crop_scale=(0.2, 0.8),
    crop_ratio=(0.5, 2.0),
    flip=0.5,
    flip_vertical=0.5,
    turn=0.7,
    rotate=30,
    translate=0.2,
)
WITHIN = MOVED.model_copy(update={"count": 1, "within": 0})
PLAIN = {"mean": (0.0,), "std": (1.0,)}


def spec(**look):
    """Two views and a third within the first; a depth stream that says nothing of places."""
    image = Views(views=(MOVED, WITHIN), **PLAIN)
    depth = Views(views=(View(size=24, count=3, **look),), **PLAIN)
    return StreamViews({"image": image, "depth": depth}, {"depth": "image"})


def coordinates(high=60, wide=80):
    """Each pixel a number of its own, as far as a byte tells."""
    rows, columns = torch.arange(high)[:, None], torch.arange(wide)
    return ((rows * 3 + columns) % 256).to(torch.uint8)[None]


class Pairs:
    """Random images in color, and depths of one channel; those in `bad` cannot be read."""

    streams = ("image", "depth")
    channels = {"image": 3, "depth": 1}
    classes = ("a", "b")

    def __init__(self, at=None, bad=()):
        self.at = np.arange(26) if at is None else at
        self.labels, self.bad = torch.from_numpy(self.at % 2), bad

    def __len__(self):
        return len(self.at)

    def name(self, i):
        return f"pair{self.at[i]}"

    def item(self, i):
        if self.at[i] in self.bad:
            raise BadItem(self.name(i), "broken")
        g = torch.Generator().manual_seed(int(self.at[i]))
        draw = torch.randint(0, 256, (4, 20, 20), generator=g, dtype=torch.uint8)
        return {"image": draw[:3], "depth": draw[3:]}

    def select(self, indices):
        return Pairs(self.at[indices], self.bad)


def test_what_shares_has_the_same_places_bit_by_bit():
    views, pixels = spec(), coordinates()
    for seed in range(20):
        made = apply_streams(views, {"image": pixels, "depth": pixels.clone()}, seed)
        for a, b in zip(made["image"], made["depth"], strict=True):
            assert torch.equal(a, b)
        assert all(map(torch.equal, made["image"], apply(views.streams["image"], pixels, seed)))
    shapes = {"image": (1, 60, 80), "depth": (1, 60, 80)}
    told = stream_parameters(views, shapes, 3)
    assert torch.equal(told["image"], told["depth"]) and told["image"].shape == (3, len(PARAMETERS))
    apart = StreamViews(views.streams)
    free = stream_parameters(apart, shapes, 3)
    assert torch.equal(free["image"], told["image"]) and not torch.equal(
        free["depth"], told["depth"]
    )


def test_places_are_shares_of_images_of_another_size_and_looks_are_each_streams_own():
    views = spec(jitter=1.0, brightness=0.5, blur=1.0)
    sizes = {"image": (60, 80), "depth": (30, 20)}
    for seed in range(20):
        drawn = draw_streams(views, sizes, seed)
        for p, q in zip(drawn["image"], drawn["depth"], strict=True):
            for length, (a, b), (c, d) in (
                (60, (p.top, p.height), (q.top * 2, q.height * 2)),
                (80, (p.left, p.width), (q.left * 4, q.width * 4)),
            ):
                assert abs(a - c) <= 2 and abs(a + b - c - d) <= 2 and c + d <= length
            assert (p.flip, p.flip_vertical, p.turn, p.angle) == (
                (q.flip, q.flip_vertical, q.turn, q.angle)
            )
            assert p.shift == q.shift and q.jitter and q.sigma and not p.jitter
    image = Views(views=(View(size=32, jitter=1.0, brightness=0.5),), **PLAIN)
    small = Views(views=(View(size=16, jitter=1.0, brightness=0.5, translate=0.1),), **PLAIN)
    both = StreamViews({"image": image, "depth": small}, {"depth": "image"})
    a, b = (own[0] for own in draw_streams(both, sizes, 1).values())
    assert a.jitter != b.jitter and b.shift == (0, 0)
    moved = {"a": Views(views=(View(size=32, translate=0.2),)), "b": small}
    a, b = (
        own[0]
        for own in draw_streams(
            StreamViews(moved, {"b": "a"}), {"a": (8, 8), "b": (8, 8)}, 1
        ).values()
    )
    assert a.shift[0] and b.shift == (a.shift[0] / 2, a.shift[1] / 2)


def test_ranks_workers_and_a_later_start_give_one_stream_of_batches():
    views = StreamViews(
        {"depth": preset("simclr", 12, mean=(0.5,), std=(0.2,)), "image": preset("simclr", 16)},
        {"image": "depth"},
    )
    given = {"batch_size": 8, "seed": 3, "parameters": True}
    source = Pairs(bad=(4,))
    whole = list(PretrainLoader(source, views, **given).stream(0, 5))
    assert whole[0]["views"]["depth"][1].shape == (8, 1, 12, 12)
    assert whole[0]["views"]["image"][0].shape == (8, 3, 16, 16)
    assert any(batch["bad"] for batch in whole)
    parts = [PretrainLoader(source, views, rank=r, world=2, workers=r, **given) for r in (0, 1)]
    later = zip(*(part.stream(2, 5) for part in parts), strict=True)
    for batch, halves in zip(whole[2:], later, strict=True):
        for key in ("views", "params"):
            for name in ("image", "depth"):
                for v, view in enumerate(batch[key][name]):
                    assert torch.equal(view, torch.cat([half[key][name][v] for half in halves]))
        assert torch.equal(batch["index"], torch.cat([half["index"] for half in halves]))


def test_one_stream_of_several_is_a_plain_source():
    source = Pairs()
    plain = ArrayImages(
        torch.stack([source.item(i)["image"] for i in range(26)]),
        source.labels,
        source.classes,
        [source.name(i) for i in range(26)],
    )
    views, given = preset("simclr", 12), {"batch_size": 8, "seed": 3}
    for one in (chosen(source, ["image"]), chosen(Joined({"image": plain}), ["image"])):
        assert not hasattr(one, "encoded") and one.channels == 3
        for a, b in zip(
            PretrainLoader(one, views, **given).stream(1, 4),
            PretrainLoader(plain, views, **given).stream(1, 4),
            strict=True,
        ):
            assert isinstance(a["views"], list) and all(map(torch.equal, a["views"], b["views"]))
            assert torch.equal(a["label"], b["label"])
        (batch, *_), (other, *_) = (EvalLoader(s, views, 26) for s in (one, plain))
        assert torch.equal(batch["view"], other["view"])
    # And the first of several draws as one alone does.
    both = StreamViews({"image": views, "depth": preset("mae", 8, mean=(0.5,), std=(0.5,))})
    batch = next(PretrainLoader(source, both, **given).stream(0, 1))
    alone = next(PretrainLoader(plain, views, **given).stream(0, 1))
    assert all(map(torch.equal, batch["views"]["image"], alone["views"]))


def test_streams_that_the_source_has_not_and_lengths_that_differ():
    source = Pairs()
    with pytest.raises(DataError, match="data.streams names 'sound', and the source has image, de"):
        chosen(source, ["image", "sound"])
    with pytest.raises(
        DataError, match="have streams .image, depth.: name those .* data.streams.im"
    ):
        chosen(source, [])
    plain = chosen(source, ["depth"])
    assert chosen(plain, []) is plain
    with pytest.raises(DataError, match="names 'depth', and the source has no streams"):
        chosen(plain, ["depth"])
    with pytest.raises(DataError, match="different numbers of items .'image' 26, 'depth' 25"):
        Joined({"image": stream(source, "image"), "depth": plain.select(np.arange(25))})
    assert list(Chosen(source, ["depth", "image"]).select(np.array([3])).item(0)) == [
        "depth",
        "image",
    ]


@pytest.mark.parametrize(
    "shares, refusal",
    [
        ({"depth": "depth"}, "'depth' shares with itself"),
        ({"rand": "two"}, "'rand' shares .* of 'two', and rand_augment moves those of 'rand' by"),
        ({"two": "rand"}, "'two' shares .* of 'rand', and rand_augment moves those of 'rand' by"),
        ({"depth": "sound"}, "'depth' shares with 'sound', which is none of"),
        ({"depth": "wave"}, "views of 'wave' are of signals: only images can share"),
        ({"wave": "image"}, "views of 'wave' are of signals: only images can share"),
        ({"depth": "image", "image": "depth"}, "share in a circle: depth, image, depth"),
        (
            {"two": "image"},
            "'two' makes 2 view.s. of an item and 'image', whose places it shares, 1",
        ),
    ],
)
def test_what_cannot_be_shared(shares, refusal):
    one = Views(views=(View(size=8),))
    streams = {"image": one, "depth": one, "two": preset("simclr", 8)}
    streams |= {"wave": SignalViews(length=8), "rand": preset("simclr", 8, rand_augment=1)}
    with pytest.raises(ValueError, match=refusal):
        StreamViews(streams, shares)
