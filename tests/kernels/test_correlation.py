import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl.kernels import correlation_plan, cross_correlation, frobenius_sq
from fastssl.kernels.correlation import correlation
from fastssl.kernels.correlation import gram_torch as correlation_torch
from fastssl.kernels.correlation.plans import PLANS
from tests.covering import crossed, examples
from tests.oracle import (
    DEVICE,
    UPSTREAM,
    assert_no_worse,
    grads,
    largest_tensor,
    saved_elements,
)

SHAPES = [(1, 1, 1), (9, 40, 40), (60, 11, 11), (25, 90, 31), (40, 7, 3), (70, 70, 70)]
DTYPES = [torch.float32, torch.bfloat16]  # squares pass the range of fp16


def rows(dtype, *shapes):
    torch.manual_seed(sum(map(sum, shapes)))
    return [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]


@pytest.fixture(autouse=True)
def strips(monkeypatch):
    """Strips of 8 rows at least, so that small symmetric matrices have several."""
    monkeypatch.setattr(correlation_torch, "LEAST_ROWS", 8)
    monkeypatch.setattr(correlation, "PLAIN", 0)
    monkeypatch.setattr(correlation, "TINY", 0)


def eager(a, b):
    return (a.T @ b).square().sum()


def eager_terms(a, b):
    c = a.T @ b
    off = c - c.diagonal().diag()
    return torch.cat([c.diagonal(), off.square().sum()[None] / 10])


GRAM_SLACK = 8.0  # by Grams the squares off the diagonal are a difference of larger sums


def terms(plan):
    def call(a, b):
        diagonal, off = cross_correlation(a, b, plan=plan)
        return torch.cat([diagonal, off[None] / 10])

    return call


@crossed(dtype={str(x): x for x in DTYPES}, reduce=UPSTREAM)
@pytest.mark.parametrize("plan", ["auto", *PLANS])
@pytest.mark.parametrize("N, D, E", SHAPES)
def test_frobenius_sq(N, D, E, plan, dtype, reduce):
    ours = lambda a, b: frobenius_sq(a, b, plan=plan)  # noqa: E731
    assert_no_worse(ours, eager, rows(dtype, (N, D), (N, E)), reduce)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("N, D", [(9, 40), (60, 11), (1, 1), (33, 33)])
def test_frobenius_sq_of_one_tensor(N, D, plan):
    ours = lambda a: frobenius_sq(a, a, plan=plan)  # noqa: E731
    assert_no_worse(ours, lambda a: eager(a, a), rows(torch.float32, (N, D)))


@crossed(dtype={str(x): x for x in DTYPES}, reduce=UPSTREAM)
@pytest.mark.parametrize("plan", ["auto", *PLANS])
@pytest.mark.parametrize("N, D", [(9, 40), (60, 11), (1, 1), (33, 33), (5, 17)])
def test_cross_correlation(N, D, plan, dtype, reduce):
    slack = GRAM_SLACK if plan == "gram" else 2.0
    assert_no_worse(terms(plan), eager_terms, rows(dtype, (N, D), (N, D)), reduce, slack)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("N, D", [(9, 40), (60, 11), (33, 33)])
def test_cross_correlation_of_one_tensor(N, D, plan):
    ours = lambda a: terms(plan)(a, a)  # noqa: E731
    formula = lambda a: eager_terms(a, a)  # noqa: E731
    slack = GRAM_SLACK if plan == "gram" else 2.0
    assert_no_worse(ours, formula, rows(torch.float32, (N, D)), slack=slack)


@pytest.mark.parametrize("same", [False, True], ids=["two", "one"])
@pytest.mark.parametrize("N, D", [(40, 7), (130, 20), (9, 20)])
def test_small_matrices_go_by_torchs_graph(monkeypatch, N, D, same):
    monkeypatch.setattr(correlation, "PLAIN", 1 << 16)
    monkeypatch.setattr(correlation, "TINY", 1 << 14)
    monkeypatch.setattr(correlation, "PLANS", dict.fromkeys(PLANS))  # which nobody may take
    shapes = [(N, D)] if same else [(N, D)] * 2
    for ours, plain in ((terms("auto"), eager_terms), (frobenius_sq, eager)):
        call = (lambda a, f=ours: f(a, a)) if same else ours
        formula = (lambda a, f=plain: f(a, a)) if same else plain
        assert_no_worse(call, formula, rows(torch.float32, *shapes), slack=GRAM_SLACK)


