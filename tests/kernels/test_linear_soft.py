"""The cross-entropy from features and prototypes by its logits' softmax, and Sinkhorn's centers."""

import math
from functools import partial
from importlib import import_module

import pytest
import torch

from fastssl.kernels import (
    linear_sinkhorn,
    linear_soft_cross_entropy,
    sinkhorn,
    soft_cross_entropy,
)
from fastssl.kernels.distillation import linear_torch, linear_triton
from tests.oracle import DEVICE, UPSTREAM, assert_no_worse, grads, largest_tensor, saved_elements
from tests.ranks import run_ranks

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IMPLS = ["torch", "triton"]
LAYOUTS = [(torch.float32, r) for r in UPSTREAM.values()]  # and each dtype once
LAYOUTS += [(dtype, UPSTREAM["sliced"]) for dtype in DTYPES[1:]]
pytestmark = pytest.mark.usefixtures("small_blocks")


def randn(*shape, dtype=torch.float32, seed=0):
    g = torch.Generator(DEVICE).manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=g, device=DEVICE).to(dtype)


def formula(x, w, y, u, center, pairs, a=0.5, b=0.25):
    """Every pair's cross-entropy by itself, weighed and summed: (V, R)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y, u, center = (z.to(x.dtype) for z in (y, u, center))
    q = ((y @ u.T - center) / b).softmax(-1)
    log_p = (x @ w.T / a).log_softmax(-1)
    rows = []
    for v, weights in enumerate(pairs):
        rows.append(sum(m * -(q[t] * log_p[v]).sum(-1).to(wide) for t, m in enumerate(weights)))
    return torch.stack(rows)


TEMPS = {"student_temp": 0.5, "teacher_temp": 0.25}
SIZES = {  # R, K, D, E: none is a block's multiple
    "rows": (37, 50, 21, 19),
    "few rows": (3, 170, 7, 35),
    "few prototypes": (70, 5, 18, 4),
}


def sides_of(R, K, D, E, dtype=torch.float32, views=()):
    V, T = views or (1, 1)
    x, y = randn(V, R, D, dtype=dtype), randn(T, R, E, dtype=dtype, seed=1)
    x, y = (x, y) if views else (x[0], y[0])
    return x / 2, randn(K, D, dtype=dtype, seed=2) / 2, y / 2, randn(K, E, dtype=dtype, seed=3) / 2


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype, reduce", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
def test_rows(size, dtype, reduce, impl):
    x, w, y, u = sides_of(*SIZES[size], dtype)
    center = randn(len(w), seed=4)
    rest = {"assign": center, "impl": impl, **TEMPS}
    assert_no_worse(
        lambda x, w: linear_soft_cross_entropy(x, w, y, u, **rest),
        lambda x, w: formula(x[None], w, y[None], u, center, [[1.0]])[0],
        [x, w],
        reduce,
    )


PAIRS = [[0.0, 1.5], [1.0, 0.0], [0.5, 2.0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_share_their_logits(dtype, monkeypatch):
    x, w, y, u = sides_of(37, 50, 21, 19, dtype, views=(3, 2))
    center, made = randn(2, 50, seed=4), []
    logits = linear_torch.Logits.__call__
    monkeypatch.setattr(linear_torch.Logits, "__call__", lambda *a: made.append(a[2]) or logits(*a))
    rest = {"assign": center, "pairs": PAIRS, **TEMPS}
    ours = lambda x, w: linear_soft_cross_entropy(x, w, y, u, **rest)  # noqa: E731
    eager = lambda x, w: formula(x, w, y, u, center[:, None], PAIRS)  # noqa: E731
    assert_no_worse(ours, eager, [x, w])
    assert sum(i.stop - i.start for i in made) == 2 * 5 * 37  # each once a pass
    with pytest.raises(ValueError, match="one view of each side, got 3 and 2"):
        linear_soft_cross_entropy(x, w, y, u, impl="triton", **rest)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_is_that_of_the_rows_in_one_pass(dtype, monkeypatch):
    x, w, y, u = sides_of(37, 50, 21, 19, dtype, views=(3, 2))
    each = torch.rand(37, device=DEVICE)
    rest = {"pairs": PAIRS, "weight": each, "reduction": "sum", **TEMPS}
    none = torch.zeros(50, device=DEVICE)
    eager = lambda x, w: (formula(x, w, y, u, none, PAIRS) * each).sum()  # noqa: E731
    ours = lambda x, w: linear_soft_cross_entropy(x, w, y, u, **rest)  # noqa: E731
    assert_no_worse(ours, eager, [x, w], lambda x: 3 * x)
    loss = ours(x.requires_grad_(), w)
    if DEVICE == "cpu":
        monkeypatch.setattr(linear_torch.Logits, "__call__", None)  # no logits in backward
    assert torch.autograd.grad(loss, x)[0].dtype == dtype


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_rows_by_index_with_padding(impl):
    x, w, y, u = sides_of(40, 23, 9, 6)
    ids, weight = torch.tensor([7, 39, 3, 0, 0, 0], device=DEVICE), torch.ones(6, device=DEVICE)
    weight[3:] = 0
    rest = {"impl": impl, **TEMPS}
    padded = partial(linear_soft_cross_entropy, rows=ids, weight=weight, **rest)
    got = grads(lambda x, w: padded(x, w, y, u), [x, w])
    want = grads(
        lambda x, w: linear_soft_cross_entropy(x[ids[:3]], w, y[ids[:3]], u, **rest), [x, w]
    )
    assert got[0].shape == (6,) and (got[0][3:] == 0).all()
    torch.testing.assert_close([got[0][:3], *got[1:]], want)
    center = linear_sinkhorn(y, u, 0.25, rows=ids, weight=weight)
    torch.testing.assert_close(center, sinkhorn(y[ids[:3]] @ u.T, 0.25))


@pytest.mark.parametrize("impl", IMPLS)
def test_the_norm_of_a_prototype_has_its_gradient(impl):
    """Weight normalization, w = g v / |v|, and Sinkhorn's center: as of stored logits."""
    x, v, y, u = sides_of(37, 50, 21, 19)
    g = torch.rand(50, 1, device=DEVICE) + 0.5
    center = linear_sinkhorn(y, u, 0.25)
    torch.testing.assert_close(center, sinkhorn(y @ u.T, 0.25))
    normed = lambda g, v: g * torch.nn.functional.normalize(v, dim=1)  # noqa: E731
    rest = {"pairs": [[1.5]], **TEMPS}
    ours = lambda x, g, v: linear_soft_cross_entropy(  # noqa: E731
        x[None], normed(g, v), y[None], u, assign=center, impl=impl, **rest
    )
    stored = lambda x, g, v: soft_cross_entropy(  # noqa: E731
        (x @ normed(g, v).T)[None], (y @ u.T)[None], center=center, **rest
    )
    torch.testing.assert_close(grads(ours, [x, g, v]), grads(stored, [x, g, v]))


