import math

import pytest
import torch

from fastssl.kernels import PairMask, exclude_self, pairwise, pairwise_lse
from fastssl.kernels._chunks import tile_shape
from fastssl.kernels.pairwise import pairwise_lse_reference
from tests.oracle import DEVICE, UPSTREAM, assert_no_worse, grads, largest_tensor, saved_elements

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LOWER = PairMask("lower", lambda rows, cols: rows > cols)  # from one side only


def embeddings(dtype, *shapes):
    torch.manual_seed(sum(map(sum, shapes)))
    return [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]


def ids(n, shift=0):
    return torch.arange(shift, n + shift, device=DEVICE)


def reference(q, k, scale, mask=None, shift=0):
    return pairwise_lse_reference(q, k, scale, mask, ids(len(q), shift), ids(len(k)))


@pytest.mark.parametrize("reduce", UPSTREAM.values(), ids=UPSTREAM)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M, N, D", [(1, 1, 1), (3, 5, 2), (67, 131, 7), (600, 3, 5), (2, 1100, 4)])
def test_rows_against_keys(M, N, D, dtype, reduce):
    q, k = embeddings(dtype, (M, D), (N, D))
    scale = torch.tensor(1.5, dtype=dtype, device=DEVICE)
    assert_no_worse(pairwise_lse, reference, (q, k, scale), reduce)


@pytest.mark.parametrize("reduce", UPSTREAM.values(), ids=UPSTREAM)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", [None, exclude_self], ids=["all", "exclude_self"])
@pytest.mark.parametrize("N, D", [(2, 3), (45, 6), (101, 5)])
def test_rows_against_themselves(N, D, mask, dtype, reduce):
    (z,) = embeddings(dtype, (N, D))
    scale = torch.tensor(1.5, dtype=dtype, device=DEVICE)
    assert_no_worse(
        lambda z, s: pairwise_lse(z, z, s, mask=mask),
        lambda z, s: reference(z, z, s, mask),
        (z, scale),
        reduce,
    )


@pytest.mark.parametrize("mask", [exclude_self, LOWER], ids=lambda m: m.name)
def test_mask_reads_the_ids_it_is_given(mask):
    q, k = embeddings(torch.float32, (29, 5), (83, 5))
    assert_no_worse(
        lambda q, k: pairwise_lse(q, k, 2.0, mask=mask, row_ids=ids(29, 40), col_ids=ids(83)),
        lambda q, k: reference(q, k, 2.0, mask, shift=40),
        (q, k),
    )


def test_two_sets_of_ids_on_one_tensor():
    (z,) = embeddings(torch.float32, (61, 4))
    rows, cols = ids(61), ids(61, 30)
    assert_no_worse(
        lambda z: pairwise_lse(z, z, 2.0, mask=exclude_self, row_ids=rows, col_ids=cols),
        lambda z: pairwise_lse_reference(z, z, 2.0, exclude_self, rows, cols),
        [z],
    )


def test_one_sided_mask_on_one_tensor_is_not_mirrored():
    (z,) = embeddings(torch.float32, (61, 4))
    ours = grads(lambda z: pairwise_lse(z, z, 1.0, mask=LOWER)[1:], [z])
    torch.testing.assert_close(ours, grads(lambda z: reference(z, z, 1.0, LOWER)[1:], [z]))


def test_row_with_no_pair_left_is_minus_infinity_with_zero_gradient():
    q, k = embeddings(torch.float32, (30, 3), (50, 3))
    rows = torch.where(ids(30) == 4, 7, ids(30, 100))
    q.requires_grad_(), k.requires_grad_()
    only = PairMask("only", lambda r, c: (r != 7) & (c == c))
    lse = pairwise_lse(q, k, 1.0, mask=only, row_ids=rows)
    assert lse[4] == -math.inf and lse.isfinite().sum() == 29
    lse.sum().backward()
    assert q.grad is not None and k.grad is not None
    assert (q.grad[4] == 0).all() and q.grad.isfinite().all() and k.grad.isfinite().all()


def test_single_row_without_itself_is_minus_infinity():
    z = torch.ones(1, 3, device=DEVICE, requires_grad=True)
    lse = pairwise_lse(z, z, 1.0, mask=exclude_self)
    assert lse.item() == -math.inf
    lse.sum().backward()
    assert z.grad is not None and (z.grad == 0).all()


def test_uniform_scores_give_the_log_of_their_number():
    z = torch.zeros(77, 3, device=DEVICE)
    every, others = (pairwise_lse(z, z, 9.0, mask=m) for m in (None, exclude_self))
    torch.testing.assert_close(every, torch.full_like(every, math.log(77)))
    torch.testing.assert_close(others, torch.full_like(others, math.log(76)))


def test_splitting_the_keys_joins_by_logaddexp():
    q, k = embeddings(torch.float32, (41, 6), (90, 6))
    parts = [pairwise_lse(q, part, 0.7) for part in (k[:13], k[13:])]
    torch.testing.assert_close(pairwise_lse(q, k, 0.7), torch.logaddexp(*parts))


