"""The scaled cosine error beside the formula as published."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl.kernels import scaled_cosine_error
from fastssl.kernels.regression import cosine_triton as ops
from tests.oracle import DEVICE, UPSTREAM, assert_no_worse, largest_tensor, saved_elements

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IMPLS = ["torch", "triton"]
LAYOUTS = [(torch.float32, r) for r in UPSTREAM.values()]  # and each dtype once
LAYOUTS += [(dtype, UPSTREAM["sliced"]) for dtype in DTYPES[1:]]
pytestmark = pytest.mark.usefixtures("small_blocks")


def rows(*shape, dtype=torch.float32):
    torch.manual_seed(sum(shape))
    p = torch.randn(shape, device=DEVICE)
    return [x.to(dtype) for x in (p, 0.5 * p + torch.randn(shape, device=DEVICE))]


def formula(pred, target, ids=None, gamma=2.0):
    """GraphMAE's equation 2, by rows, in the inputs' dtype."""
    if ids is not None:
        pred, target = (
            torch.stack([x[i] for x, i in zip(y, ids, strict=True)]) for y in (pred, target)
        )
    cos = (F.normalize(pred, dim=-1) * F.normalize(target, dim=-1)).sum(-1)
    return (1 - cos).pow(gamma)


def wide(call):
    return lambda *x: call(*x).to(torch.promote_types(x[0].dtype, torch.float32))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype, reduce", LAYOUTS)
@pytest.mark.parametrize("gamma", [2.0, 1.0, 2.7])
def test_rows(gamma, dtype, reduce, impl):
    call = partial(scaled_cosine_error, gamma=gamma, impl=impl)
    assert_no_worse(call, wide(partial(formula, gamma=gamma)), rows(6, 19, dtype=dtype), reduce)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("reduce", [UPSTREAM["expanded"], UPSTREAM["sliced"]])
@pytest.mark.parametrize("chosen", [True, False], ids=["ids", "all"])
@pytest.mark.parametrize("D", [1, 13])
def test_sequences(D, chosen, reduce, impl):
    pred, target = rows(2, 5, D)
    ids = torch.rand(2, 5, device=DEVICE).argsort(1)[:, :3] if chosen else None
    call = partial(scaled_cosine_error, ids=ids, gamma=3.0, impl=impl)
    assert_no_worse(call, partial(formula, ids=ids, gamma=3.0), [pred, target], reduce)
    assert call(pred, target).shape == (2, 3 if chosen else 5)


@pytest.mark.parametrize("impl", IMPLS)
def test_perfect_predictions_and_opposites(impl):
    """Where cos rounds to more than 1 as well: 0, never below, and a finite gradient."""
    torch.manual_seed(0)
    p = torch.randn(40, 13, device=DEVICE).requires_grad_()
    for gamma, scale in ((1.5, 3.0), (1.0, 0.1), (2.0, 1e-3)):
        loss = scaled_cosine_error(p, scale * p.detach(), gamma=gamma, impl=impl)
        (g,) = torch.autograd.grad(loss.sum(), p)
        assert (loss >= 0).all() and (loss < 1e-6 ** min(gamma, 1.5)).all() and g.isfinite().all()
        assert (g.abs() < 1e-2).all()
    loss = scaled_cosine_error(p, -p.detach(), gamma=3.0, impl=impl)
    torch.testing.assert_close(loss, torch.full_like(loss, 8.0))


@pytest.mark.parametrize("impl", IMPLS)
def test_the_gradient_at_one(impl):
    """gamma = 1: that of -cos, which is across the row; gamma > 1: zero."""
    p, t = (torch.tensor([[1.0, 0.0]], device=DEVICE).requires_grad_() for _ in range(2))
    for gamma in (1.0, 1.25, 2.0):
        loss = scaled_cosine_error(p, t, gamma=gamma, impl=impl)
        assert loss.item() == 0
        assert all((g == 0).all() for g in torch.autograd.grad(loss.sum(), (p, t)))
    almost = torch.tensor([[1.0, 1e-4]], device=DEVICE)  # cos rounds to 1 here
    (g,) = torch.autograd.grad(scaled_cosine_error(p, almost, gamma=1.0, impl=impl).sum(), p)
    torch.testing.assert_close(g, torch.tensor([[0.0, -1e-4]], device=DEVICE), rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_zero_rows_are_as_torch_normalizes_them(impl):
    p, t = rows(4, 9)
    p[1], t[2], p[3] = 0, 0, 1e-13
    call = partial(scaled_cosine_error, impl=impl)
    a, b = p.clone().requires_grad_(), t.clone().requires_grad_()
    ours, eager = call(a, b), formula(a, b)
    torch.testing.assert_close(ours, eager)
    assert ours[1] == ours[2] == 1
    want = torch.autograd.grad(eager.sum(), (a, b))
    for g, w in zip(torch.autograd.grad(ours.sum(), (a, b)), want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("impl", IMPLS)
def test_frozen_sides_and_mixed_dtypes(impl):
    p, t = rows(5, 9)
    p, half = p.requires_grad_(), t.half()
    loss = scaled_cosine_error(p, half, impl=impl)
    loss.sum().backward()
    torch.testing.assert_close(loss, formula(p, half.float()).detach())
    assert p.grad.dtype == torch.float32 and half.grad is None
    half.requires_grad_()
    scaled_cosine_error(p.detach(), half, impl=impl).sum().backward()
    assert half.grad.dtype == torch.float16


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("make", ["transposed", "columns", "expanded"])
def test_strided_rows(make, impl):
    wide = torch.randn(4, 14, 12, device=DEVICE)
    x = {
        "transposed": wide[:, :6, :9].mT,
        "columns": wide[:, ::2, 1:7:2],
        "expanded": wide[:1, :9].expand(4, 9, 12),
    }[make]
    other = torch.randn(x.shape, device=DEVICE).mT.contiguous().mT
    ids = torch.rand(x.shape[:2], device=DEVICE).argsort(1)[:, :4].mT.contiguous().mT
    ours = scaled_cosine_error(x, other, ids, impl=impl)
    whole = scaled_cosine_error(x.contiguous(), other.contiguous(), ids.contiguous(), impl=impl)
    assert torch.equal(ours, whole)


@settings(max_examples=6)
@given(st.integers(1, 9), st.integers(1, 20), st.sampled_from([1e-9, 1.0, 1e9]), st.booleans())
@pytest.mark.parametrize("impl", IMPLS)
def test_lengths_do_not_matter(impl, n, D, scale, turned):
    p, t = rows(n, D)
    sign = -1 if turned else 1
    loss = scaled_cosine_error(scale * sign * p, sign * t * 2, impl=impl)
    torch.testing.assert_close(loss, scaled_cosine_error(p, t, impl=impl), rtol=1e-5, atol=1e-6)
    assert (loss >= 0).all() and (loss <= 4.00001).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_held(impl):
    """Forward keeps three numbers a row beside its inputs."""
    p, t = rows(16, 2, 40)
    p.requires_grad_()
    call = partial(scaled_cosine_error, p, t, impl=impl)
    assert saved_elements(call) == 2 * p.numel() + 3 * 32
    assert largest_tensor(lambda: call().sum()) <= 512  # a chunk; each side has 1280


@pytest.mark.parametrize("impl", IMPLS)
def test_a_nan_stays_in_its_row(impl):
    p, t = rows(9, 11)
    clean = scaled_cosine_error(p, t, impl=impl)
    p[3, 4] = math.nan
    loss = scaled_cosine_error(p, t, impl=impl)
    assert loss[3].isnan()
    assert torch.equal(loss[[0, 1, 2, 4, 5, 6, 7, 8]], clean[[0, 1, 2, 4, 5, 6, 7, 8]])


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_whole_and_once(impl):
    p, t = (x.requires_grad_() for x in rows(2, 5, 9))
    ids = torch.tensor([[0, 3], [4, 1]], device=DEVICE)
    run = lambda p, t: scaled_cosine_error(p, t, ids, impl=impl).sum()  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(run(p, t), (p, t))
    assert all(map(torch.equal, torch.autograd.grad(compiled(p, t), (p, t)), want))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(run(p, t), p, create_graph=True)


def test_operators():
    p, t = rows(2, 5, 9, dtype=torch.float16)
    ids = torch.tensor([[0, 3], [4, 1]], device=DEVICE)
    found = torch.ops.fastssl.cosine_errors, torch.ops.fastssl.cosine_gradients
    tests = "test_schema", "test_faketensor", "test_aot_dispatch_dynamic"
    for chosen in (ids, None):
        arguments = (p, t.float(), chosen, 1.5)
        torch.library.opcheck(found[0].default, arguments, test_utils=tests)
        loss, stats = found[0](*arguments)
        arguments = (loss, p, t, chosen, stats, 2.0, [True, False])
        torch.library.opcheck(found[1].default, arguments, test_utils=tests)


@pytest.mark.parametrize("kernel", [ops.FORWARD, ops.BACKWARD], ids=lambda kernel: kernel.name)
def test_trials_launch_what_they_time(kernel, monkeypatch):
    monkeypatch.setattr(ops, "TRIAL", (2, 3, 10))
    for name, variant in kernel.variants.items():
        named = {*variant.signature, *variant.constexprs, *variant.safe.blocks}
        assert named == set(kernel.fn.arg_names)
        if name == "float16":
            assert all(
                x.isfinite().all() for x in variant.trial(variant.safe, torch.device(DEVICE))()
            )


P, R = torch.zeros(2, 5, 4), torch.arange(3).expand(2, 3)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: scaled_cosine_error(P, P[0]), r"got \(2, 5, 4\) and \(5, 4\)"),
        (lambda: scaled_cosine_error(P.int(), P), "pred must be a floating-point tensor"),
        (lambda: scaled_cosine_error(P, P, gamma=0.5), "gamma must be >= 1, got 0.5"),
        (lambda: scaled_cosine_error(P, P, gamma=math.nan), "gamma must be >= 1, got nan"),
        (lambda: scaled_cosine_error(P[0], P[0], R), r"ids must be \(B, K\) int64 for \(B, L, D\)"),
        (lambda: scaled_cosine_error(P, P, R.int()), r"got \(2, 3\) torch.int32 for \(2, 5, 4\)"),
        (lambda: scaled_cosine_error(P, P, R + 3), r"ids must lie in 0\.\.4, got 3\.\.5"),
        (lambda: scaled_cosine_error(P, P, R // 2), "ids must not repeat within a row, got 0"),
        (lambda: scaled_cosine_error(P, P, impl="c"), "impl must be one of auto, torch, triton"),
    ],
)
def test_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call()
