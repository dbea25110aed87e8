import pytest
import torch

from fastssl.masking import dual_masking, random_masking, running_cell_masking, tube_masking
from tests.oracle import DEVICE

from .generators import marked, shown


def seeds(n):
    return torch.arange(n, device=DEVICE)


def test_tubes_hide_the_same_places_of_every_frame():
    made = shown(tube_masking(seeds(40), (5, 4, 6), 7)).view(40, 5, 24)
    assert (made == made[:, :1]).all() and (made.sum(2) == 7).all()
    assert torch.equal(made[:, 0], shown(random_masking(seeds(40), 24, 7)))


def cells(ids, grid):
    """What a decoder sees, cell by cell: (B, T, H / 2, W / 2, 4)."""
    T, H, W = grid
    seen = marked(ids, T * H * W).view(-1, T, H // 2, 2, W // 2, 2)
    return seen.permute(0, 1, 2, 4, 3, 5).flatten(4)


@pytest.mark.parametrize("share", [1, 2, 3])
def test_running_cells_show_a_fixed_share_in_turn(share):
    grid, n = (8, 4, 6), 400
    seen = cells(running_cell_masking(seeds(n), grid, share * 8 * 24 // 4), grid)
    assert (seen.sum(-1) == share).all()  # in every cell of every frame
    assert (seen == seen[:, :, :1, :1]).all()  # one pattern for all cells of a frame
    assert (seen.unflatten(1, (2, 4)).sum(2) == share).all()  # every place, once in four frames
    later = seen[:, 1:]  # the pattern runs one place on: backwards, as turns come one sooner
    assert torch.equal(later, seen[:, :-1].roll(-1, -1))
    phases = seen[:, 0, 0, 0].int() @ torch.tensor([1, 2, 4, 8], dtype=torch.int32, device=DEVICE)
    counts = torch.unique(phases, return_counts=True)[1]
    assert len(counts) == 4 and ((counts - n / 4).abs() < 4.5 * (n / 4) ** 0.5).all()


@pytest.mark.parametrize("keep", [1, 13, 74, 75])
def test_other_counts_take_whole_turns_first(keep):
    grid = (3, 5, 5)
    few = marked(running_cell_masking(seeds(9), grid, keep), 75)
    if keep > 1:
        assert (few & marked(running_cell_masking(seeds(9), grid, keep - 1), 75)).sum() == 9 * (
            keep - 1
        )
    assert (few.sum(1) == keep).all()


@pytest.mark.parametrize("per_frame", [2, 5])
def test_the_decoder_sees_running_cells_hidden_from_the_encoder(per_frame):
    grid, L = (8, 4, 6), 192
    decode = (L - 8 * per_frame) // 2
    made = dual_masking(seeds(30), grid, per_frame, decode)
    tubes = tube_masking(seeds(30), grid, per_frame)
    assert all(torch.equal(a, b) for a, b in zip(made.masking, tubes, strict=True))
    wanted = marked(running_cell_masking(seeds(30), grid, L // 2), L) & ~shown(tubes)
    assert torch.equal(marked(made.decoded, L), wanted)


def test_any_number_may_be_decoded():
    made = dual_masking(seeds(30), (3, 5, 4), 6, 42)
    assert torch.equal(made.decoded, made.masking.masked)
    few = dual_masking(seeds(30), (3, 5, 4), 6, 11).decoded
    assert (marked(few, 60) & marked(made.masking.masked, 60)).sum() == 30 * 11


REFUSED = {
    "a flat grid": (lambda s: tube_masking(s, (4, 4), 2), "3 sides"),
    "an empty tube": (lambda s: tube_masking(s, (2, 4, 4), 0), "keep_per_frame .* got 0"),
    "more than a frame": (lambda s: tube_masking(s, (2, 4, 4), 17), "length = 16, got 17"),
    "nothing seen": (lambda s: running_cell_masking(s, (2, 4, 4), 0), "keep .* 32, got 0"),
    "too much decoded": (lambda s: dual_masking(s, (2, 4, 4), 4, 25), "decode .* 24, got 25"),
}


@pytest.mark.parametrize("call, words", REFUSED.values(), ids=REFUSED)
def test_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.zeros(2, dtype=torch.int64))
