"""LARS and LAMB: timm's steps on whole tensors, and the same steps under every ZeRO stage."""

import copy

import pytest
import timm.optim
import torch
from torch import nn

from fastssl.engine.layerwise import LAMB, LARS
from tests.ranks import run_ranks

from .zero_worker import (
    BATCH,
    CONFIGS,
    FAULTY,
    RUNS,
    STEPS,
    WORLD,
    Model,
    data,
    dtype_of,
    loss_of,
    optimizer_of,
    rate,
    worker,
)

RIVALS = {
    "lars": (
        lambda groups: LARS(groups, 2.0, momentum=0.8, trust_coefficient=0.02),
        lambda groups: timm.optim.Lars(groups, 2.0, momentum=0.8, trust_coeff=0.02),
    ),
    "lamb": (
        lambda groups: LAMB(groups, 0.1, betas=(0.8, 0.95)),
        lambda groups: timm.optim.Lamb(groups, 0.1, betas=(0.8, 0.95), max_grad_norm=None),
    ),
}


@pytest.mark.parametrize("name", RIVALS)
def test_steps_are_timms(name):
    """timm adapts where weight decay is not 0; ours where adapt is True and there are 2 dims."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 3), (4, 2, 3, 3), (7,), (6, 1)]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    start[1] = start[1].contiguous(memory_format=torch.channels_last)
    models = [[nn.Parameter(t.clone()) for t in start] for _ in range(2)]
    optimizers = [
        make(
            [
                {"params": params[:2], "weight_decay": 0.1},
                {"params": params[2:], "weight_decay": 0.0, "adapt": False},
            ]
        )
        for make, params in zip(RIVALS[name], models, strict=True)
    ]
    for step in range(6):
        for ours, theirs in zip(*models, strict=True):
            grad = torch.randn(ours.shape, generator=generator)
            ours.grad, theirs.grad = grad.clone(), grad.clone()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] *= 0.9
            optimizer.step()
        for ours, theirs, first in zip(*models, start, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-6)
            assert step < 5 or (ours - first).abs().max() > 0.01


@pytest.mark.parametrize("name", RIVALS)
def test_one_dimension_is_exempt_whatever_its_group(name):
    moved = []
    for adapt in (True, False):
        p = nn.Parameter(torch.linspace(1, 2, 5))
        p.grad = torch.full_like(p, 3.0)
        RIVALS[name][0]([{"params": [p], "adapt": adapt}]).step()
        moved.append(p.detach())
    assert torch.equal(*moved)


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("zero", ["parameter", "gradient"])
def test_ratio_is_one_where_a_norm_is_zero(name, zero):
    p = nn.Parameter(torch.zeros(2, 3) if zero == "parameter" else torch.ones(2, 3))
    p.grad = torch.zeros(2, 3) if zero == "gradient" else torch.ones(2, 3)
    RIVALS[name][0]([p]).step()
    expected = {"parameter": -2.0 if name == "lars" else -0.1, "gradient": 1.0}[zero]
    torch.testing.assert_close(p.detach(), torch.full((2, 3), expected))


@pytest.mark.parametrize("name", RIVALS)
def test_state_survives_a_checkpoint(name):
    def train(params, optimizer, steps):
        for step in steps:
            for p in params:
                p.grad = torch.sin(p.detach() * (step + 1))
            optimizer.step()

    params = [nn.Parameter(torch.linspace(1, 2, 6).view(2, 3)), nn.Parameter(torch.ones(4))]
    optimizer = RIVALS[name][0](params)
    train(params, optimizer, range(2))
    copies = copy.deepcopy(params)
    second = RIVALS[name][0](copies)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(params, optimizer, range(2, 4))
    train(copies, second, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(params, copies, strict=True))


def test_gradients_are_left_alone_and_missing_ones_skipped():
    used, unused = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))
    used.grad = torch.full((2, 3), 0.5)
    loss = LARS([used, unused], 1.0, weight_decay=0.1).step(lambda: torch.tensor(3.0))
    assert loss == 3.0
    assert torch.equal(used.grad, torch.full((2, 3), 0.5)) and not torch.equal(used, unused)
    assert torch.equal(unused, torch.ones(2, 3))


@pytest.mark.parametrize("name", RIVALS)
def test_no_step_reads_a_value_on_the_host(name):
    """Meta tensors have no values: whatever waits for one on a GPU fails here."""
    p = nn.Parameter(torch.empty(2, 3, device="meta"))
    optimizer = RIVALS[name][0]([p])
    for _ in range(2):
        p.grad = torch.empty(2, 3, device="meta")
        optimizer.step()


def test_a_flat_tensor_nobody_bound_is_refused():
    optimizer = LAMB([nn.Parameter(torch.ones(2, 3))], 0.1)
    flat = torch.ones(6, requires_grad=True)
    flat.grad = torch.ones(6)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match="6 elements: call bind_fragments"):
        optimizer.step()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: LARS(p, -1.0), "lr must be >= 0, got -1"),
        (lambda p: LARS(p, 1.0, momentum=-0.1), "momentum must be >= 0, got -0.1"),
        (lambda p: LARS(p, 1.0, trust_coefficient=-1), "trust_coefficient must be >= 0, got -1"),
        (lambda p: LAMB(p, 1.0, eps=-1e-6), "eps must be >= 0, got -1e-06"),
        (lambda p: LAMB(p, 1.0, betas=(0.9, 1.0)), "betas must lie in"),
    ],
)
def test_impossible_options_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make([nn.Parameter(torch.ones(2, 2))])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    return run_ranks(worker, WORLD, str(tmp_path_factory.mktemp("zero")))


def in_one_process(name: str, variant: str) -> dict[str, torch.Tensor]:
    """The same training without DeepSpeed: float32 masters, the batch joined.

    In bf16 the ranks' gradients meet as DeepSpeed lets them: halved and added in bf16.
    """
    cfg, dtype, masters = CONFIGS[name], dtype_of(variant), Model()
    model = Model().to(dtype)
    masters.load_state_dict(model.state_dict())
    optimizer = optimizer_of(masters, name, variant)
    params = list(zip(model.parameters(), masters.parameters(), strict=True))
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate(cfg, step)
        total = [torch.zeros_like(p) for p, _ in params]
        for rank in range(WORLD):
            model.zero_grad()
            loss_of(model(data(rank, step, dtype))).backward()
            for part, (p, _) in zip(total, params, strict=True):
                part += p.grad / WORLD if p.grad is not None else 0
        for part, (_, master) in zip(total, params, strict=True):
            master.grad = part.float() if master.requires_grad else None
        optimizer.step()
        model.load_state_dict(masters.state_dict())
    return {n: p.detach() for n, p in masters.named_parameters() if p.requires_grad}


def farthest(ours: dict, theirs: dict) -> float:
    """The greatest difference, relative where values exceed 1."""
    assert ours.keys() == theirs.keys()
    gaps = [(ours[n] - theirs[n]).abs() / theirs[n].abs().clamp(min=1) for n in ours]
    return max(gap.max().item() for gap in gaps)


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_two_ranks_step_like_one_process(ranks, run):
    name, _, variant = run
    expected = in_one_process(name, variant)
    assert farthest(ranks[0][run], expected) < 1e-6
    assert farthest(ranks[0][run], ranks[1][run]) == 0.0
    start = {n: p.detach() for n, p in Model().named_parameters() if p.requires_grad}
    assert all((expected[n] - start[n]).abs().max() > 0.01 for n in start)


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_a_resumed_run_ends_on_the_same_bits(ranks, run):
    assert farthest(ranks[0][run], ranks[0][(*run, "resumed")]) == 0.0


@pytest.mark.parametrize("run", FAULTY, ids=str)
def test_norms_of_pieces_would_be_another_step(ranks, run):
    """The fault that layerwise.py is about is one that the tests above would see."""
    name, _, variant = run
    assert farthest(ranks[0][(*run, "pieces")], in_one_process(name, variant)) > 1e-4


def test_the_joined_batch_has_the_mean_gradient():
    """The oracle's own premise: halves of the ranks' gradients are the joined batch's."""
    model = Model()
    loss_of(model(torch.cat([data(rank, 0, torch.float32) for rank in range(WORLD)]))).backward()
    joined = model.first.weight.grad.clone()
    model.zero_grad()
    for rank in range(WORLD):
        x = data(rank, 0, torch.float32)
        assert x.shape == (BATCH, 7)
        (loss_of(model(x)) / WORLD).backward()
    torch.testing.assert_close(model.first.weight.grad, joined)
