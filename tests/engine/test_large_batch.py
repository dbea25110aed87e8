"""The gradient of a whole batch by micro-batches: what is drawn and what is remembered, once."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastssl.engine import launch
from fastssl.engine.config import EngineConfig, EngineError
from fastssl.engine.large_batch import LargeBatch, check_batch_norms, check_deepspeed
from fastssl.methods import METHODS, SimCLR, build_method
from fastssl.methods.base import PARAMETERS
from fastssl.models import build_backbone, freeze
from fastssl.tree import cut, join, leaves
from tests.engine import state_worker
from tests.runs import METHODS as OPTIONS
from tests.runs import OF_TOKENS, VIT, tiny

COUPLING = [name for name in OPTIONS if METHODS[name].couples_batch]
DROPS = {**VIT, "drop_path_rate": 0.3, "proj_drop_rate": 0.1}
OF_ONE = {"clip": (1,)}  # the others compare two views
SIZES = [3, 3, 2]
FOUR: dict[str, Any] = {"accumulation": 4}


def build(name, encoder="vit_tiny_patch16_224", side=16, kwargs=VIT):
    torch.manual_seed(0)
    if name in OF_TOKENS:
        kwargs = {**kwargs, "global_pool": "token"}
    backbone = build_backbone(encoder, shape=(1, side, side), kwargs=kwargs)
    return build_method(backbone, tiny(name, Path()).method)


def batch(views=2, side=16):
    g, each = torch.Generator().manual_seed(1), torch.arange(8)
    data = {"views": [torch.randn(8, 1, side, side, generator=g) for _ in range(views)]}
    data["params"] = [torch.rand(8, len(PARAMETERS), generator=g) for _ in range(views)]
    return data | {"index": each, "seeds": each + 3, "label": each % 3}


def in_one_graph(method, data):
    """The loss of the same micro-batches, drawn in the same order, and its gradient."""
    data = method.prepare(data)
    rows, targets = [], []
    for micro in cut(data, SIZES):
        rows.append(method(micro, "encode"))
        targets += [method(micro, "targets")] if method.has_targets else []
    seen = {**data, "targets": join(targets)} if targets else data
    out = method(seen, "loss", join(rows))
    out["loss"].backward()
    return out


class Bare:
    """A method as the engine calls it, without an engine."""

    def __init__(self, module):
        self.module = module

    def __call__(self, *given):
        return self.module(*given)


def by_micro_batches(method, data):
    large = LargeBatch(Bare(method), data, SIZES, lambda tree: tree, torch.device("cpu"))
    out = large.compare()
    out["loss"].backward()
    replays = large.replays
    assert len([part.backward() for part in large.replay()]) == replays
    return out


def both(method, data):
    """(metrics, gradient, buffers, the next draw) each way."""
    found = []
    for way in (in_one_graph, by_micro_batches):
        ours = copy.deepcopy(method).train()
        torch.manual_seed(5)
        out = way(ours, data)
        kept = [leaf.detach() for leaf in leaves(out.pop("keep", []))]
        grads = [p.grad for p in ours.parameters() if p.requires_grad]
        assert all(grad is not None for grad in grads)
        whole = torch.cat([grad.flatten() for grad in grads])
        numbers = [value.detach() for value in out.values()]
        found.append((numbers + kept, whole, [*ours.buffers()], torch.rand(1)))
    return found


@pytest.mark.parametrize("name", COUPLING)
def test_the_gradient_is_that_of_one_graph(name):
    (numbers, grad, buffers, drawn), again = both(
        build(name, kwargs=DROPS), batch(*OF_ONE.get(name, ()))
    )
    torch.testing.assert_close(again[0], numbers, rtol=1e-6, atol=1e-6)
    assert (again[1] - grad).norm() < 1e-6 * grad.norm()
    assert all(map(torch.equal, again[2], buffers)) and torch.equal(again[3], drawn)


def test_batch_norms_remember_each_micro_batch_once():
    (_, grad, buffers, _), again = both(build("simclr", "test_resnet", 32, {}), batch(side=32))
    assert (again[1] - grad).norm() < 1e-6 * grad.norm()
    assert len(buffers) > 3 and all(map(torch.equal, again[2], buffers))


def test_of_a_frozen_encoder_nothing_is_encoded_twice():
    method = build("simclr")
    freeze(method.encoder)
    calls = []
    method.encoder.register_forward_hook(lambda *_: calls.append(1))
    (_, grad, _, _), again = both(method, batch())
    torch.testing.assert_close(again[1], grad, rtol=1e-6, atol=1e-8)
    assert len(calls) == 2 * 2 * len(SIZES)


def test_over_a_frozen_encoder_all_micro_batches_make_one_step():
    with launch.session("cpu"):
        kind = {**FOUR, "zero_stage": 0}  # above, one step has one backward anyway
        e = state_worker.engine("simclr", "vit_tiny_patch16_224", 8, freezing=True, **kind)
        data = [state_worker.batch(0, 1, 2, 16, step) for step in range(2)]
        assert [e.step(batch, 1e-2).applied for batch in data] == [True, True]


class Bright(SimCLR):
    """It weighs the loss by how bright the first view's images are."""

    def loss(self, encoded: list[Tensor], batch) -> dict[str, Tensor]:
        order = batch["views"][0].flatten(1).mean(1).argsort()
        return {"loss": super().loss([encoded[0][order], *encoded[1:]], batch)["loss"]}


