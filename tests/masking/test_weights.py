"""Weighted, regular, column and unit masks."""

from itertools import permutations

import pytest
import torch

from fastssl.masking import (
    column_masking,
    grid_masking,
    random_masking,
    unit_masking,
    weighted_masking,
)
from tests.oracle import DEVICE

from .generators import shown


def seeds(n):
    return torch.arange(n, device=DEVICE)


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_places_are_drawn_in_proportion_without_replacement(keep, dtype):
    w, n = [0.5, 1.0, 2.0, 4.0], 12000
    weights = torch.tensor(w, dtype=dtype, device=DEVICE).expand(n, 4)
    rate = shown(weighted_masking(seeds(n), weights, keep)).double().mean(0)
    law = [0.0] * 4
    for order in permutations(range(4), keep):
        p, left = 1.0, sum(w)
        for place in order:
            p, left = p * w[place] / left, left - w[place]
        for place in order:
            law[place] += p
    for got, p in zip(rate.tolist(), law, strict=True):
        assert abs(got - p) < 4.5 * (p * (1 - p) / n) ** 0.5


def test_places_without_weight_come_last_and_at_random():
    n = 4000
    weights = torch.tensor([0.0, 3.0, 0.0, 1e-30, 0.0], device=DEVICE).expand(n, 5)
    made = shown(weighted_masking(seeds(n), weights, 3))
    assert made[:, [1, 3]].all()
    assert ((made[:, [0, 2, 4]].double().mean(0) - 1 / 3).abs() < 4.5 * (2 / 9 / n) ** 0.5).all()


def test_each_sample_has_weights_of_its_own():
    weights = torch.eye(6, device=DEVICE)
    assert weighted_masking(seeds(6), weights, 1).visible.flatten().tolist() == list(range(6))


@pytest.mark.parametrize(
    "grid, every, keep", [((6, 8), 2, 12), ((4, 4, 6), (2, 1, 3), 16), ((10,), 5, 2)]
)
def test_grids_are_regular_from_any_phase(grid, every, keep):
    n = 3000
    made = grid_masking(seeds(n), grid, every)
    assert made.visible.shape == (n, keep)
    steps = (every,) * len(grid) if isinstance(every, int) else every
    view = shown(made).view(n, *grid)
    phases = []
    for axis, (side, step) in enumerate(zip(grid, steps, strict=True)):
        others = [d + 1 for d in range(len(grid)) if d != axis]
        lines = view.any(others) if others else view
        phase = lines.int().argmax(1)
        wanted = torch.arange(side, device=DEVICE) % step == phase[:, None]
        assert torch.equal(lines, wanted)
        phases.append(phase)
    kinds, counts = torch.unique(torch.stack(phases, 1), dim=0, return_counts=True)
    share = n / len(kinds)
    assert len(kinds) == torch.tensor(steps).prod()
    assert ((counts - share).abs() < 4.5 * share**0.5).all()


def test_columns_are_places():
    a, b = column_masking(seeds(9), 11, 4), random_masking(seeds(9), 11, 4)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("grid, unit", [((6, 8), 2), ((9,), 3), ((4, 4, 8), 4), ((5, 3), 1)])
def test_units_are_whole(grid, unit):
    dims, coarse = len(grid), [side // unit for side in grid]
    units = int(torch.tensor(coarse).prod())
    made = shown(unit_masking(seeds(20), grid, unit, max(units // 2, 1)))
    split = made.view(-1, *[n for side in coarse for n in (side, unit)])
    split = split.permute(0, *range(1, 2 * dims, 2), *range(2, 2 * dims + 1, 2)).flatten(dims + 1)
    assert torch.equal(split.all(-1), split.any(-1))
    wanted = shown(random_masking(seeds(20), units, max(units // 2, 1)))
    assert torch.equal(split.all(-1).flatten(1), wanted)


S, W = torch.zeros(2, dtype=torch.int64), torch.ones(2, 4)
REFUSED = {
    "other weights": (lambda: weighted_masking(S, W[:1], 2), r"weights must be \(2, L\) float"),
    "whole weights": (lambda: weighted_masking(S, W.long(), 2), "got .* torch.int64"),
    "negative weights": (lambda: weighted_masking(S, -W, 2), ">= 0 and finite"),
    "weights that are no number": (lambda: weighted_masking(S, W * torch.nan, 2), "finite"),
    "infinite weights": (lambda: weighted_masking(S, W * torch.inf, 2), "finite"),
    "too many": (lambda: weighted_masking(S, W, 5), "length = 4, got 5"),
    "a step that does not divide": (lambda: grid_masking(S, (4, 6), 4), "every .* got 4"),
    "no step": (lambda: grid_masking(S, (4, 6), (1, 1)), r"hide something, got \(1, 1\)"),
    "steps of other sides": (lambda: grid_masking(S, (4, 6), (2,)), r"got \(2,\)"),
    "a step of 0": (lambda: grid_masking(S, (4, 6), 0), "got 0"),
    "a unit that does not divide": (lambda: unit_masking(S, (4, 6), 4, 1), r"\(4, 6\), got 4"),
    "an empty unit": (lambda: unit_masking(S, (4, 6), 0, 1), "got 0"),
    "more units": (lambda: unit_masking(S, (4, 6), 2, 7), "length = 6, got 7"),
    "no columns": (lambda: column_masking(S, 4, 0), "length = 4, got 0"),
}


@pytest.mark.parametrize("call, words", REFUSED.values(), ids=REFUSED)
def test_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call()
