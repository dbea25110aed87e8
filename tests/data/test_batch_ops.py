"""Batch operations of a run: what they draw, what they leave, and whole runs with them."""

import os
import signal

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from fastssl.config import ConfigError, resolve
from fastssl.data.batch import math as bm
from fastssl.data.batch.ops import (
    AnyBatchOp,
    Fields,
    LowFrequency,
    Mixup,
    Noise,
    Style,
    apply_batch_ops,
    check_batch_ops,
)
from fastssl.engine.engine import Engine
from fastssl.run.train import Interrupted, pretrain
from tests.runs import final, losses, tiny

B, NORM = 6, ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
OPS = [
    *(Mixup(), Mixup(per="sample", alpha=(0.5, 1.0)), Noise(in_batch=0.2, gaussian=0.1)),
    *(Style(square=0.4), Style(strength=(0.0, 1.0)), Fields(), LowFrequency(multiple=4)),
]
NAMES = ["mixup", "mixup each", "noise", "style", "style in part", "fields", "low_frequency"]


def batch(n=B, size=16, seed=0, views=2):
    g = torch.Generator().manual_seed(seed)
    images = [torch.randn(n, 3, size, size, generator=g) for _ in range(views)]
    seeds = torch.randint(0, 2**62, (n,), generator=g)
    return {"views": images, "seeds": seeds, "index": torch.arange(n), "bad": []}


def test_two_of_a_kind_draw_each_its_own():
    noise, data = Noise(in_batch=0.0, gaussian=0.1), batch()
    before = data["views"][0]
    once, twice = (apply_batch_ops([noise] * n, data, 0.3)["views"][0] for n in (1, 2))
    assert not torch.allclose(twice - once, once - before, atol=1e-4)


@pytest.mark.parametrize("op", OPS, ids=NAMES)
def test_same_seeds_same_result_and_nothing_else_moves(op):
    one, state = batch(), torch.get_rng_state()
    copies = [view.clone() for view in one["views"]]
    a, b = (apply_batch_ops([op], one, 0.3, NORM) for _ in range(2))
    for x, y, before, view in zip(a["views"], b["views"], copies, one["views"], strict=True):
        assert torch.equal(x, y) and torch.equal(before, view)
        assert x.dtype == torch.float32 and x.isfinite().all()
        assert x.shape != view.shape or not torch.equal(x, view)
    assert {k: v for k, v in a.items() if k != "views"} == {
        k: v for k, v in one.items() if k != "views"
    }
    assert torch.equal(state, torch.get_rng_state())
    if not isinstance(op, LowFrequency):  # which draws nothing
        other = apply_batch_ops([op], {**one, "seeds": one["seeds"] + 1}, 0.3, NORM)
        assert not torch.equal(other["views"][0], a["views"][0])


@pytest.mark.parametrize("op", OPS, ids=NAMES)
def test_the_named_views_alone_are_changed(op):
    one = batch()
    both = apply_batch_ops([op], one, 0.3, NORM)["views"]
    first = apply_batch_ops([op.model_copy(update={"views": (1,)})], one, 0.3, NORM)["views"]
    assert torch.equal(first[0], one["views"][0]) and torch.equal(first[1], both[1])


@pytest.mark.parametrize("op", OPS, ids=NAMES)
def test_half_precision_stays(op):
    one = batch()
    halves = {**one, "views": [view.bfloat16() for view in one["views"]]}
    for view in apply_batch_ops([op], halves, 0.3, NORM)["views"]:
        assert view.dtype == torch.bfloat16 and view.isfinite().all()


def test_no_operations_leave_the_batch():
    one = batch()
    assert apply_batch_ops([], one, 0.0) is one


def test_operations_run_in_order_and_draw_apart():
    one = batch()
    twice = apply_batch_ops([Mixup(), Mixup()], one, 0.0)["views"][0]
    once = apply_batch_ops([Mixup()], one, 0.0)
    assert not torch.equal(twice, apply_batch_ops([Mixup()], once, 0.0)["views"][0])


def test_mixup_is_one_mixture_in_both_views():
    one = batch()
    same = {**one, "views": [one["views"][0]] * 2}
    a, b = apply_batch_ops([Mixup()], same, 0.0)["views"]
    assert torch.equal(a, b)
    x = one["views"][0].flatten(1)
    for row in a.flatten(1):  # a mixture of two, by one alpha for all
        solved = torch.linalg.lstsq(x.T, row[:, None]).solution.flatten()
        top = solved.abs().sort(descending=True).values
        assert top[2:].max() < 1e-4 and abs(solved.sum() - 1) < 1e-4


