"""pairwise_lse_nested: every prefix's log-sum-exps and their gradients, as prefix by prefix."""

import pytest
import torch

from fastssl.kernels import exclude_self, pairwise_lse_nested, same_group
from fastssl.kernels.common import chunks
from fastssl.kernels.pairwise.nested import pairwise_lse_nested_reference
from tests.covering import pairwise
from tests.oracle import DEVICE, UPSTREAM, assert_no_worse, grads, largest_tensor, saved_elements

DIMS = (2, 4, 8, 11)


def rows(M, N, D=12, dtype=torch.float32):
    torch.manual_seed(M)
    return [torch.randn(n, D, device=DEVICE).to(dtype) for n in (M, N)]


def joined(sides, weights=(1.0, 0.7)):
    """Rows' and columns' results of all prefixes as one tensor, so that both have a gradient."""
    return torch.cat([w * x for w, x in zip(weights, sides, strict=True)], dim=1)


def ids(n):
    return torch.arange(n, device=DEVICE) // 3


CASES = pairwise(
    {
        "M, N": [(41, 30), (30, 41), (23, 23)],
        "scale": [3.0, -20.0, 200.0],  # the last one past what is summed without a maximum
        "normalize": [False, True],
        "kind": ["apart", "same", "same object, another mask"],
        "reduce": UPSTREAM,
    }
)


def problem(M, N, kind):
    """Inputs, and a call of them: two sides, one with itself, one whose pairs are not symmetric."""
    q, k = rows(M, N)
    if kind == "apart":
        return [q, k], lambda f, q, k, *a, **o: joined(f(q, k, *a, mask=exclude_self, **o))
    later = same_group(ids(M), ids(M).flip(0))
    mask = exclude_self(ids(M)) if kind == "same" else later
    return [q], lambda f, q, *a, **o: joined(f(q, q, *a, mask=mask, **o))


@pytest.mark.parametrize(**CASES)
def test_no_worse_than_prefix_by_prefix(monkeypatch, M, N, scale, normalize, kind, reduce):
    monkeypatch.setitem(chunks.CHUNK_BYTES, DEVICE, 4 * len(DIMS) * 16**2)  # tiles of 16 by 16
    inputs, call = problem(M, N, kind)
    factor = torch.tensor(scale, device=DEVICE)

    def run(f):
        return lambda *x: call(f, *x[:-1], DIMS, x[-1], normalize=normalize).nan_to_num(neginf=0)

    ours, theirs = run(pairwise_lse_nested), run(pairwise_lse_nested_reference)
    assert_no_worse(ours, theirs, [*inputs, factor], reduce, slack=4)
    wide = [x.double() for x in (*inputs, factor)]
    torch.testing.assert_close(grads(ours, wide, reduce), grads(theirs, wide, reduce))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_in_float32_out(dtype):
    q, k = rows(9, 7, dtype=dtype)
    found = grads(lambda q, k: joined(pairwise_lse_nested(q, k, DIMS, 2.0)), [q, k])
    wide = [x.double() for x in (q, k)]
    want = grads(lambda q, k: joined(pairwise_lse_nested(q, k, DIMS, 2.0)), wide)
    assert [x.dtype for x in found] == [torch.float32, dtype, dtype]
    for got, truth in zip(found, want, strict=True):
        torch.testing.assert_close(got.double(), truth, rtol=8e-3, atol=1e-5)


def test_rows_of_zeros_and_rows_without_a_pair():
    q, k = rows(6, 6)
    q[2] = 0
    found = grads(lambda q, k: joined(pairwise_lse_nested(q, k, DIMS, 2.0, normalize=True)), [q, k])
    want = grads(
        lambda q, k: joined(pairwise_lse_nested_reference(q, k, DIMS, 2.0, normalize=True)), [q, k]
    )
    torch.testing.assert_close(found, want)
    alone = torch.arange(6, device=DEVICE)
    sides = pairwise_lse_nested(q, k, DIMS, 2.0, mask=same_group(alone, alone + 1))
    assert sides[0][:, 0].tolist() == sides[1][:, 5].tolist() == [-torch.inf] * 4
    assert sides[0][:, 1:].isfinite().all() and sides[1][:, :5].isfinite().all()


def test_nothing_of_all_pairs_is_held(monkeypatch):
    monkeypatch.setitem(chunks.CHUNK_BYTES, DEVICE, 4 * 4 * 32**2)
    q, k = (x.requires_grad_() for x in rows(300, 200))
    run = lambda: joined(pairwise_lse_nested(q, k, DIMS, 2.0)).sum()  # noqa: E731
    assert saved_elements(run) < 6 * (q.numel() + k.numel())
    assert largest_tensor(lambda: run().backward()) <= 300 * 12


def test_compiles_whole():
    q, k = (x.requires_grad_() for x in rows(9, 9))
    run = lambda q, k: joined(pairwise_lse_nested(q, k, DIMS, 2.0)).sum()  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(run(q, k) + run(q, q), (q, k))
    got = torch.autograd.grad(compiled(q, k) + compiled(q, q), (q, k))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("same", [False, True])
def test_operators(same):
    q, k = rows(9, 9 if same else 7)
    tensors = [q, q.clone() if same else k, torch.tensor(2.0, device=DEVICE), None, None]
    about, tests = (list(DIMS), True, "exclude_self@-1", same), ("test_schema", "test_faketensor")
    found = torch.ops.fastssl.nested_statistics.default, torch.ops.fastssl.nested_gradients.default
    torch.library.opcheck(found[0], (tensors, *about), test_utils=tests)
    sides = list(found[0](tensors, *about))
    torch.library.opcheck(found[1], (tensors, sides, *about), test_utils=tests)


@pytest.mark.parametrize("dims", [(), (0, 4), (4, 4), (8, 4), (4, 13), (1.5, 4)])
def test_refuses_dims(dims):
    with pytest.raises(ValueError, match="dims must be integers that rise from 1 to 12, got"):
        pairwise_lse_nested(*rows(3, 3), dims, 1.0)


def test_has_no_kernel_of_its_own():
    with pytest.raises(ValueError, match="impl must be one of auto, torch, reference for"):
        pairwise_lse_nested(*rows(3, 3), (2, 4), 1.0, impl="triton")
