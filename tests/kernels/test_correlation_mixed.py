import pytest
import torch

from fastssl.kernels import cross_correlation, mixed_correlation
from fastssl.kernels.correlation.plans import PLANS
from tests.covering import crossed
from tests.oracle import DEVICE, UPSTREAM, assert_no_worse


def rows(dtype, N, D):
    torch.manual_seed(N * D)
    return [torch.randn(N, D, device=DEVICE).to(dtype) for _ in range(3)]


def terms(plan, impl="auto"):
    def call(*abr):
        found = mixed_correlation(*abr, plan=plan, impl=impl)
        return torch.cat([found.diagonal, found.off_diagonal_sq[None], found.residual_sq[None]])

    return call


def eager(a, b, r):
    c = a.T @ b
    off = (c - c.diagonal().diag()).square().sum()
    residual = (r.T @ a).square().sum() + (r.T @ b).square().sum()
    return torch.cat([c.diagonal(), off[None], residual[None]])


@crossed(dtype={str(x): x for x in (torch.float32, torch.bfloat16)}, reduce=UPSTREAM)
@pytest.mark.parametrize("plan", ["auto", *PLANS])
@pytest.mark.parametrize("N, D", [(1, 1), (9, 40), (60, 11), (33, 33)])
def test_mixed_correlation(N, D, plan, dtype, reduce):
    assert_no_worse(terms(plan), eager, rows(dtype, N, D), reduce, slack=8.0)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, True)])
def test_gradients_of_some(wanted):
    abr = [x.requires_grad_(w) for x, w in zip(rows(torch.float64, 9, 40), wanted, strict=True)]
    leaves = [x for x in abr if x.requires_grad]
    ours = torch.autograd.grad(terms("gram")(*abr).sum(), leaves)
    torch.testing.assert_close(ours, torch.autograd.grad(eager(*abr).sum(), leaves))


def test_without_a_residual_it_is_the_cross_correlation():
    a, b, r = rows(torch.float64, 9, 40)
    found = mixed_correlation(a, b, 0 * r)
    assert found.residual_sq == 0
    for x, y in zip(found[:2], cross_correlation(a, b), strict=True):
        torch.testing.assert_close(x, y)


Z = torch.zeros(4, 3)


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda: mixed_correlation(Z, Z, Z[:, :2]),
            r"same shape, got \(4, 3\), \(4, 3\), \(4, 2\)",
        ),
        (lambda: mixed_correlation(Z, Z, Z.double()), "share dtype and device"),
        (lambda: mixed_correlation(Z, Z, Z, plan="x"), "plan must be one of auto, .* got 'x'"),
        (lambda: mixed_correlation(Z, Z, Z, impl="x"), "for mixed_correlation, got 'x'"),
        (lambda: mixed_correlation(Z, Z, Z[0]), r"r must be \(N, D\), got \(3,\)"),
    ],
)
def test_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call()