def test_mixups_share_is_uniform_and_its_partners_a_permutation():
    shares = []
    for seed in range(300):
        one = batch(n=4, size=1, seed=seed, views=1)
        one["views"] = [torch.eye(4).view(4, 4, 1, 1)]
        (x,) = apply_batch_ops([Mixup(alpha=(0.2, 0.6))], one, 0.0)["views"]
        mix = x.view(4, 4)
        torch.testing.assert_close(mix.sum(0), torch.ones(4))  # each is a partner once
        torch.testing.assert_close(mix.sum(1), torch.ones(4))
        moved = [i for i in range(4) if mix[i, i] < 0.999]
        shares += [mix[i, i].item() for i in moved[:1]]
    u = (np.arange(len(shares)) + 0.5) / len(shares)
    assert len(shares) > 270 and np.abs((np.sort(shares) - 0.2) / 0.4 - u).max() < 0.12


def test_gaussian_noise_differs_from_view_to_view():
    one = batch(n=8, size=32)
    same = {**one, "views": [0 * one["views"][0]] * 2}
    a, b = apply_batch_ops([Noise(in_batch=0.0, gaussian=0.5)], same, 0.0)["views"]
    for x in (a, b):
        assert abs(x.std() - 0.5) < 0.01 and abs(x.mean()) < 0.02
    assert abs((a * b).mean()) < 0.25 * 4 / (8 * 3 * 32 * 32) ** 0.5
    assert abs((a[0] * a[1]).mean()) < 0.25 * 4 / (3 * 32 * 32) ** 0.5


def test_style_is_of_pixels_not_of_normalized_values():
    """All means become the donor's, as brightnesses, whatever their sign once normalized."""
    one = batch()
    mean, std = (torch.tensor(v)[:, None, None] for v in NORM)
    pixels = (one["views"][0] * 0.3).sigmoid()
    given = {**one, "views": [(pixels - mean) / std]}
    (x,) = apply_batch_ops([Style(square=0.0)], given, 0.0, NORM)["views"]
    levels = (x * std + mean).mean((2, 3))
    torch.testing.assert_close(levels, levels[:1].expand(B, -1))
    assert min((levels[0] - p).abs().max() for p in pixels.mean((2, 3))) < 1e-5


def test_fields_of_no_strength_are_the_identity_on_pixels():
    off = dict(brightness=0.0, contrast=0.0, saturation=0.0, displacement=0.0)
    one = batch()
    (x,) = apply_batch_ops([Fields(**off)], {**one, "views": one["views"][:1]}, 0.0, NORM)["views"]
    torch.testing.assert_close(x, one["views"][0])


def test_one_field_leaves_the_others_as_they_were():
    one = batch()
    one["views"] = [torch.zeros(B, 3, 16, 16)]  # mid-gray: nothing is clamped, nothing moves
    weak = dict(brightness=0.05, contrast=0.0, saturation=0.0)
    a = apply_batch_ops([Fields(**weak, displacement=0.0)], one, 0.0, NORM)["views"][0]
    b = apply_batch_ops([Fields(**weak, displacement=0.1)], one, 0.0, NORM)["views"][0]
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert a.std() > 0.01


def test_low_frequency_follows_efficient_train():
    """160 pixels for 60 % of a run, 192 for 20 %, then 224."""
    op = LowFrequency()
    got = [op.side(224, p) for p in (0.0, 0.59, 0.6, 0.79, 0.8, 0.999)]
    assert got == [160, 160, 192, 192, 224, 224]
    assert op.sides(224) == [160, 192, 224]
    one = batch(size=64)
    small = apply_batch_ops([op], one, 0.1)["views"][0]
    assert torch.equal(small, bm.low_frequency(one["views"][0], op.side(64, 0.1)))
    short = LowFrequency(stages=((0.5, 0.5),), multiple=2)
    assert [short.side(30, p) for p in (0.2, 0.7)] == [16, 30] and short.sides(30) == [16, 30]


