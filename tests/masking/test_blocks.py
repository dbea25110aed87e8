"""Hidden blocks and I-JEPA's context and targets, against the same draws read in plain Python."""

import math

import pytest
import torch

from fastssl.masking import block_masking, multi_block_masking
from fastssl.masking.places import words
from tests.oracle import DEVICE

from .generators import marked, shown


def seeds(n):
    return torch.arange(n, device=DEVICE)


def draw(word, bound):
    """A whole number below `bound` from the high half of a word."""
    return ((word >> 32) % 2**32) * bound // 2**32


def ratios(low, high):
    """The middle of each of 256 equal steps of the logarithm."""
    return [low * (high / low) ** ((i + 0.5) / 256) for i in range(256)]


def rectangle(top, left, h, w):
    return {(r, c) for r in range(top, top + h) for c in range(left, left + w)}


def reading(H, W, side):
    """All places, line by line from one of eight sides."""
    rows = range(H)[:: -1 if side & 1 else 1]
    columns = range(W)[:: -1 if side & 2 else 1]
    if side & 4:
        return [(r, c) for c in columns for r in rows]
    return [(r, c) for r in rows for c in columns]


def beit(seed, grid, hide, least, aspect, tries):
    """Algorithm 1 of the paper cut to `hide` places; None where it needs more tries."""
    H, W = grid
    word = words(torch.tensor([seed]), 4 * tries + 1, 3)[0].tolist()
    hidden = set()
    for i in range(tries):
        left = hide - len(hidden)
        area = least + draw(word[4 * i], max(left - least + 1, 1))
        ratio = ratios(*aspect)[draw(word[4 * i + 1], 256)]
        h = min(max(round(math.sqrt(area * ratio)), 1), H)
        w = min(max(round(math.sqrt(area / ratio)), 1), W)
        block = rectangle(draw(word[4 * i + 2], H - h + 1), draw(word[4 * i + 3], W - w + 1), h, w)
        new = [p for p in reading(H, W, draw(word[-1], 8)) if p in block - hidden]
        hidden |= set(new[:left])
        if len(hidden) == hide:
            return hidden
    return None


@pytest.mark.parametrize(
    "grid, keep, least, aspect",
    [((14, 14), 118, 16, (0.3, 1 / 0.3)), ((5, 9), 20, 3, (0.5, 2.0)), ((7, 4), 8, 2, (0.2, 1.0))],
)
def test_blocks_are_those_of_the_paper(grid, keep, least, aspect):
    H, W = grid
    made = ~shown(block_masking(seeds(60), grid, keep, least=least, aspect=aspect, tries=32))
    compared = 0
    for seed, row in enumerate(made.view(-1, H, W).cpu()):
        wanted = beit(seed, grid, H * W - keep, least, aspect, 32)
        if wanted is not None:
            assert {tuple(p) for p in row.nonzero().tolist()} == wanted
            compared += 1
    assert compared >= 50


def test_one_block_is_a_rectangle_anywhere():
    made = ~shown(block_masking(seeds(4000), (14, 14), 176, least=20, aspect=(0.8, 0.8)))
    made = made.view(-1, 14, 14)
    assert (made.any(2).sum(1) == 4).all() and (made.any(1).sum(1) == 5).all()
    top, left = made.any(2).int().argmax(1), made.any(1).int().argmax(1)
    for corner, sides in ((top, 11), (left, 10)):
        counts = torch.bincount(corner, minlength=sides)
        assert len(counts) == sides
        assert ((counts - 4000 / sides).abs() < 4.5 * (4000 / sides) ** 0.5).all()


def test_a_surplus_is_left_out_at_every_side_alike():
    """18 places of a 4 x 5 block: two neighbors are missing, at a corner, any of eight ways."""
    n = 8000
    made = ~shown(block_masking(seeds(n), (9, 9), 63, least=18, aspect=(0.8, 0.8), tries=1))
    made = made.view(n, 9, 9)
    top, left = made.any(2).int().argmax(1), made.any(1).int().argmax(1)
    rows = (top[:, None] + torch.arange(4, device=DEVICE))[:, :, None]
    columns = (left[:, None] + torch.arange(5, device=DEVICE))[:, None]
    block = made[torch.arange(n, device=DEVICE)[:, None, None], rows, columns]
    missing = (~block).flatten(1)
    assert (missing.sum(1) == 2).all() and (made.sum((1, 2)) == 18).all()
    kinds, counts = torch.unique(missing, dim=0, return_counts=True)
    assert len(kinds) == 8 and ((counts - n / 8).abs() < 4.5 * (n / 8) ** 0.5).all()


