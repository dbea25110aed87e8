"""Gram distances beside all similarities, and near zero; neighbors beside all products."""

from functools import partial

import pytest
import torch

from fastssl.kernels import gram_distance, nearest
from fastssl.kernels.distillation import nearest_reference
from fastssl.kernels.distillation.gram import _distance, _gradients, has_few_features
from tests.oracle import DEVICE, UPSTREAM, assert_no_worse, grads, largest_tensor, saved_elements
from tests.ranks import run_ranks

SHAPES = [(5, 7, 6), (3, 13, 4), (1, 1, 1)]  # B, P, D: by patches, by features, one


def patches(B, P, D, apart=1.0, dtype=torch.float32):
    torch.manual_seed(P)
    x = torch.randn(B, P, D, device=DEVICE)
    return [z.to(dtype) for z in (x, x + apart * torch.randn_like(x))]


def formula(x, y):
    s = torch.einsum("bid,bjd->bij", x, x) - torch.einsum("bid,bjd->bij", y, y)
    return s.pow(2).mean((1, 2))


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("reduce", UPSTREAM.values(), ids=UPSTREAM)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gram_value_and_gradients(shape, reduce, impl):
    assert_no_worse(partial(gram_distance, impl=impl), formula, patches(*shape), reduce, slack=4)


@pytest.mark.parametrize("shape", [(2, 9, 20), (2, 30, 5)], ids=str)
@pytest.mark.parametrize("apart", [1e-1, 1e-4])
def test_a_gram_distance_near_zero_keeps_its_digits(shape, apart):
    """Eager's is a difference of numbers that agree: at 1e-4 it has three digits."""
    inputs = patches(*shape, apart)
    truth = grads(formula, [z.double() for z in inputs])
    for got, want in zip(grads(gram_distance, inputs), truth, strict=True):
        assert (got - want).abs().max() <= 1e-6 * want.abs().max()


def test_gram_dtypes_one_side_and_memory():
    x, y = patches(4, 9, 20, 1.0, torch.bfloat16)
    exact = grads(lambda x: gram_distance(x, y.float()), [x.float()])
    got = grads(lambda x: gram_distance(x, y), [x])
    assert torch.equal(got[0], exact[0]) and got[1].dtype == torch.bfloat16
    torch.testing.assert_close(got[1].float(), exact[1], rtol=1e-2, atol=0)
    assert not has_few_features(9, 20) and has_few_features(30, 5)
    for P, D in ((60, 26), (60, 4)):
        x, y = (z.requires_grad_() for z in patches(3, P, D))
        most = max(P * P, 3 * P * D)
        assert largest_tensor(lambda: _distance(x, y)) <= most  # noqa: B023
        each = torch.ones(3, device=DEVICE)
        assert largest_tensor(lambda: _gradients(each, x, y, True, True)) <= most  # noqa: B023
        assert saved_elements(lambda: gram_distance(x, y)) == 2 * x.numel()  # noqa: B023


def test_gram_compiles_and_has_no_second_derivative():
    x, y = (z.requires_grad_() for z in patches(2, 7, 6))
    torch._dynamo.reset()
    compiled = torch.compile(gram_distance, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(x, y).sum(), (x, y)) for f in (compiled, gram_distance))
    torch.testing.assert_close(got, want)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gram_distance(x, y).sum(), x, create_graph=True)


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
@pytest.mark.parametrize("B, topk, groups", [(40, 1, 1), (40, 3, 4), (9, 8, 1)])
@pytest.mark.usefixtures("small_blocks")
def test_neighbors_are_those_of_all_products(B, topk, groups, impl):
    (x,) = patches(1, B, 6)[0]
    got = nearest(x, topk=topk, groups=groups, impl=impl)
    want = nearest_reference(x.double(), topk, groups)
    assert torch.equal(got.indices, want) and got.rows is x


def each_rank(rank, world):
    """3 rows on each of 4 ranks: in one group, in groups of 6 and 4 that reach over ranks, of 3."""
    (whole,) = patches(1, 12, 5)[0]
    found = {}
    for groups in (1, 2, 3, 4):
        x = whole[3 * rank : 3 * rank + 3].clone().requires_grad_()
        rows, at = nearest(x, topk=2, groups=groups, process_group=None)
        weight = torch.arange(1.0, 13)[3 * rank : 3 * rank + 3, None]
        value = (weight * (rows[at].sum(1) - x).square()).sum()
        (g,) = torch.autograd.grad(value, x)
        found[groups] = rows[at].detach(), g, len(rows)
    return found


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_neighbors_and_their_gradients_over_ranks(groups, neighbors):
    (x,) = patches(1, 12, 5)[0].cpu()
    x.requires_grad_()
    at = nearest_reference(x, 2, groups)
    value = (torch.arange(1.0, 13)[:, None] * (x[at].sum(1) - x).square()).sum()
    (g,) = torch.autograd.grad(value, x)
    rows, grad, count = zip(*(seen[groups] for seen in neighbors), strict=True)
    torch.testing.assert_close(torch.cat(rows), x[at].detach())
    torch.testing.assert_close(torch.cat(grad), g)
    assert max(count) <= {1: 12, 2: 6, 3: 8, 4: 3}[groups]


@pytest.fixture(scope="module")
def neighbors():
    return run_ranks(each_rank, 4)


X = torch.zeros(4, 3)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: gram_distance(X, X), r"x and y must both be \(B, P, D\).* got \(4, 3\)"),
        (lambda: gram_distance(X[None], X[None, :2]), r"got \(1, 4, 3\) and \(1, 2, 3\)"),
        (lambda: gram_distance(X[None], X[None].double()), "x and y must share dtype"),
        (lambda: gram_distance(X[None, :0], X[None, :0]), "P at least 1"),
        (lambda: gram_distance(X[None, :, :0], X[None, :, :0]), "x must have at least 1 feature"),
        (lambda: gram_distance(X[None], X[None], impl="triton"), "impl must be one of auto, torch"),
        (lambda: nearest(X, groups=3), "groups must divide the 4 rows, got 3"),
        (lambda: nearest(X, groups=0), "groups must divide the 4 rows, got 0"),
        (lambda: nearest(X, topk=2, groups=2), r"topk must lie in 1..1, .* got 2"),
        (lambda: nearest(X[None]), r"x must be \(N, D\), got \(1, 4, 3\)"),
        (lambda: nearest(X[:1]), "at least 2 rows"),
    ],
)
def test_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call()