@settings(max_examples=examples(60))
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 9), st.booleans())
def test_plans_agree_on_any_shape(N, D, seed, same):
    torch.manual_seed(seed)
    a, b = torch.randn(2, N, D, dtype=torch.float64)
    inputs = [a] if same else [a, b]
    call = lambda plan: lambda *x: terms(plan)(x[0], x[-1])  # noqa: E731
    truth = grads(call("gram"), inputs)
    for plan in ("covariance", "sharded"):
        for found, wanted in zip(grads(call(plan), inputs), truth, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_rotated_rows_have_the_same_size():
    a, b = rows(torch.float64, (20, 9), (20, 9))
    turn = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64)).Q
    want = cross_correlation(a, b)
    for found, wanted in zip(cross_correlation(turn @ a, turn @ b), want, strict=True):
        torch.testing.assert_close(found, wanted)


def test_orthogonal_columns_have_nothing_off_the_diagonal():
    q = torch.linalg.qr(rows(torch.float64, (30, 8))[0]).Q
    diagonal, off = cross_correlation(q, q)
    torch.testing.assert_close(diagonal, torch.ones_like(diagonal))
    assert abs(off) < 1e-24
    assert frobenius_sq(q, q).item() == pytest.approx(8)


def test_which_plan_is_taken():
    assert correlation_plan(74, 100, 100) == "gram"
    assert correlation_plan(75, 100, 100) == "covariance"
    assert correlation_plan(64, 8192, 8192, world=8) == "gram"
    assert correlation_plan(512, 1024, 1024, world=64) == "covariance"
    assert correlation_plan(32, 1024, 1024, world=64) == "sharded"  # C is more than the rows


@pytest.mark.parametrize("N, D", [(30, 400), (400, 30)], ids=["gram", "covariance"])
def test_holds_no_more_than_the_smaller_matrix(N, D):
    a, b = (x.requires_grad_() for x in rows(torch.float32, (N, D), (N, D)))
    assert saved_elements(lambda: frobenius_sq(a, b)) == 2 * N * D + (1800 if N < D else 900)
    assert largest_tensor(lambda: frobenius_sq(a, b).backward()) == N * D


def test_a_symmetric_matrix_takes_little_more_than_half_the_products():
    (x,) = rows(torch.float32, (64, 20))
    done = []
    product = correlation_torch.product

    def counted(a, b):
        done.append(a.shape[0] * b.shape[1])
        return product(a, b)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(correlation_torch, "product", counted)
        frobenius_sq(x, x, plan="gram")
    assert sum(done) == 64 * 64 * 5 / 8


def test_compiles_whole():
    a, b = rows(torch.float32, (30, 6), (30, 6))
    for plan in PLANS:
        step = terms(plan)
        whole = torch.compile(step, fullgraph=True, backend="aot_eager")
        for ours, want in zip(grads(whole, [a, b]), grads(step, [a, b]), strict=True):
            torch.testing.assert_close(ours, want)


def test_autocast_does_not_reach_inside():
    a, b = rows(torch.float32, (9, 16), (9, 16))
    plain = grads(terms("auto"), [a, b])
    with torch.autocast(DEVICE, torch.bfloat16):
        inside = grads(terms("auto"), [a, b])
    assert all(torch.equal(x, y) for x, y in zip(plain, inside, strict=True))


Z = torch.zeros(4, 3)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: frobenius_sq(Z, Z[:3]), r"same rows, got \(4, 3\) and \(3, 3\)"),
        (lambda: frobenius_sq(Z[0], Z[0]), r"a must be \(N, D\), got \(3,\)"),
        (lambda: frobenius_sq(Z[:0], Z[:0]), "a must have at least 1 rows in all, got 0"),
        (lambda: frobenius_sq(Z, Z.double()), "share dtype and device, got .* torch.float64"),
        (lambda: frobenius_sq(Z, Z, impl="fast"), "for frobenius_sq, got 'fast'"),
        (lambda: frobenius_sq(Z, Z, plan="fast"), "plan must be one of auto, gram, .* got 'fast'"),
        (lambda: cross_correlation(Z, Z[:, :2]), r"same shape, got \(4, 3\) and \(4, 2\)"),
        (lambda: cross_correlation(Z.long(), Z), "a must be a floating-point tensor"),
    ],
)
def test_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call()
