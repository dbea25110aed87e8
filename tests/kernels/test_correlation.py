import pytest
import torch

from fastssl.kernels import column_moments, cross_diagonal, frobenius_sq, standardise
from fastssl.kernels.correlation import prefers_gram
from tests.oracle import (
    DEVICE,
    UPSTREAM,
    as_accurate_as_eager,
    assert_no_worse,
    grads,
    largest_tensor,
    saved_elements,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(5, 1), (37, 5), (16, 97), (130, 41)]  # a chunk has 512 elements


def rows(dtype, *shapes):
    torch.manual_seed(sum(map(sum, shapes)))
    return [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]


@pytest.mark.parametrize("reduce", UPSTREAM.values(), ids=UPSTREAM)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unbiased", [False, True], ids=["biased", "unbiased"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_standardise(shape, unbiased, dtype, reduce):
    z = rows(dtype, shape)
    options = {"eps": 1e-3, "unbiased": unbiased}
    assert_no_worse(
        lambda z: standardise(z, **options),
        lambda z: standardise(z, **options, impl="reference"),
        z,
        lambda out: reduce(out * out.detach().cos()),  # a plain sum has gradient zero
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unbiased", [False, True], ids=["biased", "unbiased"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_column_moments(shape, unbiased, dtype):
    ours = lambda z: torch.stack(column_moments(z, unbiased=unbiased))  # noqa: E731
    eager = lambda z: torch.stack([z.mean(0), z.var(0, correction=int(unbiased))])  # noqa: E731
    assert_no_worse(ours, eager, rows(dtype, shape))


def test_a_far_mean_costs_no_accuracy():
    torch.manual_seed(0)
    z = 1e4 + torch.randn(999, 3, device=DEVICE)
    true_mean, true_var = z.double().mean(0), z.double().var(0, correction=0)
    mean, var = column_moments(z)
    torch.testing.assert_close(mean.double(), true_mean, rtol=1e-7, atol=0)
    torch.testing.assert_close(var.double(), true_var, rtol=1e-6, atol=0)
    out = standardise(z, eps=0.0)
    torch.testing.assert_close(
        out.double(), (z.double() - true_mean) / true_var.sqrt(), atol=2e-6, rtol=1e-6
    )


def test_a_mean_farther_still_leaves_the_variance():
    torch.manual_seed(0)
    z = 1e6 + torch.randn(999, 3, device=DEVICE)
    true_var = z.double().var(0, correction=0)
    torch.testing.assert_close(column_moments(z).var.double(), true_var, rtol=1e-6, atol=0)


def test_a_constant_column_is_zero():
    z = torch.full((50, 2), 3.3, device=DEVICE)
    assert (standardise(z, eps=1e-5) == 0).all()


def test_standardise_matches_batch_norm():
    (z,) = rows(torch.float32, (64, 33))
    want = torch.nn.functional.batch_norm(z, None, None, training=True)
    torch.testing.assert_close(standardise(z, eps=1e-5), want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("reduce", UPSTREAM.values(), ids=UPSTREAM)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cross_diagonal(shape, dtype, reduce):
    eager = lambda a, b: (a * b).sum(0)  # noqa: E731
    assert_no_worse(cross_diagonal, eager, rows(dtype, shape, shape), reduce)


@pytest.mark.parametrize("reduce", UPSTREAM.values(), ids=UPSTREAM)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # squares pass fp16
@pytest.mark.parametrize(
    "N, D, E", [(1, 1, 1), (9, 40, 40), (60, 11, 11), (25, 90, 31), (40, 7, 3)]
)
def test_frobenius_sq(N, D, E, dtype, reduce):
    eager = lambda a, b: (a.T @ b).square().sum()  # noqa: E731
    assert_no_worse(frobenius_sq, eager, rows(dtype, (N, D), (N, E)), reduce)


@pytest.mark.parametrize("N, D", [(9, 40), (60, 11)], ids=["gram", "covariance"])
def test_frobenius_sq_of_one_tensor(N, D):
    eager = lambda a: (a.T @ a).square().sum()  # noqa: E731
    assert_no_worse(lambda a: frobenius_sq(a, a), eager, rows(torch.float32, (N, D)))


def test_both_routes_agree_where_they_meet():
    assert prefers_gram(74, 100) and not prefers_gram(75, 100)
    truth = []
    for n in (74, 75):
        a, b = rows(torch.float32, (n, 100), (n, 100))
        ours = grads(frobenius_sq, [a, b])
        eager = grads(lambda a, b: (a.T @ b).square().sum(), [a, b])
        truth = grads(lambda a, b: (a.T @ b).square().sum(), [a.double(), b.double()])
        for o, e, t in zip(ours, eager, truth, strict=True):
            as_accurate_as_eager(o, e, t)


@pytest.mark.parametrize("N, D", [(30, 400), (400, 30)], ids=["gram", "covariance"])
def test_holds_no_more_than_the_smaller_matrix(N, D):
    a, b = (x.requires_grad_() for x in rows(torch.float32, (N, D), (N, D)))
    assert saved_elements(lambda: frobenius_sq(a, b)) == 2 * N * D + (1800 if N < D else 900)
    assert largest_tensor(lambda: frobenius_sq(a, b).backward()) == N * D


def test_autocast_does_not_reach_inside():
    a, b = rows(torch.float32, (9, 16), (9, 16))

    def run():
        return [
            *grads(frobenius_sq, [a, b]),
            *grads(cross_diagonal, [a, b]),
            *grads(lambda z: standardise(z, eps=0.1), [a]),
        ]

    plain = run()
    with torch.autocast(DEVICE, torch.bfloat16):
        inside = run()
    assert all(torch.equal(x, y) for x, y in zip(plain, inside, strict=True))


Z = torch.zeros(4, 3)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: standardise(Z[0], eps=0.1), r"z must be \(N, D\), got \(3,\)"),
        (lambda: standardise(Z, eps=-1.0), "eps must be >= 0, got -1.0"),
        (lambda: standardise(Z[:1], eps=0.1, unbiased=True), "z must have more than 1 rows, got 1"),
        (lambda: standardise(Z.long(), eps=0.1), "z must be a floating-point tensor"),
        (lambda: standardise(Z, eps=0.1, impl="triton"), "torch, reference for standardise"),
        (lambda: column_moments(Z[:0]), "z must have more than 0 rows, got 0"),
        (lambda: frobenius_sq(Z, Z[:3]), r"a and b must .* \(4, 3\) .* \(3, 3\)"),
        (lambda: frobenius_sq(Z, Z.double()), "same rows and dtype, got .* torch.float64"),
        (lambda: frobenius_sq(Z, Z, impl="fast"), "for frobenius_sq, got 'fast'"),
        (lambda: cross_diagonal(Z, Z[:, :2]), r"a and b must .* \(4, 3\) and \(4, 2\)"),
    ],
)
def test_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call()