def test_what_does_not_fit_the_views_is_refused():
    square, clip = [(3, 16, 16)] * 2, [(3, 4, 16, 16)]
    assert check_batch_ops([Mixup(), Noise()], clip) == []
    assert check_batch_ops([LowFrequency(multiple=4)], square) == [12]
    with pytest.raises(ValueError, match="mixup is to change view 2 of 2"):
        check_batch_ops([Mixup(views=(0, 2))], square)
    for op in (Style(), Fields(), LowFrequency()):
        with pytest.raises(ValueError, match=f"{op.name} is for images, got a view"):
            check_batch_ops([op], clip)


@pytest.mark.parametrize(
    "given, words",
    [
        ("[{name: mixupp}]", "data.batch_ops.0.name='mixupp' is not one of 'mixup', 'noise'"),
        (
            "[{name: style, squre: 1}]",
            r"unknown key data.batch_ops.0.squre=1 \(did you mean square",
        ),
        ("[{name: mixup, alpha: [0.9, 0.1]}]", "the low end 0.9 is above the high end 0.1"),
        ("[{name: low_frequency, multiple: 3}]", "multiple of 2"),
        ("[{name: low_frequency, stages: []}]", "at least 1"),
    ],
)
def test_wrong_options_are_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        resolve("simclr-digits", [f"data.batch_ops={given}"])


def test_every_option_is_described_and_round_trips():
    adapter = TypeAdapter(AnyBatchOp)
    for op in OPS:
        fields = type(op).model_fields
        assert all(f.description for name, f in fields.items() if name != "name")
        assert adapter.validate_json(adapter.dump_json(op)) == op
        assert type(op).__doc__


ALL = [{"name": n} for n in ("mixup", "noise", "style", "fields")]


def test_a_stopped_run_goes_on_as_if_never_stopped(tmp_path, monkeypatch):
    whole = tiny("simclr", tmp_path, name="whole", data__batch_ops=ALL, epochs=2)
    pretrain(whole)
    parted = whole.model_copy(update={"name": "parted", "resume": "auto"})
    step = Engine.step

    def step_and_ask(self, *args, **options):
        if self.ds.global_steps == 3:  # in mid-epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **options)

    monkeypatch.setattr(Engine, "step", step_and_ask)
    with pytest.raises(Interrupted):
        pretrain(parted)
    monkeypatch.undo()
    pretrain(parted)
    assert final(parted) == final(whole)
    plain = tiny("simclr", tmp_path, name="plain", epochs=1)
    pretrain(plain)
    assert losses(plain)[0] != losses(whole)[0]


FRACTALS = {"name": "fractals", "classes": 2, "per_class": 20, "size": 32}


def test_a_convolutional_network_grows_with_its_images(tmp_path, monkeypatch):
    """And evaluation is of whole images."""
    seen, step = [], Engine.step

    def look(self, batch, *args, **options):
        seen.append(batch["views"][0].shape[-1])
        return step(self, batch, *args, **options)

    monkeypatch.setattr(Engine, "step", look)
    ops = [{"name": "low_frequency", "multiple": 8}]
    data = {"source": FRACTALS, "image_size": 32, "batch_ops": ops, "workers": 0}
    narrow = {"channels": [8, 16, 32, 64], "stem_width": 8}
    model = {"name": "resnet10t", "kwargs": narrow}
    cfg = tiny("simclr", tmp_path, data=data, model=model, batch_size=16, epochs=5)
    pretrain(cfg)
    assert seen == [24] * 8 + [32] * 2  # 5/7 and 6/7 of 32 are nearest to 24
    assert np.isfinite(losses(cfg)).all()


def test_a_vit_of_one_size_is_refused_and_a_dynamic_one_is_not(tmp_path):
    ops = [{"name": "low_frequency", "multiple": 4}]
    with pytest.raises(
        ConfigError, match="make images of 12 pixels, which the model does not take"
    ):
        pretrain(tiny("simclr", tmp_path, data__batch_ops=ops))
    dynamic = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    dynamic |= {"dynamic_img_size": True}
    model = {"name": "vit_tiny_patch16_224", "kwargs": dynamic}
    cfg = tiny("simclr", tmp_path, data__batch_ops=ops, model=model, epochs=1)
    pretrain(cfg)
    assert np.isfinite(losses(cfg)).all()
    with pytest.raises(ConfigError, match="fixed image size"):
        pretrain(tiny("mae", tmp_path, data__batch_ops=ops, model=model, epochs=1))
