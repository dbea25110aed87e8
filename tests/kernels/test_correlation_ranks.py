"""Each plan on W ranks with different rows is the joined batch in one process, to 1e-10."""

import pytest
import torch

from fastssl.kernels import (
    column_moments,
    correlation_plan,
    cross_correlation,
    frobenius_sq,
    mixed_correlation,
    standardize,
)
from fastssl.kernels.correlation.plans import PLANS
from tests.oracle import as_accurate_as_eager
from tests.ranks import run_ranks

SHAPES = {"wide": (3, 29), "tall": (17, 6), "few": (2, 3)}  # rows of a rank, features


def batch(rank, shape, dtype):
    generator = torch.Generator().manual_seed(7 * rank + 1)
    rows = torch.randn(3, *shape, generator=generator, dtype=torch.float64) + 0.2 * rank
    return rows.to(dtype)


def upstream(size, dtype):
    return torch.linspace(-1, 2, size).to(dtype)


def values(plan, a, b, r):
    """Every number of the family, the second set of one tensor with itself."""
    found = [*cross_correlation(a, b, plan=plan), *cross_correlation(a, a, plan=plan)]
    found += [frobenius_sq(a, b[:, :2], plan=plan), frobenius_sq(b, b, plan=plan)]
    found += mixed_correlation(a, b, r, plan=plan)
    return torch.cat([x.flatten() for x in found])


def step(plan, rows, share=1.0):
    rows = rows.clone().requires_grad_()
    out = values(plan, *rows)
    (share * out * upstream(len(out), out.dtype)).sum().backward()
    return out.detach(), rows.grad


def fused(plan, rows, impl="triton"):
    """All of the family by the kernels, from columns to a gradient."""
    rows = rows.clone().requires_grad_()
    a, b, r = (standardize(z, eps=1e-5, impl=impl) for z in rows)
    if plan == "gram":
        found = [*mixed_correlation(a, b, r, plan=plan, impl=impl)]
    else:
        found = [*cross_correlation(a, b, plan=plan, impl=impl), frobenius_sq(r, a, impl=impl)]
    found += column_moments(rows[2], unbiased=True, impl=impl)
    out = torch.cat([x.flatten() for x in found])
    (out * upstream(len(out), out.dtype)).sum().backward()
    return out.detach(), rows.grad


def each_rank(rank, world):
    seen = {}
    for plan in ("auto", *PLANS):
        for name, shape in SHAPES.items():
            for dtype in (torch.float64, torch.float32):
                rows = batch(rank, shape, dtype)
                # each rank's upstream gradient is its own: what counts is their sum
                share = 2 * (rank + 1) / (world * (world + 1))
                seen[plan, name, str(dtype)] = step(plan, rows, share)
    for plan in ("gram", "covariance"):
        seen["triton", plan] = fused(plan, batch(rank, (5, 18), torch.float32))
    try:
        cross_correlation(*batch(rank, (3 + (rank == 1), 4), torch.float32)[:2])
    except ValueError as error:
        seen["uneven"] = str(error)
    return seen


@pytest.fixture(scope="module", params=[2, 4], ids=lambda w: f"W={w}")
def ranks(request):
    return run_ranks(each_rank, request.param)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("plan", ["auto", *PLANS])
def test_value_and_gradient_of_the_joined_batch(ranks, plan, name, dtype):
    rows = [batch(rank, SHAPES[name], dtype) for rank in range(len(ranks))]
    truth, grad = step("covariance", torch.cat(rows, 1).double())
    eager, _ = step("covariance", torch.cat(rows, 1))
    exact = dtype == torch.float64
    bound = 1e-10 if exact else 1e-5
    for seen in ranks:
        value = seen[plan, name, str(dtype)][0]
        assert value.dtype == eager.dtype
        torch.testing.assert_close(
            value.double(), truth, rtol=bound, atol=bound * truth.abs().max()
        )
    joined = torch.cat([seen[plan, name, str(dtype)][1] for seen in ranks], 1).double()
    torch.testing.assert_close(joined, grad, rtol=bound, atol=bound * grad.abs().max().item())


@pytest.mark.parametrize("plan", ["gram", "covariance"])
def test_the_kernels_across_ranks(ranks, plan):
    rows = torch.cat([batch(r, (5, 18), torch.float32) for r in range(len(ranks))], 1)
    truth, grad = fused(plan, rows.double(), "torch")
    eager, eager_grad = fused(plan, rows, "reference")
    for seen in ranks:
        as_accurate_as_eager(seen["triton", plan][0], eager.float(), truth)
    W = len(ranks)
    joined = torch.cat([seen["triton", plan][1] / W for seen in ranks], 1)
    as_accurate_as_eager(joined, eager_grad, grad)


def test_every_rank_has_the_same_bits(ranks):
    for key in ranks[0]:
        if key != "uneven":
            assert all(torch.equal(seen[key][0], ranks[0][key][0]) for seen in ranks)


def test_uneven_ranks_are_refused_by_all(ranks):
    for seen in ranks:
        assert "a must have the same shape on every rank" in seen["uneven"]


def test_the_plan_weighs_products_and_bytes():
    taken = {correlation_plan(b, 1024, 1024, world=8) for b in (16, 100, 2000)}
    assert taken == {"gram", "covariance"}