def test_too_few_tries_are_completed_at_random():
    made = ~shown(block_masking(seeds(500), (8, 8), 4, least=2, aspect=(1.0, 1.0), tries=1))
    assert (made.sum(1) == 60).all()
    assert (made.double().mean(0) > 0.5).all()


def ijepa(seed, grid, target, blocks, aspect):
    H, W = grid
    word = words(torch.tensor([seed]), 4 * blocks + 3, 5)[0].tolist()
    for i in range(blocks):
        ratio = ratios(*aspect)[draw(word[4 * i], 256)]
        h = max(1, round(math.sqrt(target * ratio)))
        w = math.ceil(target / h)
        corner = draw(word[4 * i + 1], H - h + 1), draw(word[4 * i + 2], W - w + 1)
        block = rectangle(*corner, h, w)
        side = draw(word[4 * i + 3], 8)
        yield {p for p in [q for q in reading(H, W, side) if q in block][:target]}


@pytest.mark.parametrize(
    "grid, context, target, blocks, aspect",
    [((14, 14), 60, 34, 4, (0.75, 1.5)), ((6, 8), 20, 7, 3, (0.5, 2.0))],
)
def test_targets_are_blocks_and_the_context_sees_none(grid, context, target, blocks, aspect):
    H, W = grid
    made = multi_block_masking(
        seeds(50), grid, context=context, target=target, blocks=blocks, aspect=aspect
    )
    for seed in range(50):
        wanted = list(ijepa(seed, grid, target, blocks, aspect))
        got = [{divmod(i, W) for i in ids} for ids in made.targets[seed].tolist()]
        assert got == wanted
        assert not {divmod(i, W) for i in made.context[seed].tolist()} & set.union(*wanted)


def test_the_context_is_a_block_while_it_lasts():
    """A context smaller than its block less the targets lies in a square of its scale."""
    made = multi_block_masking(
        seeds(300), (14, 14), context=9, target=4, blocks=2, context_scale=(0.3, 0.3)
    )
    place = marked(made.context, 196).view(-1, 14, 14)
    for axis in (1, 2):
        where = place.any(axis).int()
        extent = 14 - where.argmax(1) - where.flip(1).argmax(1)
        assert extent.max() == round(14 * math.sqrt(0.3))


def test_a_context_larger_than_its_block_is_completed_outside():
    made = multi_block_masking(
        seeds(50), (14, 14), context=188, target=4, blocks=2, context_scale=(0.3, 0.3)
    )
    targets = marked(made.targets, 196).any(1)
    assert not (targets & marked(made.context, 196)).any()


def test_context_scales_are_drawn():
    n = 400
    made = multi_block_masking(
        seeds(n), (20, 20), context=1, target=1, blocks=1, context_scale=(0.25, 1.0)
    )
    rate = marked(made.context, 400).double().view(n, 20, 20).mean(0)
    assert 0 < rate[0].sum() < rate[9].sum()  # the middle is in more blocks than the rim


REFUSED = {
    "all kept": (lambda s: block_masking(s, (4, 4), 16), "keep .* length = 15, got 16"),
    "one side": (lambda s: block_masking(s, (16,), 8), r"grid must be 2 sides .* got \(16,\)"),
    "an empty side": (lambda s: block_masking(s, (0, 4), 8), r"at least 1, got \(0, 4\)"),
    "no least": (lambda s: block_masking(s, (4, 4), 8, least=0), "least >= 1 .* got 0 and 0"),
    "no tries": (lambda s: block_masking(s, (4, 4), 8, tries=-1), "got 16 and -1"),
    "many tries": (lambda s: block_masking(s, (4, 4), 8, tries=128), r"0\.\.127, got 16 and 128"),
    "aspects": (lambda s: block_masking(s, (4, 4), 8, aspect=(2, 1)), r"low <= high, got \(2, 1\)"),
    "too much": (
        lambda s: multi_block_masking(s, (4, 4), context=9, target=2),
        r"at most 16 places, got 9 \+ 4 x 2",
    ),
    "no target": (lambda s: multi_block_masking(s, (4, 4), context=9, target=0), "got 9"),
    "no room": (
        lambda s: multi_block_masking(s, (2, 12), context=2, target=9, blocks=1),
        "target=9 .* does not fit the grid 2 x 12",
    ),
    "scales": (
        lambda s: multi_block_masking(s, (4, 4), context=2, target=1, context_scale=(0.5, 1.1)),
        r"context_scale .* got \(0.5, 1.1\)",
    ),
}


@pytest.mark.parametrize("call, words", REFUSED.values(), ids=REFUSED)
def test_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.zeros(2, dtype=torch.int64))