def test_a_loss_that_reads_pixels_says_so(monkeypatch):
    method, data = build("simclr"), batch()
    method.__class__ = Bright
    with pytest.raises(EngineError, match=r"Bright.loss reads the values of batch\['views'\]"):
        by_micro_batches(method, data)
    monkeypatch.setattr(Bright, "loss_reads_views", True)
    (_, grad, _, _), again = both(method, data)
    assert (again[1] - grad).norm() < 1e-6 * grad.norm()


class Wrong(SimCLR):
    """Two rows a sample, or rows that the loss does not use, or a memory of its own."""

    how = "targets"

    def encode(self, batch) -> Any:
        self.seen.add_(1)
        rows = super().encode(batch)
        return torch.cat(rows) if self.how == "encode" else rows

    def targets(self, batch) -> Any:
        return torch.cat(batch["views"]).mean((1, 2, 3)) if self.how == "targets" else None

    def loss(self, encoded: Any, batch) -> dict[str, Tensor]:
        rows = [x.detach() for x in encoded] if self.how == "unused" else encoded
        return super().loss(rows, batch)


def wrong(monkeypatch, how):
    method = build("simclr")
    method.register_buffer("seen", torch.zeros(()))
    method.__class__ = Wrong
    monkeypatch.setattr(Wrong, "how", how)
    return method


@pytest.mark.parametrize("how", ["encode", "targets"])
def test_rows_are_one_for_each_sample(monkeypatch, how):
    with pytest.raises(EngineError, match=rf"Wrong.{how}\(batch\) has 6 rows for 3 samples"):
        by_micro_batches(wrong(monkeypatch, how), batch())


def test_what_encode_remembers_it_remembers_once_a_micro_batch(monkeypatch):
    method = wrong(monkeypatch, "right")
    by_micro_batches(method, batch())
    assert method.seen == len(SIZES)


def test_a_loss_that_does_not_use_the_rows_trains_its_head(monkeypatch):
    method = wrong(monkeypatch, "unused")
    by_micro_batches(method, batch())
    assert all(p.grad.norm() > 0 for p in method.head.parameters() if p.ndim > 1)
    assert all(p.grad is None or p.grad.norm() == 0 for p in method.encoder.parameters())


def test_batch_norms_of_micro_batches_are_to_be_accepted():
    method, four = (
        build("simclr", "test_resnet", 32, {}),
        EngineConfig(**FOUR),
    )
    with pytest.raises(EngineError, match="the [0-9]+ batch norms of the encoder would .*=256 im"):
        check_batch_norms(method, four, 256)
    for accepted in ({"micro_batchnorm": True}, {"large_batch": "plain"}, {"accumulation": 1}):
        check_batch_norms(method, four.model_copy(update=accepted), 256)
    with pytest.raises(EngineError, match="batch_size=7 into micro-batches of one image"):
        check_batch_norms(method, four.model_copy(update={"micro_batchnorm": True}), 7)
    freeze(method.encoder)
    check_batch_norms(method, four, 256)


OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
LEGACY = {"zero_optimization": {"cpu_offload": True}}
WIDE = {"data_types": {"grad_accum_dtype": "float"}}


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"reduce_once": False, "zero_stage": 2, "deepspeed": OFFLOAD}, "=2 .*reduce_once=false"),
        ({"reduce_once": False, "zero_stage": 3, "deepspeed": LEGACY}, "=3 .*reduce_once=false"),
        ({"precision": "bf16", "zero_stage": 1, "deepspeed": WIDE}, "='float': use .*zero_stage=2"),
    ],
)
def test_gradients_that_deepspeed_would_lose_are_refused(given, sentence):
    with launch.session("cpu"), pytest.raises(EngineError, match=sentence):
        state_worker.engine("simclr", "vit_tiny_patch16_224", 8, **FOUR, **given)
    check_deepspeed(EngineConfig(**{**given, "zero_stage": 3, "reduce_once": True}))
