"""Pairs of any shape, dtype, layout, mask and scale: no worse than eager, judged in float64."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastssl.kernels import (
    different_group,
    exclude_self,
    exclude_self_and_pair,
    pairwise_sigmoid,
    pairwise_topk,
    same_group,
)
from fastssl.kernels.pairwise.lse import pairwise_lse_reference
from fastssl.kernels.pairwise.masks import as_masks
from fastssl.kernels.pairwise.sigmoid import pairwise_sigmoid_reference
from tests.covering import FULL, examples
from tests.oracle import DEVICE, UPSTREAM, as_accurate_as_eager, grads

# The fixture that chooses the implementation holds nothing that an example changes.
some = settings(
    max_examples=examples(25),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
sizes = st.integers(1, 45 if FULL else 20)
widths = st.integers(1, 40 if FULL else 20)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@st.composite
def pairs(draw):
    """q (M, D) and k (N, D), plain or with gaps in memory, and a mask or none."""
    M, N, D = draw(sizes), draw(sizes), draw(widths)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    length = draw(st.sampled_from([0.5, 2.0, 5.0]))
    dtype, found = draw(dtypes), []
    for n in (M, N):
        x = torch.randn(n, D, generator=generator)
        x = (length * torch.nn.functional.normalize(x)).to(DEVICE, dtype)
        gaps = draw(st.booleans())
        found.append(torch.stack([x, x + torch.nan], 2)[..., 0] if gaps else x)
    rows, cols = torch.arange(M, device=DEVICE), torch.arange(N, device=DEVICE)
    groups = draw(st.integers(1, 4))
    masks = {
        "all": None,
        "self": exclude_self,
        "shifted": exclude_self(rows + draw(sizes), cols),
        "pair": exclude_self_and_pair,
        "same": same_group(rows % groups, cols % groups),
        "different": different_group(rows % groups, cols % groups),
        "both": exclude_self & same_group(rows % groups, cols % groups),
    }
    return *found, masks[draw(st.sampled_from(sorted(masks)))]


def judge(ours, eager, inputs, reduce):
    """Values and gradients where eager has any: a row with no pair left has none."""
    wide = [x.double() for x in inputs]
    truth, par = grads(eager, wide, reduce), grads(eager, inputs, reduce)
    mine = grads(ours, inputs, reduce)
    for a, e, t in zip(mine, par, truth, strict=True):
        as_accurate_as_eager(a, e.to(a.dtype), t, slack=4.0)


def finite(lse):
    """Rows and columns with no pair left, and their gradient, become 0 and none."""
    return torch.where(lse == -torch.inf, 0, lse)


@some
@given(pairs(), st.floats(-3, 30), st.sampled_from(sorted(UPSTREAM)), st.booleans(), st.booleans())
def test_log_sum_exps(lse, problem, scale, layout, both, biased):
    q, k, mask = problem
    bias = torch.linspace(-2, 2, len(k), device=DEVICE) if biased else None
    pack = torch.cat if both else torch.as_tensor
    judge(
        lambda q, k: finite(pack(lse(q, k, scale, mask=mask, bias=bias, both=both))),
        lambda q, k: _reference(q, k, scale, mask, bias, both),
        [q, k],
        UPSTREAM[layout],
    )


def _reference(q, k, scale, mask, bias, both):
    """The formula, but for rows and columns with no pair left, whose eager gradient is nan."""
    keep = as_masks(mask).keep(len(q), len(k), q.device)
    s = scale * (q @ k.T) + (0 if bias is None else bias.to(q.dtype))
    s = s.masked_fill(~keep, -torch.inf)
    sides = [(s, keep.any(1))] + ([(s.T, keep.any(0))] if both else [])
    return torch.cat([torch.where(any_, _lse(x, any_), 0) for x, any_ in sides])


def _lse(s, any_):
    return torch.where(any_[:, None], s, 0).logsumexp(1)


@some
@given(sizes, widths, dtypes, st.floats(0.1, 30), st.sampled_from(sorted(UPSTREAM)))
def test_log_sum_exps_of_one_tensor(lse, N, D, dtype, scale, layout):
    torch.manual_seed(N * D)
    z = torch.nn.functional.normalize(torch.randn(N + 1, D, device=DEVICE)).to(dtype)
    judge(
        lambda z: lse(z, z, scale, mask=exclude_self),
        lambda z: pairwise_lse_reference(z, z, scale, exclude_self),
        [z],
        UPSTREAM[layout],
    )


@some
@given(pairs(), st.floats(-3, 10), st.floats(-12, 12), st.sampled_from(["torch", "triton"]))
def test_sigmoids(problem, scale, bias, impl):
    q, k, mask = problem
    positive = same_group if mask is None else mask
    judge(
        lambda q, k: pairwise_sigmoid(q, k, scale, bias, positive=positive, impl=impl),
        lambda q, k: pairwise_sigmoid_reference(q, k, scale, bias, positive),
        [q, k],
        UPSTREAM["contiguous"],
    )


@some
@given(pairs(), st.integers(1, 9), st.sampled_from(["torch", "triton"]))
def test_the_largest_similarities(problem, n, impl):
    q, k, mask = problem
    n = min(n, len(k))
    values, indices = pairwise_topk(q, k, n, mask=mask, impl=impl)
    s, par = q.double() @ k.double().T, q.float() @ k.float().T
    if mask is not None:
        drop = ~as_masks(mask).keep(len(q), len(k), q.device)
        s, par = s.masked_fill(drop, -torch.inf), par.masked_fill(drop, -torch.inf)
    want, eager = s.topk(n).values, par.topk(n).values
    there = want > -torch.inf
    assert torch.equal(values > -torch.inf, there) and torch.equal(indices >= 0, there)
    chosen = s.gather(1, indices.clamp(min=0))
    for found in (values.double(), chosen):
        as_accurate_as_eager(
            torch.where(there, found, 0).float(), torch.where(there, eager, 0), want.where(there, 0)
        )
    for row in indices.tolist():
        kept = [i for i in row if i >= 0]
        assert len(set(kept)) == len(kept)
