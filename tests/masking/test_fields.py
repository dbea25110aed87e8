import heapq

import numpy as np
import pytest
import torch

from fastssl.masking import connected_masking, noise_masking, random_masking
from fastssl.masking.places import words
from tests.oracle import DEVICE

from .generators import shown


def seeds(n):
    return torch.arange(n, device=DEVICE)


def blurred(field, passes):
    """Weights 1/4, 1/2, 1/4 on a ring multiply a frequency f by cos(pi f)^2."""
    for axis in range(1, field.ndim):
        shape = [-1 if d == axis else 1 for d in range(field.ndim)]
        f = np.fft.fftfreq(field.shape[axis]).reshape(shape)
        spectrum = np.fft.fft(field, axis=axis) * np.cos(np.pi * f) ** (2 * passes)
        field = np.fft.ifft(spectrum, axis=axis).real
    return field


@pytest.mark.parametrize("grid, few, many", [((40,), 3, 12), ((9, 7), 2, 8), ((4, 5, 6), 1, 5)])
@pytest.mark.parametrize("band", ["low", "high", "band", "stop"])
def test_noise_is_filtered_as_stated(grid, few, many, band):
    L = int(np.prod(grid))
    white = (words(seeds(30), L, 12) >> 48).double().cpu().numpy().reshape(30, *grid)
    fine, coarse = blurred(white, few), blurred(white, many)
    filtered = {
        "low": coarse,
        "high": white - fine,
        "band": fine - coarse,
        "stop": white - (fine - coarse),
    }[band]
    order = np.sort(filtered.reshape(30, L), 1)
    assert (order[:, L - 9] - order[:, L - 10] > 1e-6).all()  # no tie at the ninth
    highest = filtered.reshape(30, L) >= order[:, [L - 9]]
    assert (shown(noise_masking(seeds(30), grid, 9, band)).cpu().numpy() == highest).all()


def alike(made, H, W):
    """How often two neighbors are both visible, relative to what chance gives."""
    x = made.view(-1, H, W).double()
    pairs = (x[:, 1:] * x[:, :-1]).mean() / 2 + (x[..., 1:] * x[..., :-1]).mean() / 2
    return (pairs / x.mean() ** 2).item()


def test_low_bands_clump_and_high_ones_spread():
    rate = {
        band: alike(shown(noise_masking(seeds(400), (14, 14), 49, band)), 14, 14)
        for band in ("low", "band", "stop", "high")
    }
    chance = alike(shown(random_masking(seeds(400), 196, 49)), 14, 14)
    assert rate["high"] < 0.85 * chance < chance < 1.5 * chance < rate["band"] < rate["low"]
    assert chance == pytest.approx(1, abs=0.05)


def test_green_masks_have_a_band_of_frequencies():
    """Their spectrum peaks between those of red and of blue noise."""
    frequency = torch.hypot(*torch.meshgrid(*[torch.fft.fftfreq(28).abs()] * 2, indexing="ij"))
    center = {}
    for band in ("red", "green", "blue"):
        made = shown(noise_masking(seeds(100), (28, 28), 196, band)).cpu().double()
        power = torch.fft.fft2(made.view(-1, 28, 28) - 0.25).abs().square().mean(0)
        center[band] = float((power * frequency).sum() / power.sum())
    assert center["red"] < 0.8 * center["green"] < 0.64 * center["blue"]


def test_colors_are_names_of_bands():
    for color, band in (("red", "low"), ("blue", "high"), ("green", "band"), ("purple", "stop")):
        a, b = (noise_masking(seeds(3), (6, 6), 9, x).visible for x in (color, band))
        assert torch.equal(a, b)


def grown(seed, grid, hide, groups):
    """First-passage growth by Dijkstra's algorithm."""
    L = grid[0] * grid[1]
    starts = words(torch.tensor([seed]), L, 13)[0].argsort()[:groups].tolist()
    cost = ((words(torch.tensor([seed]), L, 14)[0] >> 48) % 2**16 + 1).tolist()
    queue, reached = [(0, place) for place in starts], {}
    while queue:
        time, place = heapq.heappop(queue)
        if place in reached:
            continue
        reached[place] = time
        row, column = divmod(place, grid[1])
        for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            if 0 <= r < grid[0] and 0 <= c < grid[1]:
                heapq.heappush(queue, (time + cost[r * grid[1] + c], r * grid[1] + c))
    return set(sorted(reached, key=reached.__getitem__)[:hide])


@pytest.mark.parametrize("grid, hide, groups", [((6, 8), 30, 3), ((9, 5), 12, 1), ((7, 7), 9, 9)])
def test_groups_grow_as_stated(grid, hide, groups):
    keep = grid[0] * grid[1] - hide
    made = connected_masking(seeds(40), grid, keep, groups=groups)
    for seed, masked in enumerate(made.masked.tolist()):
        assert set(masked) == grown(seed, grid, hide, groups)


def components(places, grid):
    """How many sets of places joined by sides."""
    todo, found = {tuple(p) for p in places}, 0
    while todo:
        found, stack = found + 1, [todo.pop()]
        while stack:
            place = stack.pop()
            for axis in range(len(grid)):
                for step in (-1, 1):
                    near = (*place[:axis], place[axis] + step, *place[axis + 1 :])
                    if near in todo:
                        todo.remove(near)
                        stack.append(near)
    return found


@pytest.mark.parametrize(
    "grid, hide, groups",
    [((14, 14), 20, 4), ((4, 6, 6), 20, 3), ((50,), 10, 5), ((14, 14), 137, 4)],
)
def test_groups_are_connected(grid, hide, groups):
    keep = int(np.prod(grid)) - hide
    hidden = ~shown(connected_masking(seeds(60), grid, keep, groups=groups))
    found = [components(x.nonzero().tolist(), grid) for x in hidden.view(60, *grid).cpu()]
    assert max(found) <= groups and min(found) >= 1
    assert max(found) == groups or hide > 100  # large ones meet


REFUSED = {
    "all kept": (lambda s: connected_masking(s, (4, 4), 16), "keep .* 15, got 16"),
    "no groups": (lambda s: connected_masking(s, (4, 4), 8, groups=0), "1 and 8 hidden .* got 0"),
    "more groups": (lambda s: connected_masking(s, (4, 4), 8, groups=9), "got 9"),
    "no keep": (lambda s: noise_masking(s, (4, 4), 0), "keep .* 16, got 0"),
    "four sides": (lambda s: noise_masking(s, (2, 2, 2, 2), 4), "1 to 3 sides"),
    "a band": (lambda s: noise_masking(s, (4, 4), 4, "pink"), "got .* and 'pink'"),
}


@pytest.mark.parametrize("call, words", REFUSED.values(), ids=REFUSED)
def test_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.zeros(2, dtype=torch.int64))