def test_large_scale_does_not_overflow():
    q, k = embeddings(torch.float32, (40, 8), (70, 8))
    assert_no_worse(
        lambda q, k: pairwise_lse(q, k, 100.0), lambda q, k: reference(q, k, 100.0), (q, k)
    )


def test_scores_far_below_zero_do_not_vanish():
    q, k = torch.ones(3, 2, device=DEVICE), -torch.ones(40, 2, device=DEVICE)
    lse = pairwise_lse(q, k, 1e4)
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(40) - 2e4), rtol=1e-6, atol=0)


def test_scale_may_be_zero():
    q, k = embeddings(torch.float32, (5, 3), (6, 3))
    scale = torch.zeros((), device=DEVICE)
    assert_no_worse(pairwise_lse, reference, (q, k, scale))


def test_gradients_only_where_wanted():
    q, k = embeddings(torch.float32, (35, 3), (44, 3))
    both = grads(lambda q, k: pairwise_lse(q, k, 2.0), [q, k])
    only_k = grads(lambda k: pairwise_lse(q, k, 2.0), [k])
    only_q = grads(lambda q: pairwise_lse(q, k, 2.0), [q])
    assert torch.equal(both[1], only_q[1]) and torch.equal(both[2], only_k[1])


@pytest.mark.parametrize("same", [True, False], ids=["self", "rows"])
def test_holds_tiles_and_never_all_pairs(same):
    z = torch.randn(300, 4, device=DEVICE, requires_grad=True)
    k = z if same else torch.randn(300, 4, device=DEVICE, requires_grad=True)
    run = lambda: pairwise_lse(z, k, 1.0, mask=exclude_self).mean()  # noqa: E731
    assert saved_elements(run) <= 3 * 1200 + 4 * 300 + 8
    assert largest_tensor(lambda: run().backward()) <= 1200  # an operand; a tile has 512


def test_one_tensor_visits_each_pair_of_tiles_once(monkeypatch):
    calls, scores = [], pairwise.scores
    monkeypatch.setattr(pairwise, "scores", lambda *args: calls.append(args) or scores(*args))
    (z,) = embeddings(torch.float32, (220, 5))
    counts = []
    for k in (z, z.clone()):
        calls.clear()
        pairwise_lse(z, k, 1.0)
        counts.append(len(calls))
    assert counts[0] < 0.6 * counts[1]


@pytest.mark.parametrize("m, n", [(1, 1), (10, 10), (300, 300), (1, 5000), (5000, 1), (7, 90)])
def test_tiles_keep_to_the_budget(m, n):
    rows, cols = tile_shape(m, n, torch.empty(0))
    assert 1 <= rows <= m and 1 <= cols <= n and rows * cols <= 512
    assert rows * cols * 4 > min(m * n, 512)  # and use at least a quarter of it


def test_autocast_does_not_reach_inside():
    q, k = embeddings(torch.float32, (9, 16), (8, 16))
    plain = grads(lambda q, k: pairwise_lse(q, k, 3.0), [q, k])
    with torch.autocast(DEVICE, torch.bfloat16):
        inside = grads(lambda q, k: pairwise_lse(q, k, 3.0), [q, k])
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


def test_second_derivative_is_refused():
    z = torch.randn(4, 3, device=DEVICE, requires_grad=True)
    (g,) = torch.autograd.grad(pairwise_lse(z, z, 1.0).sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        g.sum().backward()


Q = torch.zeros(4, 3)


@pytest.mark.parametrize(
    "args, kwargs, words",
    [
        ((Q, Q[:, :2], 1.0), {}, r"q and k .* \(4, 3\) and \(4, 2\)"),
        ((Q[:0], Q, 1.0), {}, r"none of them empty, got \(0, 3\)"),
        ((Q, Q.double(), 1.0), {}, "float32 on cpu and torch.float64"),
        ((Q.long(), Q.long(), 1.0), {}, "q must be a floating-point tensor, got torch.int64"),
        ((Q, Q, torch.ones(2)), {}, r"scale must .* got \(2,\)"),
        (
            (Q, Q, 1.0),
            {"row_ids": torch.arange(3)},
            r"row_ids must be \(4,\) int64 on cpu, got \(3,\)",
        ),
        (
            (Q, Q, 1.0),
            {"row_ids": torch.empty(4, dtype=torch.int64, device="meta")},
            "row_ids must be .* on cpu, got .* on meta",
        ),
        ((Q, Q, 1.0), {"col_ids": Q[:, 0]}, "col_ids must be .* got .* torch.float32"),
        (
            (Q, Q, 1.0),
            {"impl": "fused"},
            "one of auto, torch, reference, triton for pairwise_lse, got 'fused'",
        ),
    ],
)
def test_refuses(args, kwargs, words):
    with pytest.raises(ValueError, match=words):
        pairwise_lse(*args, **kwargs)
