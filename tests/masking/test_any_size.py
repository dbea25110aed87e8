"""Counts stay exact, and places distinct, for grids and shares of any size."""

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastssl import masking as m
from tests.covering import examples

from .generators import marked, shown

SIDE = st.integers(1, 7)
SEEDS = st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=3).map(torch.tensor)


def partition(mask, length, keep):
    """Every place once, `keep` of them visible."""
    order = torch.cat([mask.visible, mask.masked], 1)
    assert mask.visible.shape[1] == keep
    assert torch.equal(order.sort(1).values, torch.arange(length).expand_as(order))
    assert torch.equal(order.gather(1, mask.restore), torch.arange(length).expand_as(order))


@settings(max_examples=examples(25))
@given(seeds=SEEDS, grid=st.tuples(SIDE, SIDE), share=st.floats(0, 1), least=st.integers(1, 60))
def test_blocks(seeds, grid, share, least):
    L = grid[0] * grid[1]
    assume(L > 1)
    keep = 1 + int(share * (L - 2))
    partition(m.block_masking(seeds, grid, keep, least=least, tries=5), L, keep)


@settings(max_examples=examples(25))
@given(
    seeds=SEEDS,
    grid=st.tuples(SIDE, SIDE),
    target=st.integers(1, 9),
    blocks=st.integers(1, 4),
    share=st.floats(0, 1),
)
def test_multi_blocks(seeds, grid, target, blocks, share):
    L = grid[0] * grid[1]
    room = L - blocks * target
    assume(room > 0 and min(grid) ** 2 >= 4 * target)
    context = 1 + int(share * (room - 1))
    made = m.multi_block_masking(seeds, grid, context=context, target=target, blocks=blocks)
    asked, seen = marked(made.targets, L), marked(made.context, L)
    assert (asked.sum(-1) == target).all() and (seen.sum(-1) == context).all()
    assert not (asked.any(1) & seen).any()


@settings(max_examples=examples(25))
@given(
    seeds=SEEDS,
    grid=st.lists(SIDE, min_size=1, max_size=3),
    share=st.floats(0, 1),
    groups=st.integers(1, 6),
)
def test_fields(seeds, grid, share, groups):
    L = int(torch.tensor(grid).prod())
    assume(L > 1)
    keep = 1 + int(share * (L - 2))
    grown = m.connected_masking(seeds, grid, keep, groups=min(groups, L - keep))
    for made in (grown, m.noise_masking(seeds, grid, keep, "green")):
        partition(made, L, keep)


@settings(max_examples=examples(25))
@given(seeds=SEEDS, grid=st.tuples(SIDE, SIDE, SIDE), a=st.floats(0, 1), b=st.floats(0, 1))
def test_clips(seeds, grid, a, b):
    T, frame = grid[0], grid[1] * grid[2]
    assume(frame > 1)
    per_frame = 1 + int(a * (frame - 2))
    hidden = T * (frame - per_frame)
    decode = 1 + int(b * (hidden - 1))
    made = m.dual_masking(seeds, grid, per_frame, decode)
    partition(made.masking, T * frame, T * per_frame)
    decoded = marked(made.decoded, T * frame)
    assert (decoded.sum(1) == decode).all() and not (decoded & shown(made.masking)).any()


@settings(max_examples=examples(25))
@given(seeds=SEEDS, grid=st.tuples(SIDE, SIDE), a=st.floats(0, 1), b=st.floats(0, 1))
def test_times_and_bands(seeds, grid, a, b):
    F, S = grid
    times, bands = int(a * (S - 1)), int(b * (F - 1))
    assume(times + bands)
    made = m.time_frequency_masking(seeds, grid, times, bands)
    partition(made, F * S, (F - bands) * (S - times))
