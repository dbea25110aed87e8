"""The gradient of a whole batch by micro-batches: what is drawn and what is remembered, once."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastssl.engine import launch
from fastssl.engine.config import EngineConfig, EngineError
from fastssl.engine.large_batch import LargeBatch, check_batch_norms, check_deepspeed
from fastssl.methods import METHODS, SimCLR, build_method
from fastssl.methods.base import PARAMETERS
from fastssl.models import build_backbone, freeze
from fastssl.tree import cut, join, leaves, map_leaves
from tests.engine import state_worker
from tests.runs import METHODS as OPTIONS
from tests.runs import VIT, tiny

COUPLING = [name for name in OPTIONS if METHODS[name].couples_batch]
DROPS = {**VIT, "drop_path_rate": 0.3, "proj_drop_rate": 0.1}
OF_ONE = {"clip": (1,)}  # the others compare two views
SIZES = [3, 3, 2]
FOUR: dict[str, Any] = {"accumulation": 4}


def build(name, encoder="vit_tiny_patch16_224", side=16, kwargs=VIT):
    torch.manual_seed(0)
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


class Bright(SimCLR):
    """It weighs the loss by how bright the first view is."""

    def loss(self, encoded: list[Tensor], batch) -> dict[str, Tensor]:
        return {"loss": super().loss(encoded, batch)["loss"] * batch["views"][0].mean()}


def test_a_loss_that_reads_pixels_says_so(monkeypatch):
    method, data = build("simclr"), batch()
    data["views"] = map_leaves(torch.abs, data["views"])
    method.__class__ = Bright
    with pytest.raises(EngineError, match=r"Bright.loss reads the values of batch\['views'\]"):
        by_micro_batches(method, data)
    monkeypatch.setattr(Bright, "loss_reads_views", True)
    (_, grad, _, _), again = both(method, data)
    assert (again[1] - grad).norm() < 1e-6 * grad.norm()


def test_batch_norms_of_micro_batches_are_to_be_accepted():
    method, four = (
        build("simclr", "test_resnet", 32, {}),
        EngineConfig(**FOUR),
    )
    with pytest.raises(EngineError, match="the [0-9]+ batch norms of the encoder would .*=256 im"):
        check_batch_norms(method, four, 256)
    for accepted in ({"micro_batchnorm": True}, {"large_batch": "plain"}, {"accumulation": 1}):
        check_batch_norms(method, four.model_copy(update=accepted), 256)
    freeze(method.encoder)
    assert isinstance(method.head, nn.Module)
    check_batch_norms(method, four, 256)


OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
WIDE = {"data_types": {"grad_accum_dtype": "fp32"}}


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"reduce_once": False, "zero_stage": 2, "deepspeed": OFFLOAD}, "=2 .*reduce_once=false"),
        ({"precision": "bf16", "zero_stage": 1, "deepspeed": WIDE}, "='fp32': use .*zero_stage=2"),
    ],
)
def test_gradients_that_deepspeed_would_lose_are_refused(given, sentence):
    with launch.session("cpu"), pytest.raises(EngineError, match=sentence):
        state_worker.engine("simclr", "vit_tiny_patch16_224", 8, **FOUR, **given)
    check_deepspeed(EngineConfig(**{**given, "zero_stage": 3, "reduce_once": True}))
