"""The plan against what a real step keeps."""

import pytest
import torch

from fastssl.diagnose import plan as plans
from fastssl.diagnose.plan import make_plan
from fastssl.methods.base import PARAMETERS
from fastssl.run.build import build
from fastssl.run.summary import peak_memory
from tests.runs import tiny


@pytest.mark.parametrize(
    "method", ["simclr", "mocov3", "nnclr", "clip", "sie", "mae", "gmml", "cropmae", "data2vec"]
)
def test_activations_are_what_autograd_keeps(method, tmp_path):
    depth = {} if method == "data2vec" else {"model__kwargs__depth": 1}  # it averages two layers
    cfg = tiny(method, tmp_path, batch_size=64, **depth)
    plan = make_plan(cfg, channels=1, world=2)
    real, kept = build(cfg, 1), {}
    own = {p.untyped_storage().data_ptr() for p in real.parameters()}
    alive = []

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(x)
        return x

    views = [torch.randn(32, 1, 16, 16) for _ in cfg.views().crops]
    each = torch.arange(32)
    batch = {"views": views, "index": each, "seeds": each, "label": each % 10}
    batch["params"] = [torch.ones(32, len(PARAMETERS)) for _ in views]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        real(batch)["loss"]
    assert plan.parameters == sum(p.numel() for p in real.parameters())
    assert plan.activations == pytest.approx(sum(kept.values()), rel=0.05)


@pytest.fixture
def without_a_pass(monkeypatch):
    """No activations are measured, which is most of a plan's time."""
    monkeypatch.setattr(plans, "_activations", lambda *_: 12345)


def test_zero_divides_what_it_shards(tmp_path, without_a_pass):
    """Bytes a parameter at 4 ranks, AdamW: ZeRO's own table (arXiv:1910.02054, figure 1)."""
    want = {
        ("bf16", 0): (2, 2, 12),
        ("bf16", 1): (2, 2, 3),
        ("bf16", 2): (2, 0.5, 3),
        ("bf16", 3): (0.5, 0.5, 3),
        ("fp32", 0): (4, 4, 8),
    }
    for (precision, stage), bytes_each in want.items():
        cfg = tiny("mae", tmp_path, engine__zero_stage=stage, engine__precision=precision)
        plan = make_plan(cfg, channels=1, world=4)
        got = [b / plan.parameters for b in (plan.weights, plan.gradients, plan.optimizer)]
        assert got == pytest.approx(bytes_each, rel=1e-3), (precision, stage)
        parts = (plan.weights, plan.gradients, plan.optimizer, plan.activations, plan.process)
        assert plan.total == sum(parts)


# fault 24
def test_the_total_is_within_a_factor_of_two_of_the_peak(tmp_path):
    plan = make_plan(tiny("mae", tmp_path), channels=1, world=1)
    assert plan.total / 2 < peak_memory() < 2 * plan.total


def test_a_teacher_has_no_gradient_and_in_16_bits_a_float32_mean(tmp_path, without_a_pass):
    for precision, stage, teachers in (("fp32", 0, 4), ("bf16", 0, 6), ("bf16", 3, 1.5)):
        changes = {"engine__zero_stage": stage, "engine__precision": precision}
        plan = make_plan(tiny("mocov3", tmp_path, **changes), 1, 4)
        trained = sum(p.numel() for p in build(tiny("mocov3", tmp_path), 1).student.parameters())
        own = plan.parameters - trained
        student = {("fp32", 0): (4, 4, 8), ("bf16", 0): (2, 2, 12), ("bf16", 3): (0.5, 0.5, 3)}
        weights, gradients, optimizer = student[precision, stage]
        assert plan.weights == pytest.approx(weights * own + teachers * trained, rel=1e-3)
        got = [plan.gradients / own, plan.optimizer / own]
        assert got == pytest.approx([gradients, optimizer], rel=1e-3)


def test_activation_checkpointing_and_accumulation_show(tmp_path):
    plain, lean, split, exact = (
        make_plan(tiny("simclr", tmp_path, **changes), 1, 1).activations
        for changes in (
            {},
            {"engine__activation_checkpointing": True},
            {"engine__accumulation": 4, "engine__large_batch": "plain"},
            {"engine__accumulation": 4},
        )
    )
    assert lean < 0.6 * plain and split == pytest.approx(plain / 4, rel=0.05)
    assert split < exact < 0.6 * plain
