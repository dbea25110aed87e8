"""Groups by name, frozen groups and clips: at every ZeRO stage the steps of a plain torch loop."""

import pytest
import torch
from torch.nn.utils import clip_grad_norm_, get_total_norm

from fastssl.engine.layerwise import LAMB, LARS
from tests.ranks import run_ranks

from .clip_worker import (
    CLIPS,
    OPTIMIZERS,
    PER_EPOCH,
    RUNS,
    STEPS,
    WORLD,
    Tiny,
    data,
    rate,
    worker,
)

# What clip_worker.RULES come to: learning rate, decay (None: the optimizer's own) and adaptation.
WANTED = {
    "body.0.weight": (0.5, None, True),
    "body.0.bias": (0.5, 0.2, False),
    "body.1.weight": (1.0, 0.0, False),
    "body.1.bias": (1.0, 0.2, False),
    "head.weight": (1.0, 0.5, True),
    "head.bias": (1.0, 0.2, False),
    "scale": (1.0, None, True),
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    return run_ranks(worker, WORLD, str(tmp_path_factory.mktemp("clips")))


def stepper(name: str, named: dict[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Each parameter a group of its own."""
    options, groups = dict(OPTIMIZERS[name]), []
    decay = options.pop("weight_decay")
    del options["name"]
    for n, (scale, own, adapt) in WANTED.items():
        group = {"weight_decay": decay if own is None else own, "params": [named[n]]}
        groups.append({**group, "scale": scale, "adapt": adapt})
    if name == "momentum":
        return torch.optim.SGD(groups, momentum=0.9, **options)
    return {"adamw": torch.optim.AdamW, "lars": LARS, "lamb": LAMB}[name](groups, **options)


def in_one_process(name: str, variant: str) -> tuple[dict, list[float]]:
    """The same training without DeepSpeed; in bf16 the ranks' gradients meet as it lets them."""
    half = torch.bfloat16 if variant.startswith("bf16") else torch.float32
    model, whole = Tiny().to(half), Tiny()
    whole.load_state_dict(model.state_dict())
    named = {n: p for n, p in whole.named_parameters() if p.requires_grad}
    optimizer, norms = stepper(name, named), []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate(name, step) * group["scale"]

        total = {n: torch.zeros(p.shape, dtype=half) for n, p in named.items()}
        for rank in range(WORLD):
            model.zero_grad()
            model(data(rank, step))["loss"].backward()
            for n, p in model.named_parameters():
                if n in total:
                    total[n] += p.grad / WORLD
        for n, p in named.items():
            p.grad = total[n].float()
        if step < PER_EPOCH:
            named["head.weight"].grad = None
        there = [p.grad for p in named.values() if p.grad is not None]
        norms.append(get_total_norm(there).item())
        for p in named.values():
            clip_grad_norm_([p], CLIPS["clip_each"])
        clip_grad_norm_([p for n, p in named.items() if n.startswith("body")], 0.02)
        clip_grad_norm_(named.values(), CLIPS["clip"])
        optimizer.step()
        model.load_state_dict(whole.state_dict())
    return {n: p.detach() for n, p in named.items()}, norms


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_two_ranks_step_like_a_plain_loop(ranks, run):
    wanted, norms = in_one_process(run[0], run[2])
    for rank in ranks:
        masters, theirs = rank[run]
        for n, p in wanted.items():
            torch.testing.assert_close(masters[n], p, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(theirs, norms, rtol=1e-5, atol=0)
    start = {n: p for n, p in Tiny().named_parameters() if p.requires_grad}
    assert all((wanted[n] - p).abs().max() > 2e-3 for n, p in start.items())


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_a_run_resumed_before_the_thaw_ends_on_the_same_bits(ranks, run):
    for rank in ranks:
        again = rank[(*run, "resumed")]
        assert all(torch.equal(again[n], p) for n, p in rank[run][0].items())


@pytest.mark.parametrize("stage", [0, 2])
def test_where_nothing_is_clipped_the_norm_is_without_frozen_groups_too(ranks, stage):
    model = Tiny()
    for rank in range(WORLD):
        (model(data(rank, 0))["loss"] / WORLD).backward()
    moving = [p.grad for n, p in model.named_parameters() if "head" not in n and p.requires_grad]
    wanted = get_total_norm([grad for grad in moving if grad is not None]).item()
    assert ranks[0]["frozen alone", stage] == pytest.approx([wanted], rel=1e-5)