@pytest.mark.parametrize("impl", IMPLS)
def test_far_logits_are_finite_and_a_match_keeps_its_digits(impl):
    one = torch.zeros(2, 3, device=DEVICE)
    one[:, 1] = 20.0
    w = torch.zeros(40, 3, device=DEVICE)
    w[3, 1] = 20.0  # 400 / 0.04: far above what exp can take
    for x, want in ((one, 0.0), (one / 4000, math.log(1 + 39 * math.exp(-1)))):
        got = grads(
            lambda x, w: linear_soft_cross_entropy(x, w, one, w.detach(), impl=impl), [x, w]
        )
        torch.testing.assert_close(got[0], torch.full_like(got[0], want), atol=1e-6, rtol=1e-5)
        assert all(z.isfinite().all() for z in got)
    far = torch.full((50, 3), -1e3, device=DEVICE)  # nothing near 0, where what is masked stands
    got = grads(lambda x, w: linear_soft_cross_entropy(x, w, one, far, impl=impl), [one, far])
    torch.testing.assert_close(got[0], torch.full_like(got[0], math.log(50)))
    assert all(z.isfinite().all() for z in got)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_sides_and_those_of_two_dtypes(impl):
    x, w = randn(21, 74)[:, ::2].T, randn(50, 42)[:, ::2]
    y, u = randn(37, 19, dtype=torch.float16), randn(50, 19, dtype=torch.float16, seed=1)
    call = partial(linear_soft_cross_entropy, impl=impl, **TEMPS)
    got = grads(lambda x, w: call(x, w, y, u), [x, w])
    want = grads(lambda x, w: call(x, w, y.float(), u.float()), [x.contiguous(), w.contiguous()])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_held(impl, monkeypatch):
    """Beside the sides a few numbers a row; never the logits."""
    x, w, y, u = sides_of(60, 70, 9, 9)
    x, w = x.requires_grad_(), w.requires_grad_()
    call = partial(linear_soft_cross_entropy, x, w, y, u, impl=impl)
    assert saved_elements(call) <= 2 * 130 * 9 + 4 * 60
    most = largest_tensor(lambda: torch.autograd.grad(call().sum(), [x, w]))
    assert most <= 5 * 16 * 70  # the parts of the prototypes' gradient; the logits have 4200
    small = largest_tensor(lambda: call(reduction="sum").backward())
    assert impl == "triton" or small <= 630  # the prototypes; a chunk has 2 rows of 70
    monkeypatch.setattr(import_module("fastssl.kernels.distillation.sinkhorn"), "CHUNK", 512)
    assert largest_tensor(lambda: linear_sinkhorn(y, u, 0.1)) <= 630


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_compiles_whole(impl, reduction):
    x, w, y, u = sides_of(5, 9, 4, 3)
    x, w = x.requires_grad_(), w.requires_grad_()
    ids = torch.tensor([3, 1, 1], device=DEVICE)
    rest = {"rows": ids, "impl": impl, "reduction": reduction}
    run = lambda x, w: linear_soft_cross_entropy(x, w, y, u, **rest).sum()  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(run(x, w), [x, w])
    torch.testing.assert_close(torch.autograd.grad(compiled(x, w), [x, w]), want)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(run(x, w), x, create_graph=True)


