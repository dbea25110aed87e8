"""What is particular to the log-sum-exps in torch: how much they hold, and the short cut."""

import pytest
import torch

from fastssl.kernels import exclude_self, exclude_self_and_pair, same_group
from fastssl.kernels.common.chunks import tile_shape
from fastssl.kernels.pairwise import lse_torch as pairwise_torch
from fastssl.kernels.pairwise.lse import pairwise_lse, pairwise_lse_reference
from fastssl.kernels.pairwise.lse_torch import Pairs, gradients, statistics
from fastssl.kernels.pairwise.masks import Tile, as_masks
from tests.oracle import DEVICE, assert_no_worse, largest_tensor, saved_elements


def pairs_of(q, k, scale, same=False, mask=None):
    masks = as_masks(mask)
    return Pairs(q, k, torch.tensor(scale), None, *masks.ids(), masks.key, same)


@pytest.mark.parametrize("scale", [1.0, 60.0], ids=["bounded", "any"])
@pytest.mark.parametrize("same", [True, False], ids=["self", "rows"])
def test_holds_tiles_and_never_all_pairs(same, scale):
    z = torch.randn(300, 4, device=DEVICE, requires_grad=True)
    k = z if same else torch.randn(300, 4, device=DEVICE, requires_grad=True)
    run = lambda: torch.cat(pairwise_lse(z, k, scale, mask=exclude_self, both=True)).mean()  # noqa: E731
    assert saved_elements(run) <= 3 * 1200 + 4 * 300 + 8
    pairs = pairs_of(z.detach(), k.detach(), scale, same, exclude_self)
    sides = torch.ones(2, 300, device=DEVICE)
    # An operand has 1200 elements; a tile has 512.
    assert largest_tensor(lambda: statistics(pairs, True)) <= 1200
    assert largest_tensor(lambda: gradients(pairs, sides, sides, (True,) * 4)) <= 1200


def test_one_tensor_visits_each_pair_of_tiles_once(monkeypatch):
    seen = []
    score = pairwise_torch._Scores.__call__
    monkeypatch.setattr(
        pairwise_torch._Scores, "__call__", lambda *args: seen.append(args[1:]) or score(*args)
    )
    z = torch.randn(220, 5, device=DEVICE)
    for both in (False, True):
        seen.clear()
        pairwise_lse(z, z, 1.0, both=both)
        counted = torch.zeros(220, 220, dtype=torch.int64)
        for i, j in seen:
            counted[i, j] += 1
            counted[j, i] += 1 if i != j else 0
        assert (counted == 1).all()


@pytest.mark.parametrize("both", [False, True], ids=["rows", "both"])
@pytest.mark.parametrize("length, bounded", [(6.0, True), (6.5, False)])
def test_small_scores_need_no_maximum(length, bounded, both, monkeypatch):
    q, k = (torch.nn.functional.normalize(torch.randn(n, 3)) * length for n in (45, 83))
    pairs = pairs_of(q, k, 1.0)
    assert pairwise_torch._Scores(pairs).bounded == bounded
    rows, cols = statistics(pairs, both)
    assert rows[0].any() == (not bounded)
    pack = torch.cat if both else torch.as_tensor
    assert_no_worse(
        lambda q, k: pack(pairwise_lse(q, k, 1.0, both=both)),
        lambda q, k: pack(pairwise_lse_reference(q, k, 1.0, None, None, both)),
        (q, k),
    )


def test_a_bias_counts_among_the_scores():
    q = torch.ones(2, 2)
    pairs = Pairs(q, q, torch.tensor(1.0), torch.tensor([90.0, 0.0]), None, None, "", False)
    assert not pairwise_torch._Scores(pairs).bounded
    assert pairwise_lse(q, q, 1.0, bias=pairs.bias).isfinite().all()


def test_a_tile_may_leave_a_row_or_all_of_it_without_a_pair():
    q, k = torch.randn(40, 3), torch.randn(90, 3)
    bias = torch.full((90,), 50.0)  # not bounded, and the maxima near each other
    ids = torch.arange(40) // 23, torch.arange(90) % 2 * (torch.arange(90) > 44)
    mask = same_group(*ids) & exclude_self
    assert_no_worse(
        lambda q, k: torch.cat(pairwise_lse(q, k, 1.0, bias=bias, mask=mask, both=True)),
        lambda q, k: torch.cat(pairwise_lse_reference(q, k, 1.0, mask, bias.to(q), both=True)),
        (q, k),
    )


@pytest.mark.parametrize("rows, cols", [((4, 14), (2, 10)), ((2, 9), (4, 9)), ((0, 4), (6, 12))])
@pytest.mark.parametrize("rule", [exclude_self, exclude_self_and_pair, same_group])
def test_a_line_of_dropped_pairs_is_where_the_tile_meets_it(rule, rows, cols):
    tile = Tile(as_masks(rule).key, None, None, torch.device("cpu"))
    at = slice(*rows), slice(*cols)
    s = torch.zeros(rows[1] - rows[0], cols[1] - cols[0])
    assert torch.equal(tile.drop(s, *at) == 0, tile.keep(*at))


@pytest.mark.parametrize("m, n", [(1, 1), (10, 10), (300, 300), (1, 5000), (5000, 1), (7, 90)])
def test_tiles_keep_to_the_budget(m, n):
    rows, cols = tile_shape(m, n, torch.empty(0))
    assert 1 <= rows <= m and 1 <= cols <= n and rows * cols <= 512
    assert rows * cols * 4 > min(m * n, 512)  # and use at least a quarter of it