def test_operators():
    x, w, y, u = sides_of(5, 9, 4, 3, torch.float16, views=(1, 1))
    first, second = (
        getattr(torch.ops.fastssl, f"linear_{name}").default
        for name in ("cross_entropies", "gradients")
    )
    tests = "test_schema", "test_faketensor", "test_aot_dispatch_dynamic"
    for center in (randn(1, 9), None):
        sides = x, w, y, u, center, [1.0], 10.0, 25.0
        torch.library.opcheck(first, sides, test_utils=tests)
        loss, stats = first(*sides)
        for need in ((True, True), (False, True)):
            torch.library.opcheck(second, (loss, stats, *need, *sides), test_utils=tests)


@pytest.mark.parametrize(
    "kernel", [linear_triton.FORWARD, linear_triton.BACKWARD], ids=lambda kernel: kernel.name
)
def test_trials_launch_what_they_time(kernel, monkeypatch):
    monkeypatch.setattr(linear_triton, "TRIAL", (5, 70, 9))
    for name, variant in kernel.variants.items():
        named = {*variant.signature, *variant.constexprs, *variant.safe.blocks}
        assert named == set(kernel.fn.arg_names)
        if name.startswith("float16"):
            made = variant.trial(variant.safe, torch.device(DEVICE))()
            assert all(x.isfinite().all() for x in made)


def unlike_ranks(rank, world):
    """Ranks with 5 and 9 rows, of which one does not count, have the center of all that do."""
    y, u = randn(14, 6), randn(11, 6, seed=1)
    want = sinkhorn(torch.cat([y[:4], y[5:]]) @ u.T, 0.1)
    counts = torch.ones(14, device=DEVICE)
    counts[4] = 0
    for cut in (5, 14):  # on the second rank then none
        mine = slice(0, cut) if rank == 0 else slice(cut, 14)
        rest = {"weight": counts[mine], "process_group": None}
        torch.testing.assert_close(linear_sinkhorn(y[mine], u, 0.1, **rest), want)
        torch.testing.assert_close(sinkhorn(y[mine] @ u.T, 0.1, **rest), want)


def test_sinkhorn_joins_ranks():
    run_ranks(unlike_ranks, 2)


X, W = torch.zeros(2, 5), torch.zeros(4, 5)
ONE = torch.zeros(1, dtype=torch.int64)
call = linear_soft_cross_entropy


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: call(X, W, X[None], W), r"got \(2, 5\) and \(1, 2, 5\)"),
        (lambda: call(X.int(), W, X, W), "x must be a floating-point tensor, got torch.int32"),
        (lambda: call(X, W.half(), X, W), "x and w must share dtype and device, got torch.float32"),
        (lambda: call(X, W[:, :3], X, W), r"w must be \(K, 5\), got \(4, 3\) for x \(1, 2, 5\)"),
        (lambda: call(X, W, X, W[:, :3]), r"teacher_w must be \(K, 5\), got \(4, 3\)"),
        (lambda: call(X, W[:3], X, W), "as many prototypes, got 3 and 4"),
        (lambda: call(X, W, X[:1], W), "share rows and device, got 2 on cpu and 1 on cpu"),
        (lambda: call(X, W, X, W, assign=X), r"assign must be 4 numbers.* got \(2, 5\)"),
        (lambda: call(X, W, X, W, student_temp=0), "student_temp must be > 0, got 0"),
        (lambda: call(X, W, X, W, teacher_temp=math.nan), "teacher_temp must be > 0, got nan"),
        (lambda: call(X, W, X, W, rows=ONE + 2), r"rows must lie in 0\.\.1, got 2\.\.2"),
        (lambda: call(X, W, X, W, rows=ONE.int()), r"rows must be \(N,\) int64, got \(1,\)"),
        (lambda: call(X, W, X, W, weight=X[0]), r"weight must be \(2,\) on cpu, got \(5,\)"),
        (lambda: call(X, W, X, W, pairs=[[1]]), r"pairs is for x \(V, R, D\)"),
        (lambda: call(X[None], W, X[None], W), "pairs must be 1 rows of 1 numbers, got None"),
        (lambda: call(X, W, X, W, reduction="mean"), "must be 'none' or 'sum', got 'mean'"),
        (lambda: call(X, W, X, W, impl="c"), "impl must be one of auto, torch, triton"),
        (lambda: linear_sinkhorn(X[None], W, 1.0), r"x must be \(R, D\), got \(1, 2, 5\)"),
        (lambda: linear_sinkhorn(X, W[:0], 1.0), r"w must be \(K, 5\), got \(0, 5\)"),
        (lambda: linear_sinkhorn(X[:0], W, 1.0), "at least 1 row"),
        (lambda: linear_sinkhorn(X, W, 0.0), "temp must be > 0, got 0.0"),
        (lambda: linear_sinkhorn(X, W, 1.0, iterations=0), "iterations must be >= 1, got 0"),
        (lambda: linear_sinkhorn(X, W, 1.0, rows=ONE - 1), r"rows must lie in 0\.\.1, got -1"),
        (lambda: linear_sinkhorn(X, W, 1.0, weight=X[0]), r"weight must be \(2,\) on cpu"),
    ],
)
def test_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call()
